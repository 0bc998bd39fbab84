"""An application's own tables under level_sync: never replaced, carried both ways, with their own keys and comments."""

from __future__ import annotations

import time

import psycopg
import pytest

from academy import KEY, LICENSE, PROGRESS, insert, level, levels, set_level
from catalog import FOREIGN_KEYS, application_rows, foreign_keys
from level_sync.setup import install
from live_traffic import live_traffic


def test_an_adopted_table_is_never_replaced(empty_database, adopted):
    kept = "select oid, relfilenode from pg_class where relkind = 'r' and relnamespace = 'public'::regnamespace"
    kept += " and relname <> 'specialization_levels' order by oid"
    before = application_rows(adopted), adopted.execute(kept).fetchall()
    install.migrate(empty_database.dsn)
    assert (application_rows(adopted), adopted.execute(kept).fetchall()) == before


def test_adopted_tables_carry_levels_both_ways(empty_database, adopted):
    install.migrate(empty_database.dsn)
    set_level(adopted, PROGRESS, 1, 7)
    assert levels(adopted, 1) == (7, 7)
    set_level(adopted, LICENSE, 1, 3)
    assert levels(adopted, 1) == (3, 3)
    insert(adopted, PROGRESS, 1, 2, "COACH")
    assert level(adopted, LICENSE, 1, "COACH") == 2


def test_desyncs_that_were_there_before_are_found_not_touched(empty_database, adopted):
    install.migrate(empty_database.dsn)
    found = adopted.execute("select user_id, specialization, issue_type from level_sync.desync_issues").fetchall()
    assert found == [(200, "PLAYER", "missing_license")]


def test_an_older_foreign_key_is_replaced_not_doubled(empty_database, adopted):
    install.migrate(empty_database.dsn)
    for table in (PROGRESS, LICENSE):
        found = foreign_keys(adopted, table)
        assert set(found) == {name for name, (on_table, _) in FOREIGN_KEYS.items() if on_table == table}
        assert all("ON DELETE RESTRICT" in definition for definition in found.values())


def test_a_wanted_foreign_key_with_another_delete_rule_is_replaced(empty_database, adopted):
    adopted.execute("alter table user_licenses rename constraint license_holder to fk_user_licenses_user")
    before = foreign_keys(adopted, LICENSE)
    install.migrate(empty_database.dsn)
    assert "ON DELETE RESTRICT" in foreign_keys(adopted, LICENSE)["fk_user_licenses_user"]
    install.rollback(empty_database.dsn)
    assert foreign_keys(adopted, LICENSE) == before


def test_an_older_foreign_key_beside_the_wanted_one_goes(empty_database, adopted):
    adopted.execute(
        """alter table user_licenses add constraint fk_user_licenses_user foreign key (user_id)
           references users (id) on delete restrict"""
    )
    before = foreign_keys(adopted, LICENSE)
    install.migrate(empty_database.dsn)
    assert set(foreign_keys(adopted, LICENSE)) == {"fk_user_licenses_user", "fk_user_licenses_spec"}
    install.rollback(empty_database.dsn)
    assert foreign_keys(adopted, LICENSE) == before


def test_a_replaced_foreign_key_keeps_its_update_rule_and_stays_deferrable(empty_database, adopted):
    adopted.execute(
        """alter table specialization_progress add constraint progress_spec foreign key (specialization_id)
           references specializations (id) on update cascade on delete cascade deferrable initially deferred"""
    )
    install.migrate(empty_database.dsn)
    definition = foreign_keys(adopted, PROGRESS)["fk_specialization_progress_spec"]
    assert definition == (
        "FOREIGN KEY (specialization_id) REFERENCES specializations(id)"
        " ON UPDATE CASCADE ON DELETE RESTRICT DEFERRABLE INITIALLY DEFERRED"
    )


def test_an_orphan_stops_migrate_with_its_name_and_nothing_is_lost(empty_database, adopted):
    adopted.execute("insert into user_licenses (user_id, specialization_type) values (1, 'GHOST')")
    with pytest.raises(psycopg.errors.ForeignKeyViolation, match="GHOST"):
        install.migrate(empty_database.dsn)
    assert level(adopted, LICENSE, 1, "GHOST") == 1
    adopted.execute("insert into specializations (id) values ('GHOST')")
    install.migrate(empty_database.dsn)
    assert set(foreign_keys(adopted, LICENSE)) == {"fk_user_licenses_user", "fk_user_licenses_spec"}


def test_an_adopted_comment_stays(empty_database, adopted):
    install.migrate(empty_database.dsn)
    comment = "select col_description('specialization_progress'::regclass, attnum) from pg_attribute where attname = %s"
    found = adopted.execute(comment + " and attrelid = 'specialization_progress'::regclass", ["current_level"])
    assert found.fetchall() == [("the ORM's own words",)]


def test_many_rows_without_keys_are_adopted_beside_writers(request, empty_database, adopted, record_property):
    rows = 10_000_000 if request.config.getoption("proof") else 20_000
    adopted.execute("set statement_timeout = 0; set session_replication_role = replica")
    adopted.execute("alter table specialization_progress drop constraint uq_progress_pair")
    adopted.execute("alter table user_licenses drop constraint uq_license_pair, drop constraint license_holder")
    adopted.execute("create index on specialization_progress (student_id); create index on user_licenses (user_id)")
    adopted.execute("insert into users (email) select n || '@large.test' from generate_series(1, %s) as n", [rows])
    for table, (user, specialization) in KEY.items():
        adopted.execute(
            f"insert into {table} ({user}, {specialization}, current_level) select id, 'COACH', 1 from users"
        )
    adopted.execute("vacuum analyze")
    with live_traffic(empty_database) as traffic:
        began = time.monotonic()
        install.migrate(empty_database.dsn)
        took = time.monotonic() - began
    record_property(
        "figure",
        f"{rows} rows on each side adopted in {took:.1f} s; the slowest of {len(traffic.durations)} writes beside it"
        f" took {max(traffic.durations):.2f} s",
    )
    assert traffic.errors == []
    assert not traffic.was_held_up()
    assert levels(adopted, 1) in [(n, n) for n in range(1, 9)]
