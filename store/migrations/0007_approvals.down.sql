DROP TABLE mm_orchestrator.approvals;
