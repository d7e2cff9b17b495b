DROP TABLE mm_orchestrator.spec_claims;
