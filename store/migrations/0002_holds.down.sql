DROP TABLE mm_orchestrator.parked;
DROP TABLE mm_orchestrator.holds;
ALTER TABLE mm_orchestrator.claims DROP COLUMN handed_back;
