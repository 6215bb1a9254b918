-- What is to be told to somebody's webhook, from the commit in which a task ended until it was taken
-- there or given up. `body` is what is sent, to the byte, on every try.
CREATE TABLE delivery (
    id text COLLATE "C" PRIMARY KEY,
    task_id text COLLATE "C" NOT NULL,
    principal text COLLATE "C" NOT NULL,
    -- Host and port, so that one that does not answer is not asked more than others.
    target text COLLATE "C" NOT NULL,
    url text COLLATE "C" NOT NULL,
    body bytea NOT NULL,
    created_at double precision NOT NULL,
    due_at double precision NOT NULL,
    tries bigint NOT NULL,
    -- What came of the last try.
    note text COLLATE "C" NOT NULL
);

CREATE INDEX delivery_due ON delivery (due_at, id, target);
