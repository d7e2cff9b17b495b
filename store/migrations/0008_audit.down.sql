DROP FUNCTION mm_orchestrator.audit_remove(uuid, interval);
DROP FUNCTION mm_orchestrator.audit_append(uuid, text[], text[]);
DROP TABLE mm_orchestrator.audit;
DROP TABLE mm_orchestrator.audit_heads;
DROP FUNCTION mm_orchestrator.audit_refuse();
