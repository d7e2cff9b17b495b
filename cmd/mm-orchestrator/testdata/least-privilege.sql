-- A role that may read and write rows, and nothing else. ROLE is replaced.
create role ROLE login password 'steps';
grant usage on schema public, mm_orchestrator to ROLE;
grant all on all tables in schema public to ROLE;
grant all on all tables in schema mm_orchestrator to ROLE;
grant all on all sequences in schema public to ROLE;
grant all on all sequences in schema mm_orchestrator to ROLE;
