-- Claims: who runs, or ran, which attempt of which step, and how it ended.
--
-- No foreign key to orchestrator_runs: it would put a trigger on a table that
-- is not ours, and stand in the way of MoonMind's own migrations. A claim of a
-- run that was deleted is never looked at again.
CREATE TABLE mm_orchestrator.claims (
    run_id        uuid         NOT NULL,
    step          text         NOT NULL,
    attempt       integer      NOT NULL,
    -- Celery's id of the delivery that started it last.
    task_id       text         NOT NULL,
    -- Celery's id of the chain's first task: one submission of the run.
    root_task_id  text         NOT NULL DEFAULT '',
    -- Key of the advisory lock of the worker that runs it; NULL: nobody does.
    holder        bigint,
    -- Node name of the worker that started it last.
    worker        text         NOT NULL,
    -- Drawn anew for every start: who brings another one has lost the claim.
    token         bigint       NOT NULL,
    starts        integer      NOT NULL DEFAULT 1,
    started_at    timestamptz  NOT NULL,
    finished_at   timestamptz,
    -- json, not jsonb: a repeated delivery answers with the very same bytes.
    outcome       json,
    CONSTRAINT claims_pkey PRIMARY KEY (run_id, step, attempt),
    CONSTRAINT claims_step_known CHECK
        (step IN ('analyze', 'patch', 'build', 'restart', 'verify', 'rollback')),
    CONSTRAINT claims_attempt_positive CHECK (attempt >= 1),
    CONSTRAINT claims_starts_positive CHECK (starts >= 1),
    CONSTRAINT claims_finished_with_outcome CHECK
        ((finished_at IS NULL) = (outcome IS NULL)),
    CONSTRAINT claims_finished_has_no_holder CHECK
        (outcome IS NULL OR holder IS NULL)
);
