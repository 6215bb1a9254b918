-- The failed tasks of one principal: what POST /tasks/retry runs again, found without a walk through
-- everything it ever submitted. A query spells both conditions out, or PostgreSQL would not use it.
CREATE INDEX task_principal_failed ON task (principal, seq)
    WHERE principal <> 'owner' AND state = 'failed';
