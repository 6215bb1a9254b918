-- What is to be told to somebody's webhook, from the commit in which a task ended until it was taken
-- there or given up. `body` is what is sent, to the byte, on every try.
CREATE TABLE delivery (
    id TEXT PRIMARY KEY NOT NULL,
    task_id TEXT NOT NULL,
    principal TEXT NOT NULL,
    -- Host and port, so that one that does not answer is not asked more than others.
    target TEXT NOT NULL,
    url TEXT NOT NULL,
    body BLOB NOT NULL,
    created_at REAL NOT NULL,
    due_at REAL NOT NULL,
    tries INTEGER NOT NULL,
    -- What came of the last try.
    note TEXT NOT NULL
) STRICT;

CREATE INDEX delivery_due ON delivery (due_at, id, target);
