-- Tasks, their history, and what the scheduler looks for. Applied once; never edited afterwards:
-- a change is a new file with the next number.
--
-- Every index below is partial or append-only, so that a grant or an end touches few of them and
-- its cost does not depend on how many tasks wait.

-- Small numbers with a name: generation, the sequences (last_seq, last_fact, last_end, last_audit,
-- last_settlement) and the size of what has not ended (open_tasks, open_bytes).
CREATE TABLE number (
    name TEXT PRIMARY KEY,
    value INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

INSERT INTO number (name, value) VALUES
    ('generation', 1), ('last_seq', 0), ('last_fact', 0), ('last_end', 0), ('last_audit', 0),
    ('last_settlement', 0), ('open_tasks', 0), ('open_bytes', 0);

-- Tasks that are alike to the scheduler. `needs` is JSON. `ready` counts the dispatch index.
CREATE TABLE lane (
    id INTEGER PRIMARY KEY,
    queue TEXT NOT NULL,
    task_type TEXT NOT NULL,
    needs TEXT NOT NULL,
    ready INTEGER NOT NULL DEFAULT 0
) STRICT;

CREATE TABLE task (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    -- Of the spec, what something looks for. Never changes.
    queue TEXT NOT NULL,
    task_type TEXT NOT NULL,
    principal TEXT NOT NULL,
    batch_id TEXT,
    ordering_key TEXT,
    concurrency_key TEXT,
    accepted_at REAL NOT NULL,
    bytes INTEGER NOT NULL,
    -- Where it stands.
    version INTEGER NOT NULL,
    state TEXT NOT NULL,
    due_at REAL NOT NULL,
    dispatch_key REAL NOT NULL,
    attempt INTEGER NOT NULL,
    failures INTEGER NOT NULL,
    losses INTEGER NOT NULL,
    unmet INTEGER NOT NULL,
    hold INTEGER NOT NULL,
    -- The lease: there is one exactly while granted_at is set. `worker` stays when it ends.
    lease_generation INTEGER,
    lease_attempt INTEGER,
    worker TEXT,
    incarnation TEXT,
    slot INTEGER,
    grant_seq INTEGER,
    granted_at REAL,
    lease_started_at REAL,
    pinned_to TEXT,
    pinned_until REAL,
    queued_at REAL,
    started_at REAL,
    finished_at REAL,
    cancel_requested_at REAL,
    cancel_reason TEXT NOT NULL,
    progress BLOB,
    error BLOB,
    -- Derived from the above by the store, to be looked for.
    ready_lane INTEGER,
    wake_at REAL,
    held_key TEXT,
    kind TEXT,
    end_no INTEGER,
    checkpoint BLOB,
    result BLOB
) STRICT;

CREATE INDEX task_ready ON task (ready_lane, dispatch_key) WHERE ready_lane IS NOT NULL;
CREATE INDEX task_wake ON task (wake_at) WHERE wake_at IS NOT NULL;
CREATE INDEX task_leased ON task (granted_at) WHERE granted_at IS NOT NULL;
CREATE INDEX task_held ON task (held_key, dispatch_key) WHERE held_key IS NOT NULL;
CREATE INDEX task_ordering ON task (ordering_key)
    WHERE ordering_key IS NOT NULL AND end_no IS NULL;
-- The task of a key that is not held for it (hold bit 1): at most one, found without a walk.
CREATE INDEX task_ordering_out ON task (ordering_key)
    WHERE ordering_key IS NOT NULL AND end_no IS NULL AND hold & 1 = 0;
CREATE INDEX task_finished ON task (finished_at) WHERE end_no IS NOT NULL;
CREATE INDEX task_batch ON task (batch_id) WHERE batch_id IS NOT NULL;
CREATE INDEX task_batch_ended ON task (batch_id, end_no)
    WHERE batch_id IS NOT NULL AND end_no IS NOT NULL;
-- Listings: every index ends in the row's seq, which is the keyset.
CREATE INDEX task_state ON task (state);
CREATE INDEX task_queue ON task (queue);
CREATE INDEX task_type ON task (task_type);
CREATE INDEX task_worker ON task (worker) WHERE worker IS NOT NULL;

-- What was accepted, in a row of its own: SQLite rewrites whole rows, and this one never changes.
CREATE TABLE task_spec (
    seq INTEGER PRIMARY KEY,
    body BLOB NOT NULL
) STRICT;

CREATE TABLE attempt (
    task_id TEXT NOT NULL,
    generation INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    worker TEXT NOT NULL,
    node_id TEXT NOT NULL,
    started_at REAL NOT NULL,
    ended_at REAL,
    outcome TEXT,
    error BLOB,
    PRIMARY KEY (task_id, generation, attempt)
) STRICT, WITHOUT ROWID;

CREATE TABLE fact (
    number INTEGER PRIMARY KEY,
    task_id TEXT NOT NULL,
    kind TEXT NOT NULL,
    at REAL NOT NULL,
    state TEXT NOT NULL,
    generation INTEGER,
    attempt INTEGER,
    worker TEXT,
    detail TEXT
) STRICT;

CREATE INDEX fact_task ON fact (task_id);

CREATE TABLE idempotency_key (
    principal TEXT NOT NULL,
    key TEXT NOT NULL,
    task_id TEXT NOT NULL,
    fingerprint TEXT NOT NULL,
    at REAL NOT NULL,
    PRIMARY KEY (principal, key)
) STRICT, WITHOUT ROWID;

CREATE INDEX idempotency_key_at ON idempotency_key (at);

-- child waits for parent. A row goes when the parent's end has reached the child.
CREATE TABLE dependency (
    parent_id TEXT NOT NULL,
    child_seq INTEGER NOT NULL,
    child_id TEXT NOT NULL,
    PRIMARY KEY (parent_id, child_seq)
) STRICT, WITHOUT ROWID;

CREATE INDEX dependency_child ON dependency (child_seq);

CREATE TABLE settlement (
    number INTEGER PRIMARY KEY,
    task_id TEXT NOT NULL,
    completed INTEGER NOT NULL
) STRICT;

CREATE TABLE worker (
    name TEXT PRIMARY KEY,
    body BLOB NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE paused_queue (
    queue TEXT PRIMARY KEY
) STRICT, WITHOUT ROWID;

-- How many tasks stand in each state of a queue.
CREATE TABLE depth (
    queue TEXT NOT NULL,
    state TEXT NOT NULL,
    tasks INTEGER NOT NULL,
    PRIMARY KEY (queue, state)
) STRICT, WITHOUT ROWID;

CREATE TABLE counter (
    name TEXT NOT NULL,
    task_type TEXT NOT NULL,
    label TEXT NOT NULL,
    value INTEGER NOT NULL,
    PRIMARY KEY (name, task_type, label)
) STRICT, WITHOUT ROWID;

CREATE TABLE audit (
    number INTEGER PRIMARY KEY,
    at REAL NOT NULL,
    principal TEXT NOT NULL,
    action TEXT NOT NULL,
    target TEXT NOT NULL,
    outcome TEXT NOT NULL,
    detail TEXT NOT NULL
) STRICT;
