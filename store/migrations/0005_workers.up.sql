-- Which workers consume a queue. A row counts only while a session has the
-- advisory lock of its key: a worker that was killed leaves its row behind, and
-- the next worker that registers deletes it.
CREATE TABLE mm_orchestrator.workers (
    -- Key of the advisory lock that the worker's session has, as in
    -- claims.holder and parked.taken_by.
    key            bigint       NOT NULL,
    queue          text         NOT NULL,
    -- Node name of the worker, such as orchestrator@box.
    node           text         NOT NULL,
    registered_at  timestamptz  NOT NULL DEFAULT now(),
    -- How many consumers of this worker the broker had on the queue, and when the
    -- broker answered. Consumers beyond the sum over all rows belong to other
    -- programs.
    consumers      integer      NOT NULL DEFAULT 0,
    consumers_at   timestamptz  NOT NULL DEFAULT now(),
    CONSTRAINT workers_pkey PRIMARY KEY (key, queue),
    CONSTRAINT workers_consumers_count CHECK (consumers >= 0)
);
CREATE INDEX workers_queue ON mm_orchestrator.workers (queue);
