-- Nobody but the owner may run or write anything here until it is granted.
-- The triggers need no such right: they run for whoever may write the application's tables.

revoke all on schema level_sync from public;
revoke all on all tables in schema level_sync from public;
revoke all on all sequences in schema level_sync from public;
revoke all on all routines in schema level_sync from public;
