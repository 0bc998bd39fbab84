"""Runs a written schedule of sessions: each step in its order, with what blocks it and what comes of it.

    levels 3 3              before the first step: user 1's pair, at one level; `- -` for none
    with lock_wait 0        a setting of level_sync
    A: begin                a step of session A: SQL, or one of the words below
    A: X 4                  writes level 4 to side X
    B: Y 5 | waits for A    must come to wait for A, and for nobody else
    A: commit
    B goes on               must now end; `B goes on | fails 40001` where that is to happen
    = 5 5                   what others see now; a pair that waits is told with it: `= 4 3 queued X`
    because 55P03           the error that every queued pair waits with
    of user 2: = 5 5        the same of the other user, who has no row before the first step

A step without `waits for` must end while everybody else stands still, and never wait for a lock. `waits for A, gives
up` must wait for A and then end by itself; `ends` may wait, but for something that ends while all sessions stand
still. A schedule is about the sides X and Y, so that one text runs for both tables. `gate STEP` lets whoever comes to
that step of the work (internals.STEPS) wait there until `open`; who is waited for is then `gate`. `A passes once` lets
A in, up to the next time it comes there, in another transaction. `gate migrate` lets a migrate wait when it has made
its first trigger and so holds the tables' locks. A prepared transaction is waited for as `prepared`.
"""

from __future__ import annotations

import concurrent.futures
import re
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import psycopg
import pytest

import internals
from academy import (
    KEY,
    OTHER,
    PATIENCE,
    PROGRESS,
    SIDE,
    Connection,
    add_pair,
    configure,
    last_run,
    levels,
    queued,
    wait_until,
)
from level_sync.setup import install
from two_sessions import let_writes_wait

LOOK_AGAIN = 0.002  # seconds until the locks are looked at again
# Seconds. A lock_timeout of a millisecond may take longer on a busy machine; a wait that should not be takes for ever.
PASSING = 3
# However long it takes, and with the lock_timeout it came with from there on.
WAIT_AT_THE_GATE = """set_config('gate.lock_timeout', current_setting('lock_timeout'), true),
    set_config('lock_timeout', '0', true), pg_advisory_xact_lock_shared(4711),
    set_config('lock_timeout', current_setting('gate.lock_timeout'), true)"""


def stand_gate_in(observer: Connection, step: str) -> None:
    """Whoever comes to this step of the work waits there while somebody holds the advisory lock 4711."""
    internals.do_first(observer, step, WAIT_AT_THE_GATE)


def each_of(races: dict[str, dict[str, str]]) -> pytest.MarkDecorator:
    """Gives a test one `schedule` after the other, named after what races in it and what comes of it."""
    return pytest.mark.parametrize(
        "schedule",
        [
            pytest.param(text, id=f"{race}: {name}")
            for race, schedules in races.items()
            for name, text in schedules.items()
        ],
    )


class Schedule:
    """The sessions of one schedule, over the test's database."""

    def __init__(self, database: Any, table: str) -> None:
        self.database = database
        self.sides = {"X": table, "Y": OTHER[table]}
        self.observer = database.connect(options=f"-c statement_timeout={PATIENCE}s")
        self.sessions: dict[str, psycopg.Connection[Any]] = {}
        self.running: dict[str, Future[Any]] = {}
        self.migrating = ""
        self.stack = ExitStack()
        self.executor = self.stack.enter_context(ThreadPoolExecutor(8))
        let_writes_wait(self.observer)
        self.observer.execute("insert into users (id) values (1), (2)")

    def run(self, text: str) -> None:
        """Runs every step; says which one did not do what it should."""
        with self.stack:
            try:
                for line in filter(None, map(str.strip, text.splitlines())):
                    try:
                        self._step(line)
                    except AssertionError as error:
                        raise AssertionError(f"{line!r}: {error}") from error
                assert not self.running, f"still at work at the end: {sorted(self.running)}"
            finally:
                for session in self.sessions.values():
                    session.cancel()
                for session in self.sessions.values():
                    session.close()

    def _step(self, line: str) -> None:
        if found := re.fullmatch(r"levels (\d+) (\d+)|levels - -", line):
            assert found[1] == found[2], "a pair begins at one level"
            if found[1]:
                add_pair(self.observer, 1, level=int(found[1]))
        elif found := re.fullmatch(r"with (\w+) (.+)", line):
            configure(self.observer, **{found[1]: found[2]})
        elif found := re.fullmatch(r"gate (\w+)", line):
            self._gate(found[1])
        elif line == "open":
            self.sessions.pop("gate").close()
        elif found := re.fullmatch(r"(\w+) passes once", line):
            self._pass_once(found[1])
        elif found := re.fullmatch(r"(?:of user (\d): )?= (\S+) (\S+)(?: queued (.+))?", line):
            self._expect(int(found[1] or 1), found[2], found[3], found[4] or "")
        elif found := re.fullmatch(r"because (\w+)", line):
            assert {entry[4] for entry in queued(self.observer)} == {found[1]}, f"queued: {queued(self.observer)}"
        elif found := re.fullmatch(r"run (\w+)(?: (\d+) of (\d+))?", line):
            run = last_run(self.observer)
            assert run["status"] == found[1], run
            if found[2]:
                assert (run["synced_count"], run["issues_found"]) == (int(found[2]), int(found[3])), run
        elif found := re.fullmatch(r"(\w+) goes on(?: \| fails (\w+))?", line):
            self._await_end(found[1], found[2])
        elif found := re.fullmatch(r"(\w+): (.+?)(?: \| (.+))?", line):
            self._do(found[1], found[2], found[3] or "")
        else:
            raise AssertionError("not a step")

    def _do(self, name: str, action: str, expected: str) -> None:
        assert name not in self.running, f"{name} is still at work"
        session = self.sessions.get(name)
        if session is None:
            session = self.sessions[name] = self.database.connect()
        if action == "migrate":
            self.migrating = name
            self.running[name] = self.executor.submit(install.migrate, self.database.dsn)
        else:
            self.running[name] = self.executor.submit(session.execute, self._sql(action).encode())
        if waits := re.fullmatch(r"waits for (\w+)(, gives up)?(?:, fails (\w+))?", expected):
            self._await_blocked(name, waits[1])
            if waits[2] or waits[3]:
                self._await_end(name, waits[3])
        elif expected == "ends":
            self._await_end(name, None)
        else:
            fails = re.fullmatch(r"(?:fails (\w+))?", expected)
            assert fails, "not an expectation"
            self._await_unblocked_end(name, fails[1])

    def _sql(self, action: str) -> str:
        """The words of a schedule as SQL; anything else is SQL."""
        own, following = KEY[self.sides["X"]][0], KEY[self.sides["Y"]][0]
        user = {"X": own, "Y": following}
        if found := re.fullmatch(r"([XY]) (\d+)(?: of user (\d))?", action):
            side = found[1]
            return f"update {self.sides[side]} set current_level = {found[2]} where {user[side]} = {found[3] or 1}"
        if found := re.fullmatch(r"bypass ([XY]) (\d+)", action):
            written = self._sql(f"{found[1]} {found[2]}")
            return f"set session_replication_role = replica; {written}; reset session_replication_role"
        if found := re.fullmatch(r"bypass delete ([XY])", action):
            deleted = self._sql(f"delete {found[1]}")
            return f"set session_replication_role = replica; {deleted}; reset session_replication_role"
        if found := re.fullmatch(r"hold ([XY])", action):
            return f"begin; select from {self.sides[found[1]]} where {user[found[1]]} = 1 for update"
        if found := re.fullmatch(r"hold all ([XY])", action):
            return f"begin; select from {self.sides[found[1]]} for update"
        if found := re.fullmatch(r"touch ([XY])", action):
            touched = {"progress": "last_activity", "license": "last_advanced_at"}[SIDE[self.sides[found[1]]]]
            return f"update {self.sides[found[1]]} set {touched} = clock_timestamp() where {user[found[1]]} = 1"
        if found := re.fullmatch(r"lock ([XY])", action):
            return f"begin; lock table {self.sides[found[1]]} in access exclusive mode"
        if found := re.fullmatch(r"leave behind ([XY])", action):
            return (
                f"insert into {internals.PENDING_PAIRS} (user_id, specialization, side, change)"
                f" values (1, 'PLAYER', '{SIDE[self.sides[found[1]]]}', 'level_changed')"
            )
        if found := re.fullmatch(r"insert ([XY]) (\d+)(?: of user (\d))?", action):
            return self._insert(found[1], found[2], found[3] or "1")
        if found := re.fullmatch(r"upsert ([XY]) (\d+)", action):
            columns = ", ".join(KEY[self.sides[found[1]]])
            return (
                f"{self._insert(found[1], found[2])} on conflict ({columns}) do update"
                f" set current_level = excluded.current_level"
            )
        if found := re.fullmatch(r"delete ([XY])(?: of user (\d))?", action):
            return f"delete from {self.sides[found[1]]} where {user[found[1]]} = {found[2] or 1}"
        if found := re.fullmatch(r"move ([XY])", action):
            return f"update {self.sides[found[1]]} set {user[found[1]]} = 2 where {user[found[1]]} = 1"
        if found := re.fullmatch(r"reconcile(?: towards ([XY]))?(?: (.+))?", action):
            toward = (
                found[1]
                and {"progress": "license_to_progress", "license": "progress_to_license"}[SIDE[self.sides[found[1]]]]
            )
            arguments = ", ".join(filter(None, [toward and f"direction => '{toward}'", found[2]]))
            return f"call level_sync.reconcile({arguments})"
        return {
            "drain": "call level_sync.drain_queue()",
            "maintain": "call level_sync.maintain()",
            "purge": "call level_sync.purge()",
            "make the log old": "update level_sync.sync_log set job_start = job_start - interval '1 year'",
            "undo": "select level_sync.undo(max(run_id)) from level_sync.sync_log",
            "live check": internals.LIVE_CHECK,
            "drop a trigger": f"drop trigger {internals.TRUNCATED[PROGRESS]} on {PROGRESS}",
            "disable a trigger": f"alter table {PROGRESS} disable trigger {internals.TRUNCATED[PROGRESS]}",
        }.get(action, action)

    def _insert(self, side: str, level: str, user: str = "1") -> str:
        columns = ", ".join(KEY[self.sides[side]])
        return f"insert into {self.sides[side]} ({columns}, current_level) values ({user}, 'PLAYER', {level})"

    def _gate(self, step: str) -> None:
        gate = self.sessions["gate"] = self.database.connect()
        gate.execute("select pg_advisory_lock(4711)")
        if step == "migrate":
            self.observer.execute(f"""
                create function public.wait_at_the_gate() returns event_trigger language plpgsql as $$
                begin
                  perform {WAIT_AT_THE_GATE};
                end $$;
                create event trigger gate on ddl_command_end when tag in ('CREATE TRIGGER')
                  execute function public.wait_at_the_gate()""")
            return
        stand_gate_in(self.observer, step)

    def _pass_once(self, name: str) -> None:
        """The next gate stands in the lock's queue behind whoever waits before this one lets them in."""
        following = self.database.connect()
        closing = self.executor.submit(following.execute, "select pg_advisory_lock(4711)")
        wait_until(
            lambda: self.observer.execute(
                "select from pg_locks where pid = %s and not granted", [following.info.backend_pid]
            ).fetchall(),
        )
        self.sessions["gate"].close()
        self.sessions["gate"] = following
        closing.result(timeout=PATIENCE)
        self._await_blocked(name, "gate")

    def _expect(self, user: int, level_of_x: str, level_of_y: str, sides: str) -> None:
        progress, license_ = levels(self.observer, user)
        seen = {"progress": progress, "license": license_}
        expected = {SIDE[self.sides["X"]]: level_of_x, SIDE[self.sides["Y"]]: level_of_y}
        for side, level in expected.items():
            assert level == ("-" if seen[side] is None else str(seen[side])), f"the levels are {seen}"
        waiting = [entry[2] for entry in queued(self.observer) if entry[0] == user]
        assert waiting == [SIDE[self.sides[side]] for side in sides.split()], f"queued: {queued(self.observer)}"
        # A queued pair is due at once for the next drain of the schedule.
        self.observer.execute(
            "update level_sync.sync_queue set next_attempt_at = '-infinity' where queue_id in"
            " (select queue_id from level_sync.sync_queue for update skip locked)"
        )

    def _blockers(self, name: str) -> set[str]:
        """Who holds what the session waits for; a migrate opens sessions of its own."""
        of_pid = {session.info.backend_pid: other for other, session in self.sessions.items()} | {0: "prepared"}
        own_pid = self.sessions[name].info.backend_pid
        rows = self.observer.execute(
            "select unnest(pg_blocking_pids(pid)) from pg_stat_activity"
            " where datname = current_database() and backend_type = 'client backend'"
            " and (pid = %s or %s and pid <> all (%s))",
            [own_pid, name == self.migrating, list(of_pid)],
        ).fetchall()
        return {of_pid.get(blocker, self.migrating or "a stranger") for (blocker,) in rows}

    def _await_blocked(self, name: str, by: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not self.running[name].done():
            if blockers := self._blockers(name):
                assert blockers == {by}, f"waits for {sorted(blockers)}"
                return
            assert time.monotonic() < deadline, "never came to wait"
            time.sleep(LOOK_AGAIN)
        self._await_end(name, None)
        raise AssertionError("went through without waiting")

    def _await_unblocked_end(self, name: str, fails: str | None) -> None:
        deadline = time.monotonic() + PATIENCE
        blocked_since = None
        while not self.running[name].done():
            seen_at = time.monotonic()
            blockers = self._blockers(name)
            blocked_since = (blocked_since or seen_at) if blockers else None
            waited = seen_at - (blocked_since or seen_at)
            assert waited < PASSING, f"waits for {sorted(blockers)}"
            assert seen_at < deadline, "did not end"
            time.sleep(LOOK_AGAIN)
        self._await_end(name, fails)

    def _await_end(self, name: str, fails: str | None) -> None:
        try:
            error = self.running[name].exception(timeout=PATIENCE)
        except concurrent.futures.TimeoutError:
            raise AssertionError(f"did not end; it waits for {sorted(self._blockers(name))}") from None
        del self.running[name]
        sqlstate = error.sqlstate if isinstance(error, psycopg.Error) else error and repr(error)
        assert sqlstate == fails, f"ended with {error!r}, not with {fails}"
