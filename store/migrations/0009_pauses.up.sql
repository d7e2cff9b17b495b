-- Pauses of queues, the history of them included. While a pause is open, workers of
-- this program begin no new run of the queue.
CREATE TABLE mm_orchestrator.pauses (
    id          bigint       GENERATED ALWAYS AS IDENTITY,
    queue       text         NOT NULL,
    -- finish: a run that has begun goes on to its end. park: the running step ends,
    -- and the next one waits. A rollback never waits.
    mode        text         NOT NULL DEFAULT 'finish',
    reason      text         NOT NULL,
    -- Who asked for it, as far as known: user@host, or what --by says.
    paused_by   text         NOT NULL DEFAULT '',
    since       timestamptz  NOT NULL,
    -- Who gave the present reason and mode, and when, if somebody paused again.
    changed_by  text         NOT NULL DEFAULT '',
    changed_at  timestamptz,
    -- NULL: the pause is open.
    resumed_by  text         NOT NULL DEFAULT '',
    resumed_at  timestamptz,
    CONSTRAINT pauses_pkey PRIMARY KEY (id),
    CONSTRAINT pauses_mode_known CHECK (mode IN ('finish', 'park')),
    CONSTRAINT pauses_reason_given CHECK (reason <> ''),
    CONSTRAINT pauses_times CHECK (changed_at >= since AND resumed_at >= since)
);
-- A queue has one open pause at most.
CREATE UNIQUE INDEX pauses_open ON mm_orchestrator.pauses (queue) WHERE resumed_at IS NULL;
-- paused: the queue is paused. The other reasons are those of version 2.
ALTER TABLE mm_orchestrator.parked
    DROP CONSTRAINT parked_why_known,
    ADD CONSTRAINT parked_why_known CHECK (why IN ('workspace', 'busy', 'lost', 'paused'));
