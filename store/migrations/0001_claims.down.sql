DROP TABLE mm_orchestrator.claims;
