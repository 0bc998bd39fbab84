-- Nothing to take back: the foreign keys themselves go with the migration that added them.
select;
