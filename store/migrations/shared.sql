-- The tables that MoonMind's API and its workers share, as its own migrations
-- leave them (revision 202403150001), limited to those that a worker reads or
-- writes, and "user", to which two foreign keys point. Names, types, lengths,
-- defaults, constraints, indexes and triggers are what Python relies on:
-- nothing here is ours to improve.

-- ---------------------------------------------------------------------------
-- Enum types. Labels are lower case except orchestratortaskstate, whose labels
-- are Celery's upper-case state names. Label order is the sort order.
-- ---------------------------------------------------------------------------

CREATE TYPE orchestratorrunstatus AS ENUM
    ('pending', 'running', 'awaiting_approval', 'succeeded', 'failed', 'rolled_back');
CREATE TYPE orchestratorrunpriority AS ENUM ('normal', 'high');
CREATE TYPE orchestratorplanorigin AS ENUM ('operator', 'llm', 'system');
CREATE TYPE orchestratorplanstep AS ENUM
    ('analyze', 'patch', 'build', 'restart', 'verify', 'rollback');
CREATE TYPE orchestratorplanstepstatus AS ENUM
    ('pending', 'in_progress', 'succeeded', 'failed', 'skipped');
CREATE TYPE orchestratortaskstate AS ENUM
    ('PENDING', 'STARTED', 'RETRY', 'SUCCESS', 'FAILURE');
CREATE TYPE orchestratorapprovalrequirement AS ENUM ('none', 'pre-run', 'pre-verify');
CREATE TYPE orchestratorrunartifacttype AS ENUM
    ('patch_diff', 'build_log', 'verify_log', 'rollback_log', 'metrics', 'plan_snapshot');

CREATE TYPE specworkflowrunstatus AS ENUM
    ('pending', 'running', 'succeeded', 'failed', 'no_work', 'cancelled', 'retrying');
CREATE TYPE specworkflowrunphase AS ENUM
    ('discover', 'submit', 'apply', 'publish', 'complete');
CREATE TYPE specworkflowtaskstatus AS ENUM
    ('queued', 'running', 'succeeded', 'failed', 'skipped');
CREATE TYPE specworkflowtaskname AS ENUM
    ('discover', 'submit', 'apply', 'publish', 'finalize', 'retry-hook');
CREATE TYPE codexpreflightstatus AS ENUM ('pending', 'passed', 'failed', 'skipped');
CREATE TYPE workflowcodexcredentialstatus AS ENUM ('valid', 'invalid', 'expires_soon');
CREATE TYPE workflowgithubcredentialstatus AS ENUM ('valid', 'invalid', 'scope_missing');
CREATE TYPE workflowartifacttype AS ENUM
    ('codex_logs', 'codex_patch', 'gh_push_log', 'gh_pr_response',
     'apply_output', 'pr_payload', 'retry_context');

CREATE TYPE codexauthvolumestatus AS ENUM ('ready', 'needs_auth', 'error');
CREATE TYPE codexworkershardstatus AS ENUM ('active', 'draining', 'offline');

-- ---------------------------------------------------------------------------
-- Trigger functions: stamp updated_at with the transaction's start time.
-- Used by spec_workflow_runs / spec_workflow_task_states and by the two codex
-- tables. orchestrator_runs and approval_gates have NO such trigger: whoever
-- updates those rows has to set updated_at itself.
-- ---------------------------------------------------------------------------

CREATE FUNCTION spec_workflow_set_updated_at() RETURNS trigger
    LANGUAGE plpgsql AS
$$ BEGIN NEW.updated_at := now(); RETURN NEW; END $$;

CREATE FUNCTION codex_touch_updated_at() RETURNS trigger
    LANGUAGE plpgsql AS
$$ BEGIN NEW.updated_at := now(); RETURN NEW; END $$;

-- ---------------------------------------------------------------------------
-- "user": owner of the two nullable user references on spec_workflow_runs.
-- A worker never writes it.
-- ---------------------------------------------------------------------------

CREATE TABLE "user" (
    id               uuid          NOT NULL,
    email            varchar(320)  NOT NULL,
    hashed_password  text,
    is_active        boolean       NOT NULL,
    is_superuser     boolean       NOT NULL,
    is_verified      boolean       NOT NULL,
    oidc_provider    varchar(32),
    oidc_subject     varchar(255),
    CONSTRAINT user_pkey PRIMARY KEY (id),
    CONSTRAINT uq_oidc_identity UNIQUE (oidc_provider, oidc_subject)
);
CREATE UNIQUE INDEX ix_user_email ON "user" (email);
CREATE INDEX ix_user_oidc_provider ON "user" (oidc_provider);
CREATE INDEX ix_user_oidc_subject ON "user" (oidc_subject);

-- ---------------------------------------------------------------------------
-- Orchestrator
-- ---------------------------------------------------------------------------

CREATE TABLE approval_gates (
    id                 uuid                             NOT NULL,
    service_name       varchar(255)                     NOT NULL,
    requirement        orchestratorapprovalrequirement  NOT NULL DEFAULT 'none',
    approver_roles     varchar(128)[]                   NOT NULL DEFAULT '{}',
    valid_for_minutes  integer                          NOT NULL,
    created_at         timestamptz                      NOT NULL DEFAULT now(),
    updated_at         timestamptz                      NOT NULL DEFAULT now(),
    CONSTRAINT approval_gates_pkey PRIMARY KEY (id),
    CONSTRAINT uq_approval_gates_service_name UNIQUE (service_name),
    CONSTRAINT ck_approval_gates_min_duration CHECK (valid_for_minutes >= 5),
    CONSTRAINT ck_approval_gates_roles_present CHECK
        (requirement = 'none' OR COALESCE(array_length(approver_roles, 1), 0) > 0)
);

CREATE TABLE orchestrator_action_plans (
    id               uuid                    NOT NULL,
    steps            jsonb                   NOT NULL,   -- array of {name, parameters}
    service_context  jsonb                   NOT NULL,   -- object
    generated_at     timestamptz             NOT NULL DEFAULT now(),
    generated_by     orchestratorplanorigin  NOT NULL DEFAULT 'system',
    CONSTRAINT orchestrator_action_plans_pkey PRIMARY KEY (id)
);

CREATE TABLE orchestrator_runs (
    id                uuid                     NOT NULL,
    instruction       text                     NOT NULL,
    target_service    varchar(255)             NOT NULL,
    priority          orchestratorrunpriority  NOT NULL DEFAULT 'normal',
    status            orchestratorrunstatus    NOT NULL DEFAULT 'pending',
    queued_at         timestamptz              NOT NULL DEFAULT now(),
    started_at        timestamptz,
    completed_at      timestamptz,
    approval_token    bytea,                   -- ASCII base64 of AES-256-CBC output
    metrics_snapshot  jsonb,
    artifact_root     varchar(1024),
    action_plan_id    uuid                     NOT NULL,
    approval_gate_id  uuid,
    created_at        timestamptz              NOT NULL DEFAULT now(),
    updated_at        timestamptz              NOT NULL DEFAULT now(),
    CONSTRAINT orchestrator_runs_pkey PRIMARY KEY (id),
    CONSTRAINT orchestrator_runs_action_plan_id_fkey FOREIGN KEY (action_plan_id)
        REFERENCES orchestrator_action_plans (id) ON DELETE RESTRICT,
    CONSTRAINT orchestrator_runs_approval_gate_id_fkey FOREIGN KEY (approval_gate_id)
        REFERENCES approval_gates (id) ON DELETE SET NULL,
    CONSTRAINT ck_orchestrator_runs_timestamps CHECK
        (completed_at IS NULL OR (started_at IS NOT NULL AND completed_at >= started_at))
);
CREATE INDEX ix_orchestrator_runs_status ON orchestrator_runs (status);
CREATE INDEX ix_orchestrator_runs_target_service ON orchestrator_runs (target_service);

CREATE TABLE orchestrator_run_artifacts (
    id             uuid                         NOT NULL,
    run_id         uuid                         NOT NULL,
    artifact_type  orchestratorrunartifacttype  NOT NULL,
    path           varchar(1024)                NOT NULL,   -- relative to the run directory
    checksum       varchar(128),                            -- bare sha256 hex
    size_bytes     bigint,
    created_at     timestamptz                  NOT NULL DEFAULT now(),
    CONSTRAINT orchestrator_run_artifacts_pkey PRIMARY KEY (id),
    CONSTRAINT orchestrator_run_artifacts_run_id_fkey FOREIGN KEY (run_id)
        REFERENCES orchestrator_runs (id) ON DELETE CASCADE,
    CONSTRAINT uq_orchestrator_artifact_path UNIQUE (run_id, artifact_type, path),
    CONSTRAINT ck_orchestrator_artifacts_size_non_negative CHECK
        (size_bytes IS NULL OR size_bytes >= 0)
);
CREATE INDEX ix_orchestrator_run_artifacts_run_id ON orchestrator_run_artifacts (run_id);

-- ---------------------------------------------------------------------------
-- Codex shards (reference data; nothing in the Python code ever inserts here)
-- ---------------------------------------------------------------------------

CREATE TABLE codex_auth_volumes (
    name              varchar(64)            NOT NULL,
    worker_affinity   varchar(255)           NOT NULL,
    status            codexauthvolumestatus  NOT NULL DEFAULT 'needs_auth',
    last_verified_at  timestamptz,
    notes             text,
    created_at        timestamptz            NOT NULL DEFAULT CURRENT_TIMESTAMP,
    updated_at        timestamptz            NOT NULL DEFAULT CURRENT_TIMESTAMP,
    CONSTRAINT pk_codex_auth_volumes PRIMARY KEY (name),
    CONSTRAINT uq_codex_auth_volumes_worker_affinity UNIQUE (worker_affinity)
);
CREATE TRIGGER trg_codex_auth_volumes_updated_at BEFORE UPDATE ON codex_auth_volumes
    FOR EACH ROW EXECUTE FUNCTION codex_touch_updated_at();

CREATE TABLE codex_worker_shards (
    queue_name       varchar(64)             NOT NULL,
    volume_name      varchar(64)             NOT NULL,
    status           codexworkershardstatus  NOT NULL DEFAULT 'active',
    hash_modulo      integer                 NOT NULL DEFAULT 3,
    worker_hostname  varchar(255),
    created_at       timestamptz             NOT NULL DEFAULT CURRENT_TIMESTAMP,
    updated_at       timestamptz             NOT NULL DEFAULT CURRENT_TIMESTAMP,
    CONSTRAINT pk_codex_worker_shards PRIMARY KEY (queue_name),
    CONSTRAINT fk_codex_worker_shards_volume_name FOREIGN KEY (volume_name)
        REFERENCES codex_auth_volumes (name) ON DELETE RESTRICT,
    CONSTRAINT uq_codex_worker_shards_volume_name UNIQUE (volume_name)
);
CREATE TRIGGER trg_codex_worker_shards_updated_at BEFORE UPDATE ON codex_worker_shards
    FOR EACH ROW EXECUTE FUNCTION codex_touch_updated_at();

-- ---------------------------------------------------------------------------
-- Spec workflow
-- ---------------------------------------------------------------------------

CREATE TABLE spec_workflow_runs (
    id                       uuid                   NOT NULL,
    feature_key              varchar(255)           NOT NULL,
    celery_chain_id          varchar(255),
    status                   specworkflowrunstatus  NOT NULL DEFAULT 'pending',
    phase                    specworkflowrunphase   NOT NULL DEFAULT 'discover',
    branch_name              varchar(255),
    pr_url                   varchar(512),
    repository               varchar(255),
    requested_by_user_id     uuid,
    created_by               uuid,
    codex_task_id            varchar(255),
    codex_queue              varchar(64),
    codex_volume             varchar(64),
    codex_preflight_status   codexpreflightstatus,
    codex_preflight_message  text,
    codex_logs_path          varchar(1024),
    codex_patch_path         varchar(1024),
    artifacts_path           varchar(512),
    current_task_name        specworkflowtaskname,
    started_at               timestamptz,
    finished_at              timestamptz,
    created_at               timestamptz            NOT NULL DEFAULT now(),
    updated_at               timestamptz            NOT NULL DEFAULT now(),
    completed_at             timestamptz,
    CONSTRAINT spec_workflow_runs_pkey PRIMARY KEY (id),
    CONSTRAINT spec_workflow_runs_requested_by_user_id_fkey FOREIGN KEY (requested_by_user_id)
        REFERENCES "user" (id) ON DELETE SET NULL,
    CONSTRAINT spec_workflow_runs_created_by_fkey FOREIGN KEY (created_by)
        REFERENCES "user" (id) ON DELETE SET NULL,
    CONSTRAINT spec_workflow_runs_codex_queue_fkey FOREIGN KEY (codex_queue)
        REFERENCES codex_worker_shards (queue_name) ON DELETE SET NULL,
    CONSTRAINT spec_workflow_runs_codex_volume_fkey FOREIGN KEY (codex_volume)
        REFERENCES codex_auth_volumes (name) ON DELETE SET NULL
);
CREATE INDEX ix_spec_workflow_runs_feature_key ON spec_workflow_runs (feature_key);
CREATE INDEX ix_spec_workflow_runs_status ON spec_workflow_runs (status);
CREATE INDEX ix_spec_workflow_runs_requested_by ON spec_workflow_runs (requested_by_user_id);
CREATE INDEX ix_spec_workflow_runs_created_by ON spec_workflow_runs (created_by);
CREATE TRIGGER trg_spec_workflow_runs_updated_at BEFORE UPDATE ON spec_workflow_runs
    FOR EACH ROW EXECUTE FUNCTION spec_workflow_set_updated_at();

-- Shared by both workers: exactly one of the two run references is set.
CREATE TABLE spec_workflow_task_states (
    id                   uuid                    NOT NULL,
    workflow_run_id      uuid,
    orchestrator_run_id  uuid,
    task_name            varchar(128),
    status               specworkflowtaskstatus  NOT NULL,
    attempt              integer                 NOT NULL DEFAULT 1,
    payload              jsonb,
    plan_step            orchestratorplanstep,
    plan_step_status     orchestratorplanstepstatus,
    celery_state         orchestratortaskstate,
    celery_task_id       varchar(255),
    message              text,
    artifact_refs        jsonb,                  -- array of strings
    started_at           timestamptz,
    finished_at          timestamptz,
    created_at           timestamptz             NOT NULL DEFAULT now(),
    updated_at           timestamptz             NOT NULL DEFAULT now(),
    CONSTRAINT spec_workflow_task_states_pkey PRIMARY KEY (id),
    CONSTRAINT spec_workflow_task_states_workflow_run_id_fkey FOREIGN KEY (workflow_run_id)
        REFERENCES spec_workflow_runs (id) ON DELETE CASCADE,
    CONSTRAINT spec_workflow_task_states_orchestrator_run_id_fkey FOREIGN KEY (orchestrator_run_id)
        REFERENCES orchestrator_runs (id) ON DELETE CASCADE,
    CONSTRAINT uq_spec_workflow_task_state_attempt
        UNIQUE (workflow_run_id, task_name, attempt),
    CONSTRAINT uq_orchestrator_task_state_attempt
        UNIQUE (orchestrator_run_id, plan_step, attempt),
    CONSTRAINT ck_spec_workflow_task_state_run_id_exclusive CHECK (
        (workflow_run_id IS NOT NULL AND orchestrator_run_id IS NULL)
        OR (workflow_run_id IS NULL AND orchestrator_run_id IS NOT NULL)),
    CONSTRAINT ck_spec_workflow_task_state_orchestrator_plan_step CHECK
        (orchestrator_run_id IS NULL OR plan_step IS NOT NULL),
    CONSTRAINT ck_spec_workflow_task_state_task_name_required CHECK
        (workflow_run_id IS NULL OR task_name IS NOT NULL)
);
CREATE INDEX ix_spec_workflow_task_states_run_id
    ON spec_workflow_task_states (workflow_run_id);
CREATE INDEX ix_spec_workflow_task_states_failed
    ON spec_workflow_task_states (workflow_run_id) WHERE status = 'failed';
CREATE INDEX ix_spec_workflow_task_states_orchestrator_run_id
    ON spec_workflow_task_states (orchestrator_run_id);
CREATE TRIGGER trg_spec_workflow_task_states_updated_at BEFORE UPDATE ON spec_workflow_task_states
    FOR EACH ROW EXECUTE FUNCTION spec_workflow_set_updated_at();

CREATE TABLE workflow_artifacts (
    id               uuid                  NOT NULL,
    workflow_run_id  uuid                  NOT NULL,
    artifact_type    workflowartifacttype  NOT NULL,
    path             varchar(1024)         NOT NULL,
    content_type     varchar(255),
    size_bytes       bigint,
    digest           varchar(128),         -- 'sha256:' + hex (unlike orchestrator checksums)
    created_at       timestamptz           NOT NULL DEFAULT now(),
    CONSTRAINT workflow_artifacts_pkey PRIMARY KEY (id),
    CONSTRAINT workflow_artifacts_workflow_run_id_fkey FOREIGN KEY (workflow_run_id)
        REFERENCES spec_workflow_runs (id) ON DELETE CASCADE,
    CONSTRAINT uq_workflow_artifact_path UNIQUE (workflow_run_id, artifact_type, path)
);
CREATE INDEX ix_workflow_artifacts_run_id ON workflow_artifacts (workflow_run_id);

CREATE TABLE workflow_credential_audits (
    id                    uuid                            NOT NULL,
    workflow_run_id       uuid                            NOT NULL,
    codex_status          workflowcodexcredentialstatus   NOT NULL,
    github_status         workflowgithubcredentialstatus  NOT NULL,
    checked_at            timestamptz                     NOT NULL DEFAULT now(),
    notes                 text,
    codex_checked_at      timestamptz,
    codex_message         text,
    github_checked_at     timestamptz,
    github_message        text,
    environment_snapshot  jsonb,
    created_at            timestamptz                     NOT NULL DEFAULT now(),
    CONSTRAINT workflow_credential_audits_pkey PRIMARY KEY (id),
    CONSTRAINT workflow_credential_audits_workflow_run_id_fkey FOREIGN KEY (workflow_run_id)
        REFERENCES spec_workflow_runs (id) ON DELETE CASCADE,
    CONSTRAINT uq_workflow_credential_audit_run UNIQUE (workflow_run_id)
);
CREATE INDEX ix_workflow_credential_audits_run ON workflow_credential_audits (workflow_run_id);
