-- Schedules: which task is submitted when, and how far that has come. Unlike `body`, which changes
-- only when somebody changes the schedule, the other columns say where it stands.
CREATE TABLE schedule (
    principal text COLLATE "C" NOT NULL,
    name text COLLATE "C" NOT NULL,
    body bytea NOT NULL,
    -- When it is to be looked at; none while it is paused.
    wake_at double precision,
    -- Every instant up to this one has been decided.
    decided_until double precision NOT NULL,
    -- The instant whose task is submitted when the last one has ended.
    waiting_at double precision,
    last_task_id text COLLATE "C",
    last_at double precision,
    started bigint NOT NULL,
    skipped bigint NOT NULL,
    missed bigint NOT NULL,
    -- Why the last instant without a task has none.
    reason_code text COLLATE "C",
    reason text COLLATE "C",
    reason_at double precision,
    PRIMARY KEY (principal, name)
);

CREATE INDEX schedule_wake ON schedule (wake_at, principal, name) WHERE wake_at IS NOT NULL;
