-- What an approval of a run covers, and how the run waits for one. A row is made when
-- a worker first sees the run wait for an approval, or first sees an approval of it.
CREATE TABLE mm_orchestrator.approvals (
    run_id          uuid         NOT NULL,
    -- The queue of the worker: each has a workspace of its own, which an approval is
    -- about as well.
    queue           text         NOT NULL,
    -- Digests of what the waiting run would do, as a worker last saw it, and since
    -- when that has been so. Package store defines it (Effects).
    presented       json,
    presented_at    timestamptz,
    -- The approval that a worker has met last, and what it covers.
    approved        json,
    -- SHA-256 of its token and time, to find a copy in another run's row.
    approval_key    text         NOT NULL DEFAULT '',
    -- The first task of the chain that has begun to change something under it.
    acted_for       text         NOT NULL DEFAULT '',
    -- What the last step that changes something has left.
    left_behind     json,
    -- The pause before verify: since when, until when, of which attempt, in which
    -- workspace, when the run had started, and the approval that was there before.
    paused_at       timestamptz,
    wait_until      timestamptz,
    paused_attempt  integer,
    workspace       text         NOT NULL DEFAULT '',
    run_started_at  timestamptz,
    spent_key       text         NOT NULL DEFAULT '',
    -- The first task of the chain that may run verify after the pause.
    passed_for      text         NOT NULL DEFAULT '',
    -- The last refusal, in words.
    refusal         text         NOT NULL DEFAULT '',
    refused_step    text         NOT NULL DEFAULT '',
    refused_at      timestamptz,
    CONSTRAINT approvals_pkey PRIMARY KEY (run_id, queue),
    CONSTRAINT approvals_pause CHECK ((paused_at IS NULL) = (wait_until IS NULL) AND (paused_at IS NULL) = (paused_attempt IS NULL)
                                      AND wait_until >= paused_at),
    CONSTRAINT approvals_presented_since CHECK ((presented IS NULL) = (presented_at IS NULL)),
    CONSTRAINT approvals_refusal CHECK ((refusal = '') = (refused_at IS NULL))
);
CREATE INDEX approvals_key ON mm_orchestrator.approvals (approval_key) WHERE approval_key <> '';
