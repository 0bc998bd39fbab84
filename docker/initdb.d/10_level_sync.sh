#!/usr/bin/env bash
# At the first start of the database: installs level_sync and schedules its jobs.
set -euo pipefail

export PGUSER="${POSTGRES_USER:-postgres}" PGDATABASE="${POSTGRES_DB:-$POSTGRES_USER}"
psql --no-psqlrc --quiet --set=ON_ERROR_STOP=1 --command='create extension if not exists pg_cron'
level-sync migrate
level-sync schedule
