-- Claims on the tasks of the Spec workflow chain: who runs, or ran, which task of
-- which run, and how it ended. The key is Celery's task id and not the attempt: a
-- chain that starts again from its first task counts attempts that an earlier chain
-- has had.
--
-- No foreign key to spec_workflow_runs, for the same reasons as in table claims.
CREATE TABLE mm_orchestrator.spec_claims (
    run_id       uuid         NOT NULL,
    task_id      text         NOT NULL,
    -- As in spec_workflow_task_states.task_name.
    task         text         NOT NULL,
    attempt      integer      NOT NULL,
    -- Key of the advisory lock of the worker that runs it; NULL: nobody does.
    holder       bigint,
    -- Node name of the worker that started it last.
    worker       text         NOT NULL,
    -- Drawn anew for every start: who brings another one has lost the claim.
    token        bigint       NOT NULL,
    starts       integer      NOT NULL DEFAULT 1,
    started_at   timestamptz  NOT NULL,
    finished_at  timestamptz,
    -- What the task has done so far, for whoever takes it over.
    progress     json,
    -- json, not jsonb: a repeated delivery answers with the very same bytes.
    outcome      json,
    CONSTRAINT spec_claims_pkey PRIMARY KEY (run_id, task_id),
    CONSTRAINT spec_claims_task_known CHECK
        (task IN ('discover_next_phase', 'submit_codex_job', 'apply_and_publish')),
    CONSTRAINT spec_claims_attempt_positive CHECK (attempt >= 1),
    CONSTRAINT spec_claims_starts_positive CHECK (starts >= 1),
    CONSTRAINT spec_claims_finished_with_outcome CHECK
        ((finished_at IS NULL) = (outcome IS NULL)),
    CONSTRAINT spec_claims_finished_has_no_holder CHECK
        (outcome IS NULL OR holder IS NULL)
);
