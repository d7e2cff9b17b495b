UPDATE mm_orchestrator.parked SET why = 'lost' WHERE why = 'requested';
ALTER TABLE mm_orchestrator.parked
    DROP CONSTRAINT parked_why_known,
    ADD CONSTRAINT parked_why_known CHECK (why IN ('workspace', 'busy', 'lost', 'paused'));
DROP TABLE mm_orchestrator.rollback_requests;
