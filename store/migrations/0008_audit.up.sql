-- The audit trail of each run: what was done, one record for each effect, in a hash
-- chain. Package audit defines the records, docs/audit.md describes them.
--
-- Rows are only ever added. Triggers refuse everything else, also for the owner of the
-- tables; audit_remove is the exception.
CREATE TABLE mm_orchestrator.audit (
    run_id  uuid    NOT NULL,
    seq     bigint  NOT NULL,
    -- Makes a record that is written twice count once.
    id      text    NOT NULL,
    -- One line of JSON, byte for byte what was hashed.
    record  text    NOT NULL,
    -- SHA-256, in hex, over the hash of the record before and this one's text.
    hash    text    NOT NULL,
    CONSTRAINT audit_pkey PRIMARY KEY (run_id, seq),
    CONSTRAINT audit_once UNIQUE (run_id, id),
    CONSTRAINT audit_seq CHECK (seq >= 1),
    CONSTRAINT audit_hash CHECK (hash ~ '^[0-9a-f]{64}$')
);

-- How long each trail is, and its last hash. The row's lock makes those who append to
-- one trail wait for each other.
CREATE TABLE mm_orchestrator.audit_heads (
    run_id          uuid         NOT NULL,
    length          bigint       NOT NULL DEFAULT 0,
    head            text         NOT NULL DEFAULT repeat('0', 64),
    -- What audit_remove has removed: the records up to this one, whose hash this was.
    removed_length  bigint       NOT NULL DEFAULT 0,
    removed_head    text         NOT NULL DEFAULT repeat('0', 64),
    removed_at      timestamptz,
    created_at      timestamptz  NOT NULL DEFAULT now(),
    updated_at      timestamptz  NOT NULL DEFAULT now(),
    CONSTRAINT audit_heads_pkey PRIMARY KEY (run_id),
    CONSTRAINT audit_heads_length CHECK (removed_length >= 0 AND length >= removed_length),
    CONSTRAINT audit_heads_removed CHECK ((removed_length = 0) = (removed_at IS NULL)),
    CONSTRAINT audit_heads_hash CHECK (head ~ '^[0-9a-f]{64}$' AND removed_head ~ '^[0-9a-f]{64}$')
);
CREATE INDEX audit_heads_age ON mm_orchestrator.audit_heads (updated_at) WHERE length > removed_length;

CREATE FUNCTION mm_orchestrator.audit_refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'DELETE' AND TG_TABLE_NAME = 'audit' THEN
        IF current_setting('mm_orchestrator.audit_removal', true) = OLD.run_id::text THEN
            RETURN OLD;
        END IF;
    ELSIF TG_OP = 'UPDATE' AND TG_TABLE_NAME = 'audit_heads' THEN
        IF NEW.run_id = OLD.run_id AND NEW.created_at = OLD.created_at
           AND (NEW.length > OLD.length OR NEW.length = OLD.length AND NEW.head = OLD.head)
           AND ((NEW.removed_length, NEW.removed_head) = (OLD.removed_length, OLD.removed_head) AND NEW.removed_at IS NOT DISTINCT FROM OLD.removed_at
                OR current_setting('mm_orchestrator.audit_removal', true) = OLD.run_id::text) THEN
            RETURN NEW;
        END IF;
    END IF;
    RAISE EXCEPTION 'the audit trail is append-only: % of mm_orchestrator.% is refused', TG_OP, TG_TABLE_NAME
        USING ERRCODE = 'insufficient_privilege', HINT = 'mm_orchestrator.audit_remove removes the trail of a run that is old enough.';
END $$;
CREATE TRIGGER audit_append_only BEFORE UPDATE OR DELETE ON mm_orchestrator.audit
    FOR EACH ROW EXECUTE FUNCTION mm_orchestrator.audit_refuse();
CREATE TRIGGER audit_no_truncate BEFORE TRUNCATE ON mm_orchestrator.audit
    FOR EACH STATEMENT EXECUTE FUNCTION mm_orchestrator.audit_refuse();
CREATE TRIGGER audit_heads_append_only BEFORE UPDATE OR DELETE ON mm_orchestrator.audit_heads
    FOR EACH ROW EXECUTE FUNCTION mm_orchestrator.audit_refuse();
CREATE TRIGGER audit_heads_no_truncate BEFORE TRUNCATE ON mm_orchestrator.audit_heads
    FOR EACH STATEMENT EXECUTE FUNCTION mm_orchestrator.audit_refuse();

-- Appends records to the trail of a run, and returns its head. bodies are the records
-- without seq and prev, which are only known here. Without records it changes nothing.
CREATE FUNCTION mm_orchestrator.audit_append(run uuid, ids text[], bodies text[], OUT new_length bigint, OUT new_head text) LANGUAGE plpgsql AS $$
DECLARE
    line   text;
    known  bigint;
BEGIN
    IF cardinality(ids) = 0 THEN
        SELECT h.length, h.head INTO new_length, new_head FROM mm_orchestrator.audit_heads AS h WHERE h.run_id = run;
        RETURN;
    END IF;
    SELECT h.length, h.head INTO new_length, new_head FROM mm_orchestrator.audit_heads AS h WHERE h.run_id = run FOR UPDATE;
    IF NOT FOUND THEN
        INSERT INTO mm_orchestrator.audit_heads (run_id) VALUES (run) ON CONFLICT DO NOTHING;
        SELECT h.length, h.head INTO new_length, new_head FROM mm_orchestrator.audit_heads AS h WHERE h.run_id = run FOR UPDATE;
    END IF;
    known := new_length;
    FOR i IN 1 .. cardinality(ids) LOOP
        CONTINUE WHEN EXISTS (SELECT FROM mm_orchestrator.audit AS a WHERE a.run_id = run AND a.id = ids[i]);
        new_length := new_length + 1;
        line := '{"seq":' || new_length || ',"prev":"' || new_head || '",' || bodies[i];
        new_head := encode(sha256(convert_to(new_head || line, 'UTF8')), 'hex');
        INSERT INTO mm_orchestrator.audit (run_id, seq, id, record, hash) VALUES (run, new_length, ids[i], line, new_head);
    END LOOP;
    IF new_length > known THEN
        UPDATE mm_orchestrator.audit_heads AS h SET length = new_length, head = new_head, updated_at = now() WHERE h.run_id = run;
    END IF;
END $$;

-- Removes the records of a run to which nothing was added for keep, at least a day. The
-- row in audit_heads stays, and says how many they were, when they were removed, and how
-- their chain ended. It returns how many it has removed. The caller needs no right to
-- delete.
CREATE FUNCTION mm_orchestrator.audit_remove(run uuid, keep interval) RETURNS bigint LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    removed bigint;
BEGIN
    IF keep < interval '1 day' THEN
        RAISE EXCEPTION 'an audit trail is kept for at least a day, not for %', keep USING ERRCODE = 'insufficient_privilege';
    END IF;
    PERFORM FROM mm_orchestrator.audit_heads AS h WHERE h.run_id = run AND h.updated_at < now() - keep AND h.length > h.removed_length FOR UPDATE;
    IF NOT FOUND THEN
        RETURN 0;
    END IF;
    PERFORM set_config('mm_orchestrator.audit_removal', run::text, true);
    DELETE FROM mm_orchestrator.audit AS a WHERE a.run_id = run;
    GET DIAGNOSTICS removed = ROW_COUNT;
    UPDATE mm_orchestrator.audit_heads AS h SET removed_length = h.length, removed_head = h.head, removed_at = now() WHERE h.run_id = run;
    PERFORM set_config('mm_orchestrator.audit_removal', '', true);
    RETURN removed;
END $$;
