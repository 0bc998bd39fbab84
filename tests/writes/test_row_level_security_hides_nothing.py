"""Row level security: a role that sees only its own rows writes, and the level is carried all the same."""

from __future__ import annotations

import pytest
from psycopg import sql

from academy import BOTH, BULK, KEY, OTHER, add_pair, configure, levels, set_level
from level_sync.setup import check, install


def secure(db, role: str, *, force: bool = False) -> None:
    """Each table shows a role only the rows of the user it has named; nobody else has a policy."""
    for table, (user_column, _) in KEY.items():
        db.execute(f"grant select, insert, update, delete on {table} to {role}")
        db.execute(f"alter table {table} enable row level security")
        if force:
            db.execute(f"alter table {table} force row level security")
        db.execute(
            f"create policy own_rows on {table} to {role}"
            f" using ({user_column} = current_setting('app.student')::bigint)"
        )


@BOTH
@BULK
def test_writer_who_sees_one_side_only_is_carried_to_the_other(database, db, role, table, inline_limit):
    configure(db, inline_limit=inline_limit)
    add_pair(db, 1, level=3)
    add_pair(db, 2, level=3)
    secure(db, role)
    db.execute(f"drop policy own_rows on {OTHER[table]}")
    app = database.connect(role)
    app.execute("set app.student = '1'")
    app.execute(f"update {table} set current_level = 6")
    assert levels(db, 1) == (6, 6)
    assert levels(db, 2) == (3, 3)


@pytest.fixture
def owned(server, empty_database):
    """A database whose owner is no superuser, with level_sync installed by him; the tables are his."""
    admin = empty_database.connect()
    name = f"owner_{empty_database.name}"
    admin.execute(sql.SQL("create role {} login").format(sql.Identifier(name)))
    admin.execute(sql.SQL("alter database {} owner to {}").format(*map(sql.Identifier, (empty_database.name, name))))
    admin.execute(sql.SQL("grant create on schema public to {}").format(sql.Identifier(name)))
    install.migrate(f"{empty_database.dsn.replace('user=postgres', '')} user={name}")
    yield empty_database.connect(name)
    admin.execute(sql.SQL("reassign owned by {} to postgres").format(sql.Identifier(name)))
    admin.execute(sql.SQL("drop owned by {}").format(sql.Identifier(name)))
    admin.execute(sql.SQL("drop role {}").format(sql.Identifier(name)))


def test_everything_works_for_an_owner_who_is_no_superuser(owned):
    assert owned.execute("select usesuper from pg_user where usename = current_user").fetchone() == (False,)
    add_pair(owned, 1, level=3)
    for table in KEY:
        set_level(owned, table, 1, 5 if table == "user_licenses" else 6)
    assert levels(owned, 1) == (5, 5)
    for call in ("drain_queue()", "reconcile()", "purge()", "maintain()"):
        owned.execute(f"call level_sync.{call}")
    red = owned.execute(
        "select name, detail from level_sync.health where ok is false and name not like '%schedule%'"
    ).fetchall()
    assert red == []


def test_rows_hidden_from_the_owner_are_not_taken_for_missing(owned, empty_database):
    """FORCE binds the owner too: what he cannot see is neither created again nor reported as a desync."""
    add_pair(owned, 1, level=3)
    add_pair(owned, 2, level=3)
    owned.execute("alter table user_licenses enable row level security, force row level security")
    owned.execute("create policy one on user_licenses using (user_id = 1) with check (true)")
    owned.execute("update specialization_progress set current_level = 5")
    admin = empty_database.connect()
    assert levels(admin, 1) == (5, 5)
    assert levels(admin, 2) == (5, 3)
    assert owned.execute("select user_id from level_sync.sync_queue").fetchall() == [(2,)]
    hidden = owned.execute("select ok, detail, hint from level_sync.health where name = 'hidden_rows'").fetchone()
    assert hidden[0] is None
    assert "user_licenses" in hidden[1]
    owned.execute("update level_sync.sync_queue set next_attempt_at = '-infinity'")
    owned.execute("call level_sync.reconcile()")
    status, error = owned.execute("select status, error from level_sync.sync_log").fetchone()
    assert status == "failed"
    assert "row level security may hide rows of user_licenses" in error
    assert owned.execute("select ok from level_sync.health where name = 'desync'").fetchone() == (None,)
    assert admin.execute("select user_id, current_level from user_licenses order by 1").fetchall() == [(1, 5), (2, 3)]
    verdicts = [
        finding
        for finding in check.check(f"{empty_database.dsn.replace('user=postgres', '')} user={owned.info.user}")
        if "row level security" in f"{finding.subject} {finding.detail}".lower()
    ]
    assert verdicts
    assert all(finding.verdict in ("decide", "cannot", "note") for finding in verdicts)
    owned.execute("alter table user_licenses no force row level security")
    owned.execute("update level_sync.sync_queue set next_attempt_at = '-infinity', dead_at = null")
    owned.execute("call level_sync.drain_queue()")
    assert levels(admin, 2) == (5, 5)


def test_owner_who_bypasses_row_level_security_is_told_nothing(db, role):
    add_pair(db, 1, level=3)
    secure(db, role, force=True)
    assert db.execute("select ok, detail from level_sync.health where name = 'hidden_rows'").fetchone() == (
        True,
        "the owner sees every row",
    )
