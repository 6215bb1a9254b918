-- Audit lines are chained: `hash` is over the line and the hash before it. Lines from before this
-- migration have none; the anchor stands behind the last of them, so that what follows has a start.
ALTER TABLE audit ADD COLUMN hash TEXT;

-- What the oldest line that is kept follows: at most one row, none as long as nothing was pruned.
CREATE TABLE audit_anchor (
    number INTEGER PRIMARY KEY,
    hash TEXT NOT NULL
) STRICT;

INSERT INTO audit_anchor
    SELECT value, '0000000000000000000000000000000000000000000000000000000000000000'
    FROM number WHERE name = 'last_audit' AND value > 0;
