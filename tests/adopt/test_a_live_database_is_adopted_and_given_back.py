"""A live database as an ORM made it: looked at, decided on, adopted, in step, and given back as it was."""

from __future__ import annotations

import json
import subprocess
from difflib import unified_diff

import psycopg
import pytest

import command_line
from academy import BOTH, KEY, LICENSE, PROGRESS, drain, insert, levels, set_level
from command_line import Done
from level_sync.setup import check, install
from level_sync.verify import DESYNC, DRIFT, FOREIGN_KEYS, exit_code, verify

# Integer ids, no unique pair, no foreign keys to speak of, timestamps without time zone, defaults that live in the ORM.
OLD_SCHEMA = """
create table users (id serial primary key, email text);
create table specializations (id varchar(50) primary key, title text);
create table specialization_progress (
  id serial primary key,
  student_id integer references users (id) on delete cascade,
  specialization_id varchar(50),
  current_level integer,
  total_xp integer, completed_sessions integer, completed_projects integer,
  last_activity timestamp,
  notes jsonb, photo bytea, score numeric(12, 6), ratio double precision, tags text[]);
create table user_licenses (
  id serial primary key,
  user_id integer,
  specialization_type varchar(20),
  current_level integer,
  max_achieved_level integer,
  started_at timestamp,
  last_advanced_at timestamp,
  is_active boolean not null,
  payment_status varchar(20) not null,
  label text generated always as (specialization_type || ' ' || current_level) stored);
create table badges (id serial primary key, license_id integer references user_licenses (id) on delete cascade);
create function stamp() returns trigger language plpgsql as $$
begin
  perform count(*) from badges;  -- finds its tables by search_path, as triggers do
  return new;
end $$;
create trigger stamp before update on user_licenses for each row execute function stamp();
create view active_licenses as select user_id, current_level from user_licenses where is_active;
comment on column user_licenses.payment_status is 'What finance says.';

create table specialization_levels (
  specialization_id varchar(50) references specializations (id), level integer, name text, required_xp integer,
  required_sessions integer, primary key (specialization_id, level));
insert into users (email) select n || '@x' from generate_series(1, 100) as n;
insert into specializations values ('PLAYER', 'Player'), ('COACH', 'Coach');
insert into specialization_progress (student_id, specialization_id, current_level, total_xp)
select n, 'PLAYER', 1 + n % 8, n from generate_series(1, 100) as n;
insert into user_licenses (user_id, specialization_type, current_level, max_achieved_level, is_active, payment_status)
select n, 'PLAYER', 1 + n % 8, 1 + n % 8, true, 'paid' from generate_series(1, 90) as n;
"""
DUPLICATES = """
insert into specialization_progress
  (student_id, specialization_id, current_level, notes, photo, score, ratio, tags, last_activity)
values (5, 'PLAYER', 1, '{"a": [1, null, "\\u00e9\\"x"]}', '\\xdeadbeef00', 0.100000, 0.1, '{a,"b c",NULL}',
        '2026-03-29 02:30:00.123456');
insert into user_licenses (user_id, specialization_type, current_level, max_achieved_level, is_active, payment_status)
values (7, 'PLAYER', 2, 2, false, E'it''s\\n"new"'), (7, 'PLAYER', 8, 8, true, 'paid');
"""
ORPHANS = """
insert into user_licenses (user_id, specialization_type, current_level, max_achieved_level, is_active, payment_status)
values (7777, 'COACH', 2, 2, true, 'x'), (1, 'JUGGLER', 2, 2, true, 'x');
"""
DEFAULTS = """
alter table user_licenses alter column is_active set default true;
alter table user_licenses alter column payment_status set default 'unpaid';
"""


def dump(database) -> list[str]:
    """Schema and data, as pg_dump writes them, line by line, in an order that does not depend on that of the rows."""
    key = ["--restrict-key=x"] if pg_dump_restricts(database) else []
    text = subprocess.run(
        [database.server.binaries / "pg_dump", *key, database.dsn], capture_output=True, text=True, check=True
    ).stdout
    return sorted(text.splitlines())


def pg_dump_restricts(database) -> bool:
    """Newer minor releases write a random key into each dump unless given one."""
    told = subprocess.run(
        [database.server.binaries / "pg_dump", "--help"], capture_output=True, text=True, check=True
    ).stdout
    return "--restrict-key" in told


@pytest.fixture
def old(empty_database):
    connection = empty_database.connect()
    connection.execute("alter database " + empty_database.name + " set timezone = 'America/New_York'")
    connection.execute(OLD_SCHEMA)
    return connection


def findings(database) -> dict[tuple[str, str], check.Finding]:
    return {(finding.verdict, finding.subject): finding for finding in check.check(database.dsn)}


def run(database, *arguments: str) -> Done:
    return command_line.run(*arguments, "--dsn", database.dsn, columns=160)


def test_check_names_every_oddity_and_the_way_out_and_changes_nothing(empty_database, old):
    old.execute(DUPLICATES)
    old.execute(ORPHANS)
    before = dump(empty_database)
    told = check.check(empty_database.dsn)
    assert dump(empty_database) == before
    assert check.exit_code(told) == 1
    seen = {(finding.verdict, finding.subject) for finding in told}
    for key in (
        ("migrate", "specializations.max_levels"),
        ("note", "specialization_progress.last_activity"),
        ("note", "user_licenses.started_at"),
        ("decide", "user_licenses.is_active"),
        ("decide", "user_licenses.payment_status"),
        ("decide", "specialization_progress"),
        ("decide", "user_licenses"),
        ("migrate", "specialization_progress.student_id"),
        ("migrate", "user_licenses.user_id"),
        ("note", "missing_license"),
    ):
        assert key in seen, key
    details = " ".join(f"{finding.detail} {finding.fix}" for finding in told)
    for words in (
        "--merge-duplicates",
        "--quarantine-orphans",
        "7777",
        "JUGGLER",
        "stamp",
        "badges",
        "alter column is_active set default",
        "taken for UTC",
        "ON DELETE CASCADE",
    ):
        assert words in details, words


def exit_code_of(seen) -> int:
    return check.exit_code(list(seen.values()))


@pytest.mark.parametrize(
    ("oddity", "verdict", "subject", "words"),
    [
        (
            "update user_licenses set current_level = 99 where user_id = 4;"
            " update specialization_progress set current_level = null where student_id = 5;"
            " alter table specializations add column max_levels integer; update specializations set max_levels = 8",
            "note",
            "user_licenses",
            "1 levels are NULL or out of range: user 4 in PLAYER",
        ),
        (
            "update specialization_progress set current_level = null where student_id = 5",
            "note",
            "specialization_progress",
            "1 levels are NULL or out of range: user 5 in PLAYER",
        ),
        ("update user_licenses set current_level = 7 where user_id <= 2", "note", "level_mismatch", "pairs: user 1 in"),
        (
            "insert into specializations values ('A_SPECIALIZATION_OF_A_LONG_NAME', 'x')",
            "decide",
            "user_licenses.specialization_type",
            "holds 20 characters; the longest specialization id has 31",
        ),
        (
            "alter table specialization_progress force row level security, enable row level security",
            "note",
            "specialization_progress",
            "has row level security",
        ),
        ("select", "migrate", "specialization_progress.student_id", "(RESTRICT) replaces"),
        ("select", "migrate", "user_licenses.user_id", "to users is added, ON DELETE RESTRICT"),
        ("select", "migrate", "user_licenses", "has no unique index; one is built, concurrently"),
        ("select", "note", "user_licenses", "is referred to by"),
        ("select", "ok", "server", "PostgreSQL"),
    ],
)
def test_check_tells(empty_database, old, oddity, verdict, subject, words):
    old.execute(oddity)
    told = [
        finding
        for finding in check.check(empty_database.dsn)
        if (finding.verdict, finding.subject) == (verdict, subject)
    ]
    assert any(words in finding.detail for finding in told), told
    assert all(finding.fix for finding in told if verdict == "decide")


def test_check_says_when_the_triggers_would_be_stronger_than_the_tables_owner(empty_database, old):
    about = "but the triggers would run with the rights of superuser"
    assert not [finding for finding in check.check(empty_database.dsn) if about in finding.detail]
    owner = f"owner_{empty_database.name}"
    old.execute(f"create role {owner}")
    try:
        old.execute(f"alter table {LICENSE} owner to {owner}")
        told = [finding for finding in check.check(empty_database.dsn) if about in finding.detail]
        assert [finding.subject for finding in told] == [LICENSE]
        assert f'grant create on database "{empty_database.name}" to "{owner}"' in told[0].fix
    finally:
        old.execute(f"reassign owned by {owner} to current_user")
        old.execute(f"drop role {owner}")


def test_check_on_the_command_line_has_a_stable_shape(empty_database, old):
    done = run(empty_database, "check", "--json")
    told = json.loads(done.stdout)
    assert set(told) == {"exit_code", "findings"}
    assert told["exit_code"] == done.exit_code == 1
    assert all(set(finding) == {"verdict", "subject", "detail", "fix"} for finding in told["findings"])
    assert "decide" in run(empty_database, "check").stdout
    old.execute(DEFAULTS)
    assert run(empty_database, "check").exit_code == 0
    assert "Ready" in run(empty_database, "check").stdout


@pytest.mark.parametrize(
    ("oddity", "subject", "words"),
    [
        (
            "create type kind as enum ('PLAYER'); alter table user_licenses drop column label;"
            " alter table user_licenses alter column specialization_type type kind using specialization_type::kind",
            "user_licenses.specialization_type",
            "is an enum (kind)",
        ),
        (
            "alter table specialization_progress drop column current_level",
            "specialization_progress.current_level",
            "does not exist",
        ),
        ("create schema app; alter table users set schema app", "users", "stands in schema app"),
        (
            "alter table user_licenses rename to l; create view user_licenses as select * from l",
            "user_licenses",
            "is not a table",
        ),
        (
            "create rule audit as on update to user_licenses do also insert into badges default values",
            "user_licenses",
            "has the rule audit",
        ),
    ],
    ids=["enum", "no level", "another schema", "view", "rule"],
)
def test_check_says_what_cannot_be(empty_database, old, oddity, subject, words):
    old.execute(oddity)
    seen = findings(empty_database)
    assert words in seen["cannot", subject].detail
    assert seen["cannot", subject].fix
    assert exit_code_of(seen) == 2


def test_levels_that_are_an_enum_become_numbers_as_check_says(empty_database, old):
    old.execute("create type rung as enum ('1', '2', '3', '4', '5', '6', '7', '8')")
    old.execute(f"alter table {PROGRESS} alter column current_level type rung using current_level::text::rung")
    old.execute(findings(empty_database)["cannot", f"{PROGRESS}.current_level"].fix)
    assert [subject for kind, subject in findings(empty_database) if kind == "cannot"] == []


def test_users_with_a_uuid_are_told_that_there_is_no_statement_for_it(empty_database):
    db = empty_database.connect()
    db.execute("create table users (id uuid primary key)")
    finding = findings(empty_database)["cannot", "users.id"]
    assert (finding.detail, "alter" in finding.fix) == ("is uuid", False)


def test_an_enum_is_adopted_once_its_column_is_text_as_check_says(empty_database, old):
    old.execute("create type kind as enum ('PLAYER', 'COACH'); alter table user_licenses drop column label")
    old.execute("alter table user_licenses alter column specialization_type type kind using specialization_type::kind")
    old.execute(findings(empty_database)["cannot", "user_licenses.specialization_type"].fix)
    old.execute(DEFAULTS)
    assert run(empty_database, "migrate").exit_code == 0
    for table, new in ((PROGRESS, 6), (LICENSE, 3)):
        set_level(old, table, 3, new)
        assert levels(old, 3) == (new, new)
    old.execute("insert into users (id) values (500)")
    old.execute(
        "insert into user_licenses (user_id, specialization_type, current_level) values (500, 'COACH'::kind, 2)"
    )
    assert levels(old, 500, "COACH") == (2, 2)


@pytest.mark.parametrize(
    ("data", "option", "error"),
    [
        (DUPLICATES, "--merge-duplicates", "are duplicates"),
        (ORPHANS, "--quarantine-orphans", "have no user or no specialization"),
    ],
    ids=["duplicates", "orphans"],
)
def test_migrate_refuses_what_only_a_person_can_decide_and_loses_nothing(empty_database, old, data, option, error):
    old.execute(data)
    rows = [old.execute(f"select * from {table} order by id").fetchall() for table in (PROGRESS, LICENSE)]
    refused = run(empty_database, "migrate")
    assert refused.exit_code == 1
    assert error in refused.stderr
    assert option in " ".join(refused.stderr.split())
    assert [old.execute(f"select * from {table} order by id").fetchall() for table in (PROGRESS, LICENSE)] == rows
    assert run(empty_database, "migrate", option).exit_code == 0


def test_adopted_end_to_end(empty_database, old):
    old.execute(DUPLICATES)
    old.execute(ORPHANS)
    assert run(empty_database, "migrate", "--quarantine-orphans", "--merge-duplicates").exit_code == 0
    aside = old.execute("select on_table, why, user_id from level_sync.quarantined_rows order by 1, 2, 3").fetchall()
    assert aside == [
        ("specialization_progress", "duplicate", 5),
        ("user_licenses", "duplicate", 7),
        ("user_licenses", "duplicate", 7),
        ("user_licenses", "orphan", 1),
        ("user_licenses", "orphan", 7777),
    ]
    assert levels(old, 7)[1] == 8  # of the three the highest stayed
    assert levels(old, 5)[0] == 6
    old.execute(DEFAULTS)
    old.execute("call level_sync.reconcile(approve => true, direction => 'license_to_progress')")
    assert old.execute("select status, issues_found from level_sync.sync_log").fetchone() == ("success", 10)
    checks = verify(empty_database.dsn)
    assert exit_code(checks) & (DESYNC | DRIFT | FOREIGN_KEYS) == 0
    for table in (PROGRESS, LICENSE):
        set_level(old, table, 95, 2 if table == PROGRESS else 4)
    assert levels(old, 95) == (4, 4)


@BOTH
def test_of_duplicates_the_highest_stays_then_the_latest_then_the_last_written(empty_database, old, table):
    user, specialization = KEY[table]
    latest, further = {PROGRESS: ("last_activity", "total_xp"), LICENSE: ("last_advanced_at", "started_at")}[table]
    more, less = {PROGRESS: ("900", "100"), LICENSE: ("'2026-02-02'", "'2026-01-01'")}[table]
    old.execute(DEFAULTS)
    old.execute(f"delete from {table} where {user} between 11 and 15")
    old.execute(
        f"insert into {table} ({user}, {specialization}, current_level, {latest}, {further}) values"
        f" (11, 'PLAYER', 5, '2026-01-01', {less}), (11, 'PLAYER', 2, '2026-02-02', {more}),"
        f" (12, 'PLAYER', 2, '2026-02-02', {less}), (12, 'PLAYER', 2, '2026-01-01', {more}),"
        f" (13, 'PLAYER', 2, '2026-02-02', {less}), (13, 'PLAYER', 2, null, {more}),"
        f" (14, 'PLAYER', 2, '2026-01-01', {more}), (14, 'PLAYER', 2, '2026-01-01', {less}),"
        f" (15, 'PLAYER', 2, '2026-01-01', {more}), (15, 'PLAYER', 2, '2026-01-01', {more})"
    )
    kept = f"select {user}, array_agg(id order by id) from {table} where {user} between 11 and 15 group by 1"
    before = dict(old.execute(kept).fetchall())
    assert run(empty_database, "migrate", "--merge-duplicates").exit_code == 0
    after = {number: before[number].index(ids[0]) for number, ids in old.execute(kept).fetchall() if len(ids) == 1}
    assert after == {11: 0, 12: 0, 13: 0, 14: 0, 15: 1}


def test_migrate_that_stops_half_way_tells_what_it_has_done_and_how_to_go_on(empty_database, old):
    old.execute(ORPHANS + DUPLICATES)
    stopped = run(empty_database, "migrate", "--quarantine-orphans")
    assert stopped.exit_code == 1
    assert "applied 2 orphan(s) moved to level_sync.quarantined_rows" in stopped.stdout
    assert "stopped half way" in stopped.stderr
    assert run(empty_database, "rollback", "--yes").exit_code == 0


def test_rollback_leaves_schema_and_rows_as_they_were(empty_database, old):
    old.execute(DUPLICATES)
    old.execute(ORPHANS)
    before = dump(empty_database)
    assert run(empty_database, "migrate", "--quarantine-orphans", "--merge-duplicates").exit_code == 0
    assert dump(empty_database) != before
    install.rollback(empty_database.dsn)
    difference = "\n".join(unified_diff(before, dump(empty_database), n=0, lineterm=""))
    assert not difference, difference


def test_rollback_brings_rows_back_though_migrate_had_added_columns(empty_database, old):
    old.execute("alter table specialization_progress drop column completed_sessions, drop column completed_projects")
    old.execute("alter table user_licenses drop column last_advanced_at")
    old.execute(DUPLICATES)
    old.execute(ORPHANS)
    before = dump(empty_database)
    assert run(empty_database, "migrate", "--quarantine-orphans", "--merge-duplicates").exit_code == 0
    assert run(empty_database, "rollback", "--yes").exit_code == 0
    difference = "\n".join(unified_diff(before, dump(empty_database), n=0, lineterm=""))
    assert not difference, difference


def test_rollback_keeps_an_added_column_that_has_values_and_says_so(empty_database, old, caplog):
    old.execute("alter table specialization_progress drop column total_xp, drop column completed_projects")
    assert run(empty_database, "migrate").exit_code == 0
    old.execute("update specialization_progress set total_xp = 500")
    done = run(empty_database, "rollback", "--yes")
    assert done.exit_code == 0
    assert "column total_xp of public.specialization_progress stays, because there are values in it" in caplog.text
    assert old.execute("select distinct total_xp from specialization_progress").fetchall() == [(500,)]
    with pytest.raises(psycopg.errors.UndefinedColumn):
        old.execute("select completed_projects from specialization_progress")


def test_rollback_stops_where_a_row_cannot_come_back_and_loses_nothing(empty_database, old):
    old.execute(ORPHANS)
    assert run(empty_database, "migrate", "--quarantine-orphans").exit_code == 0
    old.execute("alter table user_licenses add constraint no_jugglers check (specialization_type <> 'JUGGLER')")
    stopped = run(empty_database, "rollback", "--yes")
    assert stopped.exit_code == 1
    assert "1 row(s) of level_sync.quarantined_rows cannot come back: user 1 in JUGGLER" in stopped.stderr
    assert "roll back again" in stopped.stderr
    assert old.execute("select count(*) from level_sync.quarantined_rows").fetchone() == (2,)
    half = run(empty_database, "verify", "--json")
    assert json.loads(half.stdout)["exit_code"] == half.exit_code != 0
    old.execute("alter table user_licenses drop constraint no_jugglers")
    assert run(empty_database, "rollback", "--yes").exit_code == 0
    assert old.execute("select count(*) from user_licenses where specialization_type = 'JUGGLER'").fetchone() == (1,)


def test_restore_brings_rows_back_byte_for_byte_once_nothing_forbids_it(empty_database, old):
    old.execute(ORPHANS)
    rows = old.execute("select * from user_licenses order by id").fetchall()
    install.migrate(empty_database.dsn, quarantine_orphans=True)
    outcome = install.restore(empty_database.dsn)
    assert (outcome["restored"], outcome["quarantined"]) == (0, 2)
    assert "user 7777 in COACH" in outcome["reason"]
    old.execute("insert into users (id) values (7777)")
    done = run(empty_database, "restore")
    assert done.exit_code == 1
    assert "1 row(s) restored, 1 still in quarantine" in done.stdout
    old.execute("insert into specializations (id) values ('JUGGLER')")
    assert run(empty_database, "restore").exit_code == 0
    assert old.execute("select * from user_licenses order by id").fetchall() == rows
    assert old.execute("select count(*) from level_sync.quarantined_rows").fetchone() == (0,)


def test_row_that_another_table_refers_to_is_named_and_not_moved(empty_database, old):
    old.execute(ORPHANS)
    old.execute("insert into badges (license_id) select id from user_licenses where user_id = 7777")
    refused = run(empty_database, "migrate", "--quarantine-orphans")
    assert refused.exit_code == 1
    assert "1 row(s) of public.badges refer to orphans of user_licenses" in refused.stderr
    assert old.execute("select count(*) from badges").fetchone() == (1,)


def test_creation_that_lacks_a_default_is_queued_with_the_column_named(empty_database, old):
    install.migrate(empty_database.dsn)
    insert(old, PROGRESS, 3, 4, "COACH")
    message = old.execute("select message from level_sync.sync_queue").fetchone()[0]
    assert '"is_active"' in message
    old.execute(DEFAULTS)
    drain(old)
    assert levels(old, 3, "COACH") == (4, 4)


def test_times_without_zone_are_utc_whatever_the_server_says(empty_database, old):
    install.migrate(empty_database.dsn)
    set_level(old, PROGRESS, 3, 7)
    set_level(old, LICENSE, 4, 7)
    ages = old.execute("""
        select extract(epoch from now() at time zone 'UTC' - l.last_advanced_at),
               extract(epoch from now() at time zone 'UTC' - p.last_activity)
          from user_licenses as l, specialization_progress as p where l.user_id = 3 and p.student_id = 4
    """).fetchone()
    assert all(abs(age) < 60 for age in ages)


def test_pg_dump_and_restore_of_an_installed_database_give_a_working_one(server, empty_database, old):
    install.migrate(empty_database.dsn)
    old.execute(DEFAULTS)
    binaries = empty_database.server.binaries
    dumped = subprocess.run(
        [binaries / "pg_dump", "--format=custom", empty_database.dsn], capture_output=True, check=True
    )
    name = f"{empty_database.name}_again"
    old.execute(f"create database {name}")
    again = empty_database.dsn.replace(f"dbname={empty_database.name}", f"dbname={name}")
    try:
        subprocess.run(
            [binaries / "pg_restore", "--exit-on-error", f"--dbname={again}"], input=dumped.stdout, check=True
        )
        with psycopg.connect(again, autocommit=True) as restored:
            set_level(restored, PROGRESS, 3, 7)
            assert levels(restored, 3) == (7, 7)
        assert exit_code(verify(again)) & (DRIFT | FOREIGN_KEYS) == 0
        assert install.migrate(again) == []
    finally:
        old.execute(f"drop database {name} with (force)")
