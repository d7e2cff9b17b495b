-- What each run changes, and what takes it back. A worker writes the record before
-- each act that cannot be repeated or undone without it. The row is made when our
-- first step of a run starts, and outlives the run: see the setting
-- MM_ORCHESTRATOR_KEEP_CHANGES.
CREATE TABLE mm_orchestrator.changes (
    run_id         uuid         NOT NULL,
    -- Queue and workspace of the run, as in table holds: only a worker of this
    -- queue reaches the files and images that the record names.
    queue          text         NOT NULL,
    workspace      text         NOT NULL,
    -- Ids and names, never content: package change defines it. NULL: nothing is
    -- recorded. json, not jsonb: a reader gets the bytes that were written.
    record         json,
    -- Patch, build or restart of the run was also run by a worker that keeps no
    -- record: a Python worker, or an older version.
    ran_elsewhere  boolean      NOT NULL DEFAULT false,
    -- When the retention removed all but the work that was set aside for
    -- somebody; NULL: it has not.
    reduced_at     timestamptz,
    created_at     timestamptz  NOT NULL DEFAULT now(),
    updated_at     timestamptz  NOT NULL DEFAULT now(),
    CONSTRAINT changes_pkey PRIMARY KEY (run_id),
    CONSTRAINT changes_record_object CHECK (json_typeof(record) = 'object'),
    CONSTRAINT changes_times CHECK (updated_at >= created_at AND reduced_at >= created_at)
);
CREATE INDEX changes_queue ON mm_orchestrator.changes (queue, updated_at);
