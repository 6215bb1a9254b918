-- Whose tasks they are: listings of one principal, and how many of its tasks have not ended.
--
-- The owner of the house sees everything and has no quota, so nobody ever looks for its tasks by
-- name: they are left out, and cost these indexes nothing. A query says so too, or PostgreSQL would
-- not use them.
CREATE INDEX task_principal ON task (principal, seq) WHERE principal <> 'owner';
CREATE INDEX task_principal_open ON task (principal)
    WHERE principal <> 'owner' AND end_no IS NULL;
