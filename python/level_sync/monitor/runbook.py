"""Which section of docker/RUNBOOK.md explains a check."""

from __future__ import annotations

SECTIONS = {
    "connection": "LevelSyncDatabaseUnreachable",
    "installation": "LevelSyncDatabaseUnreachable",
    "last_run": "LevelSyncRunFailed",
    "last_success": "LevelSyncNoSuccess",
    "desync": "LevelSyncDesyncStays",
    "queue_dead": "LevelSyncQueueDead",
    "queue_draining": "LevelSyncQueueStuck",
    "triggers": "LevelSyncTriggersOrFunctionsChanged",
    "functions": "LevelSyncTriggersOrFunctionsChanged",
    "shipped_functions": "LevelSyncTriggersOrFunctionsChanged",
    "schedule": "LevelSyncScheduleBroken",
    "cron_launcher": "LevelSyncScheduleBroken",
    "cron run": "LevelSyncScheduleBroken",
    "running": "LevelSyncScheduleBroken",
    "orphans": "LevelSyncOrphans",
    "foreign_keys": "LevelSyncOrphans",
    "hidden_rows": "LevelSyncRowsHidden",
    "scan": "LevelSyncScanStale",
}


def section_of(check: str, detail: str) -> str | None:
    """The section for a check that is not good; `schedule: level_sync_reconcile` is one for `schedule`."""
    if check == "last_run" and "needs_approval" in detail.partition(",")[0]:
        return "LevelSyncNeedsApproval"
    return SECTIONS.get(check.partition(":")[0])
