-- Runs that had ended and that an operator has had rolled back. Rows are kept: they
-- say who asked for it, and what the run was before.
CREATE TABLE mm_orchestrator.rollback_requests (
    id               bigint       GENERATED ALWAYS AS IDENTITY,
    run_id           uuid         NOT NULL,
    -- Celery's id of the message that was made for the rollback.
    task_id          text         NOT NULL,
    reason           text         NOT NULL DEFAULT '',
    -- Who asked for it, as far as known: user@host, or what --by says.
    requested_by     text         NOT NULL DEFAULT '',
    requested_at     timestamptz  NOT NULL,
    -- Status and end of the run before the request.
    previous_status  text         NOT NULL,
    completed_at     timestamptz  NOT NULL,
    CONSTRAINT rollback_requests_pkey PRIMARY KEY (id),
    CONSTRAINT rollback_requests_status CHECK (previous_status IN ('succeeded', 'failed'))
);
CREATE INDEX rollback_requests_run ON mm_orchestrator.rollback_requests (run_id, id);
-- requested: the rollback that an operator has asked for.
ALTER TABLE mm_orchestrator.parked
    DROP CONSTRAINT parked_why_known,
    ADD CONSTRAINT parked_why_known CHECK (why IN ('workspace', 'busy', 'lost', 'paused', 'requested'));
