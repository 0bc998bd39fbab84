"""Puts level_sync into a database: looks at it before, migrates it, schedules its jobs."""
