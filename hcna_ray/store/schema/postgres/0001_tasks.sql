-- The tables of ../0001_tasks.sql, for PostgreSQL. Applied once; never edited afterwards: a change
-- is a new file with the next number, here and there.
--
-- Text is compared byte by byte (COLLATE "C"), as SQLite and Python do, and because an index in a
-- collation of the operating system is damaged by an upgrade of that system. Every index that a
-- listing reads ends in the accept sequence, which is the keyset.

-- The one moderator that may write. Whoever opens the store for writing raises `epoch`; every
-- transaction begins by counting itself in `commits` where its own epoch still stands, so one that
-- was replaced changes nothing, and one whose connection broke in a commit learns how it ended.
CREATE TABLE leader (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    epoch bigint NOT NULL,
    commits bigint NOT NULL,
    holder text COLLATE "C" NOT NULL,
    since timestamptz NOT NULL
);

INSERT INTO leader (epoch, commits, holder, since) VALUES (0, 0, '', clock_timestamp());

-- Small numbers with a name: generation, the sequences (last_seq, last_fact, last_end, last_audit,
-- last_settlement) and the size of what has not ended (open_tasks, open_bytes).
CREATE TABLE number (
    name text COLLATE "C" PRIMARY KEY,
    value bigint NOT NULL
) WITH (fillfactor = 50);

INSERT INTO number (name, value) VALUES
    ('generation', 1), ('last_seq', 0), ('last_fact', 0), ('last_end', 0), ('last_audit', 0),
    ('last_settlement', 0), ('open_tasks', 0), ('open_bytes', 0);

-- Tasks that are alike to the scheduler. `needs` is JSON. `ready` counts the dispatch index.
CREATE TABLE lane (
    id bigint PRIMARY KEY,
    queue text COLLATE "C" NOT NULL,
    task_type text COLLATE "C" NOT NULL,
    needs text COLLATE "C" NOT NULL,
    ready bigint NOT NULL DEFAULT 0
) WITH (fillfactor = 50);

CREATE TABLE task (
    seq bigint PRIMARY KEY,
    id text COLLATE "C" NOT NULL UNIQUE,
    -- Of the spec, what something looks for. Never changes.
    queue text COLLATE "C" NOT NULL,
    task_type text COLLATE "C" NOT NULL,
    principal text COLLATE "C" NOT NULL,
    batch_id text COLLATE "C",
    ordering_key text COLLATE "C",
    concurrency_key text COLLATE "C",
    accepted_at double precision NOT NULL,
    bytes bigint NOT NULL,
    -- Where it stands.
    version bigint NOT NULL,
    state text COLLATE "C" NOT NULL,
    due_at double precision NOT NULL,
    dispatch_key double precision NOT NULL,
    attempt bigint NOT NULL,
    failures bigint NOT NULL,
    losses bigint NOT NULL,
    unmet bigint NOT NULL,
    hold bigint NOT NULL,
    -- The lease: there is one exactly while granted_at is set. `worker` stays when it ends.
    lease_generation bigint,
    lease_attempt bigint,
    worker text COLLATE "C",
    incarnation text COLLATE "C",
    slot bigint,
    grant_seq bigint,
    granted_at double precision,
    lease_started_at double precision,
    pinned_to text COLLATE "C",
    pinned_until double precision,
    queued_at double precision,
    started_at double precision,
    finished_at double precision,
    cancel_requested_at double precision,
    cancel_reason text COLLATE "C" NOT NULL,
    progress bytea,
    error bytea,
    -- Derived from the above by the store, to be looked for.
    ready_lane bigint,
    wake_at double precision,
    held_key text COLLATE "C",
    kind text COLLATE "C",
    end_no bigint,
    checkpoint bytea,
    result bytea
) WITH (
    fillfactor = 70,
    -- A task is rewritten three or four times in its short life: clean up long before a fifth.
    autovacuum_vacuum_scale_factor = 0.02,
    autovacuum_analyze_scale_factor = 0.02
);

CREATE INDEX task_ready ON task (ready_lane, dispatch_key, seq) WHERE ready_lane IS NOT NULL;
CREATE INDEX task_wake ON task (wake_at, seq) WHERE wake_at IS NOT NULL;
CREATE INDEX task_leased ON task (granted_at) WHERE granted_at IS NOT NULL;
CREATE INDEX task_held ON task (held_key, dispatch_key, seq) WHERE held_key IS NOT NULL;
CREATE INDEX task_ordering ON task (ordering_key, seq)
    WHERE ordering_key IS NOT NULL AND end_no IS NULL;
-- The task of a key that is not held for it (hold bit 1): at most one, found without a walk.
CREATE INDEX task_ordering_out ON task (ordering_key)
    WHERE ordering_key IS NOT NULL AND end_no IS NULL AND (hold & 1) = 0;
CREATE INDEX task_finished ON task (finished_at, seq) WHERE end_no IS NOT NULL;
CREATE INDEX task_batch ON task (batch_id, seq) WHERE batch_id IS NOT NULL;
CREATE INDEX task_batch_ended ON task (batch_id, end_no)
    WHERE batch_id IS NOT NULL AND end_no IS NOT NULL;
CREATE INDEX task_state ON task (state, seq);
CREATE INDEX task_queue ON task (queue, seq);
CREATE INDEX task_type ON task (task_type, seq);
CREATE INDEX task_worker ON task (worker, seq) WHERE worker IS NOT NULL;

-- What was accepted, in a row of its own: an update writes a whole row anew, and this one never
-- changes.
CREATE TABLE task_spec (
    seq bigint PRIMARY KEY,
    body bytea NOT NULL
);

CREATE TABLE attempt (
    task_id text COLLATE "C" NOT NULL,
    generation bigint NOT NULL,
    attempt bigint NOT NULL,
    worker text COLLATE "C" NOT NULL,
    node_id text COLLATE "C" NOT NULL,
    started_at double precision NOT NULL,
    ended_at double precision,
    outcome text COLLATE "C",
    error bytea,
    PRIMARY KEY (task_id, generation, attempt)
) WITH (fillfactor = 80);

CREATE TABLE fact (
    number bigint PRIMARY KEY,
    task_id text COLLATE "C" NOT NULL,
    kind text COLLATE "C" NOT NULL,
    at double precision NOT NULL,
    state text COLLATE "C" NOT NULL,
    generation bigint,
    attempt bigint,
    worker text COLLATE "C",
    detail text COLLATE "C"
);

CREATE INDEX fact_task ON fact (task_id, number);

CREATE TABLE idempotency_key (
    principal text COLLATE "C" NOT NULL,
    key text COLLATE "C" NOT NULL,
    task_id text COLLATE "C" NOT NULL,
    fingerprint text COLLATE "C" NOT NULL,
    at double precision NOT NULL,
    PRIMARY KEY (principal, key)
);

CREATE INDEX idempotency_key_at ON idempotency_key (at);

-- child waits for parent. A row goes when the parent's end has reached the child.
CREATE TABLE dependency (
    parent_id text COLLATE "C" NOT NULL,
    child_seq bigint NOT NULL,
    child_id text COLLATE "C" NOT NULL,
    PRIMARY KEY (parent_id, child_seq)
);

CREATE INDEX dependency_child ON dependency (child_seq);

CREATE TABLE settlement (
    number bigint PRIMARY KEY,
    task_id text COLLATE "C" NOT NULL,
    completed bigint NOT NULL
);

CREATE TABLE worker (
    name text COLLATE "C" PRIMARY KEY,
    body bytea NOT NULL
);

CREATE TABLE paused_queue (
    queue text COLLATE "C" PRIMARY KEY
);

-- How many tasks stand in each state of a queue.
CREATE TABLE depth (
    queue text COLLATE "C" NOT NULL,
    state text COLLATE "C" NOT NULL,
    tasks bigint NOT NULL,
    PRIMARY KEY (queue, state)
) WITH (fillfactor = 50);

CREATE TABLE counter (
    name text COLLATE "C" NOT NULL,
    task_type text COLLATE "C" NOT NULL,
    label text COLLATE "C" NOT NULL,
    value bigint NOT NULL,
    PRIMARY KEY (name, task_type, label)
) WITH (fillfactor = 50);

CREATE TABLE audit (
    number bigint PRIMARY KEY,
    at double precision NOT NULL,
    principal text COLLATE "C" NOT NULL,
    action text COLLATE "C" NOT NULL,
    target text COLLATE "C" NOT NULL,
    outcome text COLLATE "C" NOT NULL,
    detail text COLLATE "C" NOT NULL
);
