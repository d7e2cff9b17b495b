-- Which workers consume a queue. A row is true only while its key's advisory
-- lock is held: a worker that was killed leaves its row behind, and the next
-- one that registers removes it.
CREATE TABLE mm_orchestrator.workers (
    -- Key of the advisory lock that the worker's session holds, as in
    -- claims.holder and parked.taken_by.
    key            bigint       NOT NULL,
    queue          text         NOT NULL,
    -- Node name, as others know the worker: orchestrator@box.
    node           text         NOT NULL,
    registered_at  timestamptz  NOT NULL DEFAULT now(),
    -- How many consumers the broker had of the worker on the queue, and when it
    -- answered. Who counts all consumers knows by these how many are not ours.
    consumers      integer      NOT NULL DEFAULT 0,
    consumers_at   timestamptz  NOT NULL DEFAULT now(),
    CONSTRAINT workers_pkey PRIMARY KEY (key, queue),
    CONSTRAINT workers_consumers_count CHECK (consumers >= 0)
);
CREATE INDEX workers_queue ON mm_orchestrator.workers (queue);
