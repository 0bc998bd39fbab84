-- Procedures that commit batch by batch where they may, and work as one transaction where they may not.

-- Whether a CALL may commit, nothing tells. A COMMIT in a block that catches errors is always refused: with one message
-- where no COMMIT would be allowed, with another where only the block forbids it. A function hears the first one, in the
-- server's language.
create or replace function level_sync._refusal_to_commit()
  returns text language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  refusal text;
begin
  begin
    commit;
  exception when invalid_transaction_termination then
    refusal := sqlerrm;
  end;
  return refusal;
end
$$;
comment on function level_sync._refusal_to_commit() is 'What PostgreSQL says to a COMMIT inside a transaction that somebody else has begun.';

create or replace procedure level_sync._detect_outer_transaction(inout is_inside_transaction boolean)
  language plpgsql
as $$
begin
  commit;
exception when invalid_transaction_termination then
  is_inside_transaction := sqlerrm operator(pg_catalog.=) level_sync._refusal_to_commit();
end
$$;
comment on procedure level_sync._detect_outer_transaction(boolean) is 'Tells a procedure that calls it whether it is inside a transaction that somebody else has begun, and so may not commit.';

-- A procedure that commits can neither be SECURITY DEFINER nor have a SET clause: what a function would pin there is
-- set again after each COMMIT. READ COMMITTED, so that a look after a lock sees what was committed before it; other
-- people's deferred constraints at once, so that they fail inside a batch and not at its COMMIT, where nothing can
-- catch them.
create or replace procedure level_sync._begin_batch(is_inside_transaction boolean)
  language plpgsql
as $$
begin
  if not is_inside_transaction then
    commit;
    set transaction isolation level read committed;
    set constraints all immediate;
  end if;
  set local search_path = pg_catalog, pg_temp;
end
$$;
comment on procedure level_sync._begin_batch(boolean) is 'Ends the batch before and begins the next one in a transaction of its own, or in the caller''s where that has begun one.';
