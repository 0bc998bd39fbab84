"""level-sync grant: a reader sees everything and changes nothing, an operator runs and repairs; neither can do more."""

from __future__ import annotations

import json

import psycopg
import pytest

import command_line
import internals
from academy import LICENSE, PROGRESS, add_pairs, bypass, last_run, levels
from databases import new_role
from level_sync.setup import install
from level_sync.verify import DRIFT

NO_RIGHT = psycopg.errors.InsufficientPrivilege
WRITES = [
    "insert into level_sync.sync_log default values",
    "update level_sync.sync_log set status = 'success'",
    "delete from level_sync.sync_events",
    "update level_sync.sync_events set actor = 'me'",
    "delete from level_sync.sync_queue",
    "insert into level_sync.sync_queue (user_id, specialization, side, change, sqlstate, message)"
    " values (1, 'PLAYER', 'progress', 'level_changed', '00000', '')",
    "update level_sync.sync_plan set outcome = 'repaired'",
    "truncate level_sync.sync_events",
    "delete from level_sync.settings",
    f"insert into {internals.PENDING_PAIRS} (user_id, specialization, side, change)"
    " values (1, 'PLAYER', 'progress', 'level_changed')",
    "select * from level_sync.quarantined_rows",
    f"delete from {internals.INSTALLED_FUNCTIONS}",
    f"select * from {PROGRESS}",
    f"update {LICENSE} set current_level = 1",
    *internals.CALLS_OF_THE_OWNER,
]
OPERATIONS = [
    "call level_sync.reconcile()",
    "call level_sync.reconcile(dry_run => true)",
    "call level_sync.drain_queue()",
    "call level_sync.purge()",
    "call level_sync.maintain()",
    "select level_sync.undo(1)",
    "select level_sync.requeue(1, 'PLAYER')",
    "select level_sync.sync_user(1)",
    "select level_sync.sync_progress_to_license(1, 'PLAYER')",
    "select level_sync.sync_license_to_progress(1, 'PLAYER')",
    "select level_sync.update_progress(1, 'PLAYER', 10)",
    "select level_sync.advance_license(1, 'PLAYER', 7, 'me', 'why not')",
    "update level_sync.settings set repair_limit = repair_limit",
]


@pytest.fixture
def role(database, db):
    """A role that may log in and nothing else, with a name that has to be quoted."""
    with new_role(db, f"On-Call.{database.name}") as name:
        yield name


def run(database, *arguments: str) -> command_line.Done:
    return command_line.run(*arguments, "--dsn", database.dsn, columns=160)


def as_role(database, role: str, *arguments: str) -> command_line.Done:
    dsn = psycopg.conninfo.make_conninfo(database.dsn, user=role)
    return command_line.run(*arguments, "--dsn", dsn, columns=160)


def test_without_a_grant_nothing_is_allowed(database, db, role):
    stranger = database.connect(role)
    for statement in [*OPERATIONS, *WRITES, "select * from level_sync.health"]:
        with pytest.raises(NO_RIGHT):
            stranger.execute(statement)


def test_verify_without_a_grant_says_in_its_own_form_what_it_takes(database, db, role):
    done = as_role(database, role, "verify", "--json")
    answer = json.loads(done.stdout)
    assert (done.exit_code, answer["exit_code"], answer["ok"]) == (DRIFT, DRIFT, False)
    assert [(check["name"], check["ok"]) for check in answer["checks"]] == [("health", None)]
    assert "permission denied" in answer["checks"][0]["detail"]
    table = as_role(database, role, "verify")
    assert table.exit_code == DRIFT
    for words in ("not checked", "permission denied", "--as reader"):
        assert words in table.stdout


def test_checks_that_are_cut_off_are_no_desync_and_no_lost_connection(database, db):
    dsn = psycopg.conninfo.make_conninfo(database.dsn, options="-c statement_timeout=1")
    done = command_line.run("verify", "--json", "--dsn", dsn)
    [check] = json.loads(done.stdout)["checks"]
    assert (done.exit_code, check["name"], check["ok"]) == (DRIFT, "health", None)
    assert "statement timeout" in check["detail"]
    assert "grant" not in check["hint"]


@pytest.mark.parametrize("rights", ["reader", "operator"])
def test_what_both_see_is_what_the_owner_sees(database, db, role, rights):
    add_pairs(db, 3)
    with bypass(db):
        db.execute("update specialization_progress set current_level = 6 where student_id = 2")
    db.execute("call level_sync.reconcile(dry_run => true)")
    assert run(database, "grant", role, "--as", rights).exit_code == 0
    for command in ("status", "events", "queue", "log"):
        seen = as_role(database, role, command, "--json")
        assert (seen.exit_code, json.loads(seen.stdout)) == (0, json.loads(run(database, command, "--json").stdout))
    connection = database.connect(role)
    for query in ("select * from level_sync.find_desync_issues('PLAYER')", "select * from level_sync.sync_plan"):
        assert connection.execute(query).fetchall() == db.execute(query).fetchall()
    of_role, of_owner = (
        json.loads(done.stdout)["checks"]
        for done in (as_role(database, role, "verify", "--json"), run(database, "verify", "--json"))
    )
    told = {
        check["name"]: check["ok"]
        for check in of_role
        if "schedule" not in check["name"] and "cron" not in check["name"]
    }
    assert told == {check["name"]: check["ok"] for check in of_owner if check["name"] in told}
    assert not [check for check in of_role if check["ok"] and "not checked" in check["detail"]]
    db.execute("call level_sync.reconcile()")


def test_a_reader_changes_nothing(database, db, role):
    add_pairs(db, 1)
    run(database, "grant", role, "--as", "reader")
    reader = database.connect(role)
    for statement in [*OPERATIONS, *WRITES]:
        with pytest.raises(NO_RIGHT):
            reader.execute(statement)
    checks = json.loads(as_role(database, role, "verify", "--live", "--json").stdout)["checks"]
    assert [(check["ok"], "not checked" in check["detail"]) for check in checks if check["name"] == "live"] == [
        (None, True)
    ]


def test_an_operator_operates_and_forges_nothing(database, db, role):
    add_pairs(db, 3)
    with bypass(db):
        db.execute("update specialization_progress set current_level = 6 where student_id <= 2")
    run(database, "grant", role, "--as", "operator")
    operator = database.connect(role)
    operator.execute(OPERATIONS[0])
    assert (last_run(db)["status"], last_run(db)["synced_count"]) == ("success", 2)
    for statement in OPERATIONS[1:]:
        operator.execute(statement)
    assert levels(db, 2) == (6, 3)  # the run was undone
    assert levels(db, 1) == (7, 7)
    for statement in WRITES:
        with pytest.raises(NO_RIGHT):
            operator.execute(statement)
    live = json.loads(as_role(database, role, "verify", "--live", "--json").stdout)["checks"]
    assert [check["ok"] for check in live if check["name"] == "live"] == [True]
    assert as_role(database, role, "reconcile").exit_code == 0
    assert levels(db, 2) == (6, 6)


def test_reader_after_operator_is_only_reader_and_revoke_leaves_nothing(database, db, role):
    run(database, "grant", role, "--as", "operator")
    run(database, "grant", role, "--as", "reader")
    connection = database.connect(role)
    with pytest.raises(NO_RIGHT):
        connection.execute(OPERATIONS[0])
    assert as_role(database, role, "log").exit_code == 0
    assert run(database, "revoke", role).exit_code == 0
    with pytest.raises(NO_RIGHT):
        connection.execute("select * from level_sync.sync_log")
    assert db.execute("select has_schema_privilege(%s, 'level_sync', 'usage')", [role]).fetchone() == (False,)


@pytest.mark.parametrize("rights", ["reader", "operator"])
def test_migrate_renews_what_was_granted(database, db, role, rights):
    run(database, "grant", role, "--as", rights)
    internals.take_away(db, role, of_operators=False)
    if rights == "operator":
        internals.take_away(db, role, of_operators=True)
    install.migrate(database.dsn)
    connection = database.connect(role)
    assert connection.execute("select count(*) > 5 from level_sync.health").fetchone() == (True,)
    if rights == "operator":
        connection.execute("call level_sync.drain_queue()")
    else:
        with pytest.raises(NO_RIGHT):
            connection.execute("call level_sync.drain_queue()")


def test_bad_arguments_are_told_apart(database, db, role):
    unknown = run(database, "grant", "nobody; drop schema level_sync", "--as", "reader")
    assert unknown.exit_code == 1
    assert "there is no role 'nobody; drop schema level_sync'" in unknown.stderr
    assert run(database, "grant", role, "--as", "owner").exit_code == 2
    assert run(database, "grant", role).exit_code == 2
    for nobody in ("nobody", ""):
        revoked = run(database, "revoke", nobody)
        assert (revoked.exit_code, f"there is no role '{nobody}'" in revoked.stderr) == (1, True)
    assert "there is no role ''" in run(database, "grant", "", "--as", "reader").stderr
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="'owner' is neither reader nor operator"):
        internals.grant(db, role, "owner")
