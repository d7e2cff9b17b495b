DROP TABLE mm_orchestrator.revocations;
