ALTER TABLE mm_orchestrator.claims DROP COLUMN progress;
