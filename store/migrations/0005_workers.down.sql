DROP TABLE mm_orchestrator.workers;
