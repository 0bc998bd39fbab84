#!/usr/bin/env bash
# At the first start of the database, where MONITOR_PASSWORD is set: a role that may read level_sync and nothing else.
set -euo pipefail

export PGUSER="${POSTGRES_USER:-postgres}" PGDATABASE="${POSTGRES_DB:-$POSTGRES_USER}"
[ -n "${MONITOR_PASSWORD:-}" ] || exit 0
psql --no-psqlrc --quiet --set=ON_ERROR_STOP=1 --set=password="$MONITOR_PASSWORD" <<'SQL'
select not exists (select from pg_roles where rolname = 'monitor') as is_missing \gset
\if :is_missing
  create role monitor login;
\endif
alter role monitor password :'password';
SQL
level-sync grant monitor --as reader
