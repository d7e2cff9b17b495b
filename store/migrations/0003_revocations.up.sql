-- Runs that an operator has ended while they were under way. The worker that
-- runs a step of one ends it; a run that no worker has in hand fails when its
-- next step begins. The row goes when the run has failed or ended.
CREATE TABLE mm_orchestrator.revocations (
    run_id      uuid         NOT NULL,
    reason      text         NOT NULL DEFAULT '',
    -- Who asked for it, as far as known: user@host.
    revoked_by  text         NOT NULL DEFAULT '',
    revoked_at  timestamptz  NOT NULL,
    CONSTRAINT revocations_pkey PRIMARY KEY (run_id)
);
