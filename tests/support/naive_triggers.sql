-- As tutorials show it: each table's trigger updates the other where it differs. Tests and benchmark compare with it.

create table specialization_progress (
  student_id bigint, specialization_id text, current_level integer not null,
  primary key (student_id, specialization_id));
create table user_licenses (
  user_id bigint, specialization_type text, current_level integer not null,
  primary key (user_id, specialization_type));
insert into specialization_progress select n, 'PLAYER', 1 from generate_series(1, 10) as n;
insert into user_licenses select n, 'PLAYER', 1 from generate_series(1, 10) as n;

create function follow_progress() returns trigger language plpgsql as $$
begin
  update user_licenses set current_level = new.current_level
   where user_id = new.student_id and specialization_type = new.specialization_id
     and current_level <> new.current_level;
  return null;
end $$;
create function follow_license() returns trigger language plpgsql as $$
begin
  update specialization_progress set current_level = new.current_level
   where student_id = new.user_id and specialization_id = new.specialization_type
     and current_level <> new.current_level;
  return null;
end $$;
create trigger follow after update on specialization_progress for each row execute function follow_progress();
create trigger follow after update on user_licenses for each row execute function follow_license();
