-- One run at a time per workspace: who holds it, and whose messages wait.

-- How often the attempt was handed back by a worker that stopped in order.
-- The other starts before the last one ended with the death of their worker.
ALTER TABLE mm_orchestrator.claims
    ADD COLUMN handed_back integer NOT NULL DEFAULT 0,
    ADD CONSTRAINT claims_handed_back_counts CHECK (handed_back >= 0);

-- One row for each workspace that was ever worked in. Its lock is the last one
-- that any transaction takes, whatever it locks before.
CREATE TABLE mm_orchestrator.holds (
    -- Name of the consumed queue, a colon, absolute path: hosts have a queue
    -- each, and may have the same paths.
    workspace     text         NOT NULL,
    queue         text         NOT NULL,
    -- The only run that may change the workspace; NULL: any may begin.
    run_id        uuid,
    -- Celery's id of the first task of the holder's chain, as far as known.
    root_task_id  text         NOT NULL DEFAULT '',
    since         timestamptz  NOT NULL DEFAULT now(),
    -- When a worker last had something of the holder in hand.
    seen_at       timestamptz  NOT NULL DEFAULT now(),
    CONSTRAINT holds_pkey PRIMARY KEY (workspace)
);

-- Messages that were taken from the queue and belong back into it later. A row
-- is deleted only when the broker has the message again.
CREATE TABLE mm_orchestrator.parked (
    -- Drawn anew when the same message is parked again: who deletes by an old
    -- id deletes nothing.
    id            bigint       GENERATED ALWAYS AS IDENTITY,
    workspace     text         NOT NULL,
    queue         text         NOT NULL,
    run_id        uuid         NOT NULL,
    step          text         NOT NULL,
    task_id       text         NOT NULL,
    -- Celery's id of the chain's first task.
    root_task_id  text         NOT NULL DEFAULT '',
    -- SHA-256 of run, step and task id: one row, however often it is delivered.
    message_key   bytea        NOT NULL,
    -- workspace: another run holds it. busy: a live worker runs this very step.
    -- lost: the rollback of a run whose own messages are gone.
    why           text         NOT NULL,
    -- Order of runs: 0 rollback, 1 high, 2 normal; then the run's queued_at.
    rank          smallint     NOT NULL,
    queued_at     timestamptz  NOT NULL,
    parked_at     timestamptz  NOT NULL DEFAULT now(),
    -- The message as it came. json, not jsonb: it keeps order and NUL.
    headers       json         NOT NULL,
    properties    json         NOT NULL,
    body          bytea        NOT NULL,
    -- Who is publishing it: key of a worker's advisory lock.
    taken_by      bigint,
    taken_at      timestamptz,
    CONSTRAINT parked_pkey PRIMARY KEY (id),
    CONSTRAINT parked_message_key UNIQUE (message_key),
    CONSTRAINT parked_workspace_fkey FOREIGN KEY (workspace) REFERENCES mm_orchestrator.holds (workspace),
    CONSTRAINT parked_why_known CHECK (why IN ('workspace', 'busy', 'lost')),
    CONSTRAINT parked_rank_known CHECK (rank BETWEEN 0 AND 2),
    CONSTRAINT parked_taken_since CHECK ((taken_by IS NULL) = (taken_at IS NULL))
);
CREATE INDEX parked_order ON mm_orchestrator.parked (workspace, rank, queued_at, run_id, id);
CREATE INDEX parked_run ON mm_orchestrator.parked (run_id);
