UPDATE mm_orchestrator.parked SET why = 'workspace' WHERE why = 'paused';
ALTER TABLE mm_orchestrator.parked
    DROP CONSTRAINT parked_why_known,
    ADD CONSTRAINT parked_why_known CHECK (why IN ('workspace', 'busy', 'lost'));
DROP TABLE mm_orchestrator.pauses;
