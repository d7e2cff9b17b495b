// Package moonmind creates runs as MoonMind's API does: the rows, and the message
// of the chain. It is for programs that check the worker from outside, and writes
// with SQL of its own, so that they compare two independent sources.
package moonmind

import (
	"context"
	"crypto/rand"
	_ "embed"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	amqp "github.com/rabbitmq/amqp091-go"
)

// Steps are the steps of the API's plans, in their order.
var Steps = []string{"analyze", "patch", "build", "restart", "verify", "rollback"}

// queue is the one in the captured message.
const queue = "orchestrator.run"

//go:embed testdata/first_message.json
var firstMessage []byte

//go:embed testdata/first_spec_message.json
var firstSpecMessage []byte

// captured is a message that was captured from MoonMind's API.
type captured struct {
	Properties struct {
		ContentType     string `json:"content_type"`
		ContentEncoding string `json:"content_encoding"`
		DeliveryMode    uint8  `json:"delivery_mode"`
		CorrelationID   string `json:"correlation_id"`
		ReplyTo         string `json:"reply_to"`
	} `json:"properties"`
	Headers map[string]any  `json:"headers"`
	Body    json.RawMessage `json:"body"`
}

// capturedIDs are the task ids in the captured message.
var capturedIDs = map[string]string{
	"analyze": "b97a2309-2c50-4325-b2f8-39e2b7d0b501",
	"patch":   "5060f333-8db9-4dd0-886c-4491f584b902",
	"build":   "751a5561-85d5-419f-9268-58db99847d03",
	"restart": "993f8753-039c-4a33-a263-d446dc85ba04",
	"verify":  "b6df1994-7e45-446f-88af-84df8cf9a905",
}

const capturedRun = "5b0e6a52-3c1d-4f0e-9b7a-6a1f2d9c4e10"

// NewID returns a random UUID.
func NewID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// Chain returns the message that starts a run, as the API publishes it, with new
// task ids, and these ids by step.
func Chain(toQueue, run string) (map[string]string, amqp.Publishing, error) {
	return newMessage(firstMessage, capturedIDs, capturedRun, run, strconv.Quote(queue), strconv.Quote(toQueue))
}

// newMessage makes a captured message one of new task ids, and replaces the pairs.
func newMessage(text []byte, ids map[string]string, pairs ...string) (map[string]string, amqp.Publishing, error) {
	tasks := map[string]string{}
	for step, old := range ids {
		tasks[step] = NewID()
		pairs = append(pairs, old, tasks[step])
	}
	var m captured
	if err := json.Unmarshal([]byte(strings.NewReplacer(pairs...).Replace(string(text))), &m); err != nil {
		return nil, amqp.Publishing{}, err
	}
	headers := amqp.Table{}
	for name, value := range m.Headers {
		switch v := value.(type) {
		case float64:
			value = int32(v)
		case map[string]any:
			value = amqp.Table{}
		}
		headers[name] = value
	}
	return tasks, amqp.Publishing{
		Headers: headers, ContentType: m.Properties.ContentType, ContentEncoding: m.Properties.ContentEncoding,
		DeliveryMode: m.Properties.DeliveryMode, CorrelationId: m.Properties.CorrelationID, ReplyTo: m.Properties.ReplyTo, Body: m.Body,
	}, nil
}

// A Run is a run to create.
type Run struct {
	// ID of the run, and the queue of its workspace.
	ID, Queue string
	// Plan is the JSON array of steps.
	Plan []byte
	// ArtifactRoot is the run's directory.
	ArtifactRoot string
	// Priority is high or normal. Defaults to normal.
	Priority string
}

// Beginner is a connection or a pool.
type Beginner interface {
	Begin(ctx context.Context) (pgx.Tx, error)
}

// Create inserts the rows of a run for service "api", as POST /orchestrator/runs
// does, and returns the run's queued_at. If the service has a gate that requires an
// approval, the run waits for it, and the API publishes nothing. Otherwise it publishes
// the message after that.
func Create(ctx context.Context, database Beginner, run Run) (created time.Time, err error) {
	if run.Priority == "" {
		run.Priority = "normal"
	}
	err = pgx.BeginFunc(ctx, database, func(tx pgx.Tx) error {
		err := tx.QueryRow(ctx, `
			WITH plan AS (
			    INSERT INTO orchestrator_action_plans (id, steps, service_context)
			    VALUES (gen_random_uuid(), $2::text::jsonb, jsonb_build_object('service', 'api', 'queue', $5::text)) RETURNING id
			)
			INSERT INTO orchestrator_runs (id, instruction, target_service, priority, status, metrics_snapshot, artifact_root, action_plan_id, approval_gate_id)
			SELECT $1, 'Keep going', 'api', $4::text::orchestratorrunpriority, CASE WHEN waits THEN 'awaiting_approval' ELSE 'pending' END::orchestratorrunstatus,
			       CASE WHEN waits THEN jsonb_build_object('approval', jsonb_build_object('required', true, 'requirement', gate.requirement::text, 'status', 'awaiting')) ELSE '{}' END,
			       $3, plan.id, gate.id
			FROM plan LEFT JOIN approval_gates AS gate ON gate.service_name = 'api'
			CROSS JOIN LATERAL (SELECT COALESCE(gate.requirement <> 'none', false) AS waits) AS w
			RETURNING queued_at`,
			run.ID, string(run.Plan), run.ArtifactRoot, run.Priority, run.Queue).Scan(&created)
		if err != nil {
			return err
		}
		_, err = tx.Exec(ctx, `
			INSERT INTO spec_workflow_task_states
			       (id, orchestrator_run_id, task_name, status, attempt, plan_step, plan_step_status, artifact_refs)
			SELECT gen_random_uuid(), $1, step, 'queued', 1, step::orchestratorplanstep, 'pending', '[]'
			FROM unnest($2::text[]) AS step`, run.ID, Steps)
		return err
	})
	if err != nil {
		return created, fmt.Errorf("creating a run: %w", err)
	}
	return created, nil
}

// SetGate makes an approval gate for service "api", as an operator does: no code of
// MoonMind inserts one. Role sre may approve. requirement is none, pre-run or pre-verify.
func SetGate(ctx context.Context, database Beginner, requirement string) error {
	err := pgx.BeginFunc(ctx, database, func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, `
			INSERT INTO approval_gates (id, service_name, requirement, approver_roles, valid_for_minutes)
			VALUES (gen_random_uuid(), 'api', $1::text::orchestratorapprovalrequirement, '{sre}', 60)
			ON CONFLICT (service_name) DO UPDATE SET requirement = EXCLUDED.requirement`, requirement)
		return err
	})
	if err != nil {
		return fmt.Errorf("setting the approval gate of service api: %w", err)
	}
	return nil
}

// Approve writes the run's row as POST …/approvals does: the encrypted token, the
// snapshot, and the status. The API publishes a new chain after that. It answers 409 for
// a run that does not wait, and so does Approve with an error.
func Approve(ctx context.Context, database Beginner, run string) error {
	err := pgx.BeginFunc(ctx, database, func(tx pgx.Tx) error {
		tag, err := tx.Exec(ctx, `
			UPDATE orchestrator_runs AS r
			SET status = 'pending', approval_token = convert_to($2, 'UTF8'), started_at = NULL, completed_at = NULL,
			    metrics_snapshot = metrics_snapshot || jsonb_build_object('approval', jsonb_build_object('required', true, 'requirement', g.requirement::text,
			        'status', 'granted', 'approver', jsonb_build_object('id', 'ops-417', 'role', 'sre'),
			        'grantedAt', to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"+00:00"'),
			        'expiresAt', to_char((clock_timestamp() + make_interval(mins => g.valid_for_minutes)) AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"+00:00"'))),
			    updated_at = now()
			FROM approval_gates AS g WHERE r.id = $1 AND g.id = r.approval_gate_id AND r.status = 'awaiting_approval'`, run, encryptedToken)
		if err == nil && tag.RowsAffected() != 1 {
			err = fmt.Errorf("run %s does not wait for an approval", run)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("approving a run: %w", err)
	}
	return nil
}

// encryptedToken is what the API's EncryptedType makes of a token.
const encryptedToken = "OJXrXNBco1aQW3TEaXw7FRM215/hRt8RoJgsvGfOH1A="
