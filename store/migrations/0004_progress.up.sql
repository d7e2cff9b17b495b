-- How far the commands of an attempt have come: what has ended is not run
-- again when the attempt is taken over. NULL: none has ended.
--
-- json: commands (how many have ended), digest (SHA-256 of these, hex),
-- exit_code (of the last; all before it ended with 0), ended_at, log_size
-- and log_end (bytes in the step's log before the output of the last, and with
-- it).
ALTER TABLE mm_orchestrator.claims ADD COLUMN progress json;
