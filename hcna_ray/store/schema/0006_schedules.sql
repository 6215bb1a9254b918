-- Schedules: which task is submitted when, and how far that has come. Unlike `body`, which changes
-- only when somebody changes the schedule, the other columns say where it stands.
CREATE TABLE schedule (
    principal TEXT NOT NULL,
    name TEXT NOT NULL,
    body BLOB NOT NULL,
    -- When it is to be looked at; none while it is paused.
    wake_at REAL,
    -- Every instant up to this one has been decided.
    decided_until REAL NOT NULL,
    -- The instant whose task is submitted when the last one has ended.
    waiting_at REAL,
    last_task_id TEXT,
    last_at REAL,
    started INTEGER NOT NULL,
    skipped INTEGER NOT NULL,
    missed INTEGER NOT NULL,
    -- Why the last instant without a task has none.
    reason_code TEXT,
    reason TEXT,
    reason_at REAL,
    PRIMARY KEY (principal, name)
) STRICT;

CREATE INDEX schedule_wake ON schedule (wake_at, principal, name) WHERE wake_at IS NOT NULL;
