"""Tables as an ORM leaves them behind, for level_sync to adopt."""

from __future__ import annotations

import pytest

# What an ORM leaves behind: serial ids, no natural primary key, its own foreign keys, comments and extra columns.
ORM_TABLES = """
create table users (id serial primary key, email text unique);
create table specializations (id varchar(50) primary key, title text, max_levels integer);
create table specialization_progress (
  id serial primary key,
  student_id integer not null,
  specialization_id varchar(50) not null,
  current_level integer not null default 1,
  total_xp integer not null default 0,
  completed_sessions integer not null default 0,
  completed_projects integer not null default 0,
  last_activity timestamp,
  theory_score numeric(5, 2),
  constraint uq_progress_pair unique (student_id, specialization_id),
  constraint progress_student foreign key (student_id) references users (id) on delete cascade
);
create table user_licenses (
  id serial primary key,
  user_id integer not null,
  specialization_type varchar(50) not null,
  current_level integer not null default 1,
  max_achieved_level integer not null default 1,
  started_at timestamp not null default now(),
  last_advanced_at timestamp,
  motivation jsonb,
  constraint uq_license_pair unique (user_id, specialization_type),
  constraint license_holder foreign key (user_id) references users (id)
);
create index license_level on user_licenses (current_level);
comment on column specialization_progress.current_level is 'the ORM''s own words';
comment on column user_licenses.motivation is 'why they train';
insert into users (email) select n || '@academy.test' from generate_series(1, 200) as n;
insert into specializations (id, title, max_levels) values ('PLAYER', 'Player', 8), ('COACH', 'Coach', 8);
insert into specialization_progress (student_id, specialization_id, current_level, total_xp, theory_score)
  select n, 'PLAYER', 1 + n % 8, n * 10, 4.5 from generate_series(1, 200) as n;
insert into user_licenses (user_id, specialization_type, current_level, max_achieved_level, motivation)
  select n, 'PLAYER', 1 + n % 8, 8, '{}' from generate_series(1, 199) as n;
"""


@pytest.fixture
def adopted(empty_database):
    """An ORM's tables with rows in them, before migrate."""
    db = empty_database.connect()
    db.execute(ORM_TABLES)
    return db
