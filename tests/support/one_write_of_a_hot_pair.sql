-- For pgbench: a random level, of one of ten pairs, on either side.
\set pair random(1, 10)
\set level random(1, 8)
\set side random(1, 2)
\if :side = 1
update specialization_progress set current_level = :level where student_id = :pair and specialization_id = 'PLAYER';
\else
update user_licenses set current_level = :level where user_id = :pair and specialization_type = 'PLAYER';
\endif
