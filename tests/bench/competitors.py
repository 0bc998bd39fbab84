"""What people would use instead of level_sync."""

from __future__ import annotations

import random
import time

import psycopg
from sqlalchemy import BigInteger, DateTime, Integer, String, create_engine, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from tree import SUPPORT

# The best that an application can do by itself, with prepared statements.
APPLICATION_TRANSACTION = """
\\set pair random(1, {pairs})
begin;
update specialization_progress set current_level = 1 + current_level % 8
 where student_id = :pair and specialization_id = 'PLAYER' returning current_level as level \\gset
update user_licenses
   set current_level = :level, max_achieved_level = greatest(max_achieved_level, :level), last_advanced_at = now()
 where user_id = :pair and specialization_type = 'PLAYER';
insert into level_sync.sync_events (occurred_at, user_id, specialization, direction, action, new_level, source)
values (now(), :pair, 'PLAYER', 'progress_to_license', 'updated', :level, 'manual');
end;
"""

NAIVE_TRIGGERS = (SUPPORT / "naive_triggers.sql").read_bytes()


def by_hand(what: str) -> tuple[str, ...]:
    """The best set-based SQL by hand for what level_sync does: the other side follows, and each change is logged."""
    if what == "create":
        return (
            """insert into user_licenses
                      (user_id, specialization_type, current_level, max_achieved_level, started_at, last_advanced_at)
               select student_id, specialization_id, current_level, current_level, now(), now()
                 from specialization_progress
               on conflict do nothing""",
            """insert into level_sync.sync_events
                      (occurred_at, user_id, specialization, direction, action, new_level, source)
               select now(), user_id, specialization_type, 'progress_to_license', 'created', current_level, 'manual'
                 from user_licenses""",
        )
    return (
        """insert into level_sync.sync_events
                  (occurred_at, user_id, specialization, direction, action, old_level, new_level, source)
           select now(), user_id, specialization_type, 'progress_to_license', 'updated', license.current_level,
                  progress.current_level, 'manual'
             from user_licenses as license
             join specialization_progress as progress
               on progress.student_id = license.user_id and progress.specialization_id = license.specialization_type
            where license.current_level <> progress.current_level""",
        """update user_licenses as license
              set current_level = progress.current_level,
                  max_achieved_level = greatest(license.max_achieved_level, progress.current_level),
                  last_advanced_at = now()
             from specialization_progress as progress
            where progress.student_id = license.user_id
              and progress.specialization_id = license.specialization_type
              and license.current_level <> progress.current_level""",
    )


# The least that a trigger can do, to see how near level_sync is to it. None of them keeps a promise: they wait for
# locks, fail the write, and go only one way.
LEAST_TRIGGERS = {
    "nothing": """
        create function does_little() returns trigger language plpgsql as $$ begin return null; end $$;
        create trigger does_little after update on specialization_progress for each row
          when (old.current_level is distinct from new.current_level) execute function does_little();
    """,
    "carry": """
        create function does_little() returns trigger language plpgsql as $$
        begin
          update user_licenses
             set current_level = new.current_level,
                 max_achieved_level = greatest(max_achieved_level, new.current_level),
                 last_advanced_at = now()
           where user_id = new.student_id and specialization_type = new.specialization_id;
          insert into level_sync.sync_events
                 (occurred_at, user_id, specialization, direction, action, old_level, new_level, source)
          values (now(), new.student_id, new.specialization_id, 'progress_to_license', 'updated', old.current_level,
                  new.current_level, 'manual');
          return null;
        end $$;
        create trigger does_little after update on specialization_progress for each row
          when (old.current_level is distinct from new.current_level) execute function does_little();
    """,
    "note": """
        create unlogged table noted (user_id bigint, specialization text);
        create function does_little() returns trigger language plpgsql as $$
        begin
          insert into noted values (new.student_id, new.specialization_id);
          return null;
        end $$;
        create trigger does_little after update on specialization_progress for each row
          when (old.current_level is distinct from new.current_level) execute function does_little();
    """,
    "note at once": """
        create unlogged table noted (user_id bigint, specialization text);
        create function does_little() returns trigger language plpgsql as $$
        begin
          insert into noted
          select after.student_id, after.specialization_id
            from after
            join before using (student_id, specialization_id)
           where after.current_level is distinct from before.current_level;
          return null;
        end $$;
        create trigger does_little after update on specialization_progress
          referencing old table as before new table as after
          for each statement execute function does_little();
    """,
}
DROP_LEAST = """
    drop trigger if exists does_little on specialization_progress;
    drop function if exists does_little();
    drop table if exists noted;
"""

# The set by hand as it would have to be written beside live writers: in batches, each row locked before it is read and
# none waited for, each batch a transaction.
IN_BATCHES = """
    with batch as materialized (
      select student_id as user_id, specialization_id as specialization, progress.current_level as new_level
        from specialization_progress as progress
       where student_id between %(first)s and %(last)s
         for no key update skip locked
    ), license as materialized (
      select user_id, specialization_type as specialization, current_level as old_level
        from user_licenses
       where user_id between %(first)s and %(last)s
         for no key update skip locked
    ), carried as (
      update user_licenses as target
         set current_level = batch.new_level,
             max_achieved_level = greatest(target.max_achieved_level, batch.new_level),
             last_advanced_at = now()
        from batch
        join license using (user_id, specialization)
       where batch.new_level <> license.old_level
         and target.user_id between %(first)s and %(last)s
         and target.user_id = batch.user_id and target.specialization_type = batch.specialization
      returning target.user_id, target.specialization_type, license.old_level, target.current_level
    ), settled as (
      delete from level_sync.sync_queue as queued
       using carried
       where queued.user_id between %(first)s and %(last)s
         and queued.user_id = carried.user_id and queued.specialization = carried.specialization_type
    )
    insert into level_sync.sync_events
           (occurred_at, user_id, specialization, direction, action, old_level, new_level, source)
    select now(), carried.user_id, carried.specialization_type, 'progress_to_license', 'updated', carried.old_level,
           carried.current_level, 'manual'
      from carried
"""


class Base(DeclarativeBase):
    pass


class Progress(Base):
    __tablename__ = "specialization_progress"
    student_id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    specialization_id: Mapped[str] = mapped_column(String, primary_key=True)
    current_level: Mapped[int] = mapped_column(Integer)


class License(Base):
    __tablename__ = "user_licenses"
    user_id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    specialization_type: Mapped[str] = mapped_column(String, primary_key=True)
    current_level: Mapped[int] = mapped_column(Integer)
    max_achieved_level: Mapped[int] = mapped_column(Integer)
    last_advanced_at: Mapped[object] = mapped_column(DateTime(timezone=True))


class Service:
    """An application that keeps both rows equal itself, row by row, as an ORM does it."""

    def __init__(self, dsn: str) -> None:
        self.engine = create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(dsn), pool_size=1)

    def change(self, session: Session, user: int) -> None:
        progress = session.get_one(Progress, (user, "PLAYER"))
        license_ = session.get_one(License, (user, "PLAYER"))
        progress.current_level = 1 + progress.current_level % 8
        self.follow(progress, license_)
        session.commit()

    def follow(self, progress: Progress, license_: License) -> None:
        license_.current_level = progress.current_level
        license_.max_achieved_level = max(license_.max_achieved_level, progress.current_level)
        license_.last_advanced_at = func.now()

    def per_second(self, pairs: int, seconds: int) -> float:
        """Level changes a second of one worker."""
        done, end = 0, time.perf_counter() + seconds
        with Session(self.engine) as session:
            while time.perf_counter() < end:
                self.change(session, random.randint(1, pairs))  # noqa: S311
                done += 1
        return done / seconds

    def repair_all(self) -> None:
        """The nightly job: every progress row, its license, and a commit for each that differs."""
        with Session(self.engine, expire_on_commit=False) as session:
            for progress in session.scalars(select(Progress)).all():
                license_ = session.get_one(License, (progress.student_id, progress.specialization_id))
                if license_.current_level != progress.current_level:
                    self.follow(progress, license_)
                    session.commit()
