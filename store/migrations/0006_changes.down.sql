DROP TABLE mm_orchestrator.changes;
