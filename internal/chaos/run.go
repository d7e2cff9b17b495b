package chaos

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/internal/moonmind"
)

// steps in plan order.
var steps = moonmind.Steps

// next returns the step that follows in the chain, "" for none.
func next(step string) string {
	if i := slices.Index(moonmind.SpecTasks[:2], step); i >= 0 {
		return moonmind.SpecTasks[i+1]
	}
	for i, s := range steps[:4] {
		if s == step {
			return steps[i+1]
		}
	}
	return ""
}

// A shape describes a run's plan: what happens without faults.
type shape struct {
	// FailAt is the step that fails, "" for none.
	FailAt string
	// Milliseconds is how long each command takes.
	Milliseconds int
	// Long is the only step whose commands take Milliseconds, while those of the
	// others take 10 ms; "" for all steps.
	Long string
	// Endless says that the command of FailAt would succeed after a minute, and
	// that something else ends it before.
	Endless bool
	// LimitSeconds is the time limit of FailAt in the plan, 0 for none.
	LimitSeconds float64
	// LinkOption is the option of FailAt's link in the chain that limits its
	// time, "" for none.
	LinkOption string
	// High says that the run's priority is high instead of normal.
	High bool
	// Real says that patch, build and restart use git and compose, and that the
	// rollback has no command of the plan.
	Real bool
	// Several says that patch and rollback have several commands each. If patch
	// fails, it is its last command but one that does.
	Several bool
}

// several is the number of commands of a step with several.
const several = 3

// commands returns how many commands the plan has for a step.
func (s shape) commands(step string) int {
	switch {
	case !slices.Contains(withCommand, step), s.Real && step == "rollback":
		return 0
	case s.Several && (step == "patch" || step == "rollback"):
		return several
	}
	return 1
}

// failing returns the number of the command that fails in FailAt: of several, one
// that is not the last.
func (s shape) failing(step string) int { return max(1, s.commands(step)-1) }

// A run is a run that the trial has created.
type run struct {
	ID    string
	Tasks map[string]string // task id by step, without rollback's
	Shape shape
	first amqp.Publishing
	// created is its queued_at in the database.
	created time.Time
	// before is the first attempt of a run that was retried.
	before *run
	// failed is the task that fails in the first attempt of a run of the Spec workflow, and
	// from the one from which its retry goes on; "" without a retry. retried is when.
	failed, from string
	retried      time.Time
	// earlier are the tasks of the chain before the run's pause.
	earlier map[string]string
}

func (r run) root() string { return r.Tasks["analyze"] }

// limit sets Shape.LinkOption in the chain's link of the step that fails.
func (r *run) limit() error {
	if r.Shape.LinkOption == "" {
		return nil
	}
	var body [3]any
	if err := json.Unmarshal(r.first.Body, &body); err != nil {
		return err
	}
	for _, link := range body[2].(map[string]any)["chain"].([]any) {
		signature := link.(map[string]any)
		if signature["args"].([]any)[1] == r.Shape.FailAt {
			signature["options"].(map[string]any)[r.Shape.LinkOption] = limitSeconds
		}
	}
	var err error
	r.first.Body, err = json.Marshal(body)
	return err
}

// follower makes the message that a worker would publish for a later step of the
// run, or for its rollback.
func (r run) follower(step string) (amqp.Publishing, error) {
	m := r.first
	var body [3]any
	if err := json.Unmarshal(m.Body, &body); err != nil {
		return m, err
	}
	embed := body[2].(map[string]any)
	id := r.Tasks[step]
	if step == "rollback" {
		id, embed["chain"], embed["errbacks"] = moonmind.NewID(), nil, nil
	} else {
		// The chain is stored with its next link last.
		embed["chain"] = embed["chain"].([]any)[:len(steps)-2-slices.Index(steps, step)]
	}
	body[0] = []string{r.ID, step}
	headers := amqp.Table{}
	for name, value := range m.Headers {
		headers[name] = value
	}
	headers["id"], headers["parent_id"], headers["argsrepr"] = id, r.root(), fmt.Sprintf("('%s', '%s')", r.ID, step)
	m.Headers, m.CorrelationId = headers, id
	var err error
	m.Body, err = json.Marshal(body)
	return m, err
}

// command returns a command of a step: a call of the ledger's program.
func (l *lane) command(id, step string, number int, s shape) []string {
	code := 0
	if s.Long != "" && s.Long != step {
		s.Milliseconds = 10
	}
	if s.FailAt == step && s.failing(step) == number {
		code = 3
		if s.Endless {
			code, s.Milliseconds = 0, 60_000
		}
	}
	return []string{filepath.Base(l.config.programs.ledger), l.ledger, id, step, strconv.Itoa(number), strconv.Itoa(s.Milliseconds), strconv.Itoa(code)}
}

// commands returns all commands of a step.
func (l *lane) commands(id, step string, s shape) (all [][]string) {
	for number := range s.commands(step) {
		all = append(all, l.command(id, step, number+1, s))
	}
	return all
}

// strategies returns the strategies of the rollback. The first command is one, the
// others are another.
func (l *lane) strategies(id string, s shape) (all []any) {
	commands := l.commands(id, "rollback", s)
	for _, of := range [][][]string{commands[:1], commands[1:]} {
		if len(of) > 0 {
			all = append(all, map[string]any{"type": "ledger", "commands": of})
		}
	}
	return all
}

// plan returns the plan that the API would store for the run.
func (l *lane) plan(id string, s shape) ([]byte, error) {
	if s.Real {
		return l.realPlan(id, s)
	}
	health := l.service.url("/healthy")
	if s.FailAt == "verify" {
		health = l.service.url("/unhealthy")
	}
	parameters := map[string]map[string]any{
		"analyze": {"instruction": "Keep going", "workspace": ".", "logArtifact": "analyze.log"},
		"patch":   {"workspace": ".", "diffArtifact": "patch.diff", "commands": l.commands(id, "patch", s)},
		"build":   {"logArtifact": "build.log", "command": l.command(id, "build", 1, s)},
		"restart": {"logArtifact": "restart.log", "command": l.command(id, "restart", 1, s)},
		"verify": {"logArtifact": "verify.log", "healthcheck": map[string]any{
			"url": health, "method": "GET", "timeoutSeconds": 1, "intervalSeconds": 0.2, "expectedStatus": 200,
		}},
		"rollback": {"logArtifact": "rollback.log", "strategies": l.strategies(id, s)},
	}
	if s.LimitSeconds > 0 {
		parameters[s.FailAt]["timeoutSeconds"] = s.LimitSeconds
	}
	return marshalPlan(parameters)
}

func marshalPlan(parameters map[string]map[string]any) ([]byte, error) {
	var plan []any
	for _, step := range steps {
		plan = append(plan, map[string]any{"name": step, "parameters": parameters[step]})
	}
	return json.Marshal(plan)
}

// submit creates a run as POST /orchestrator/runs does, calls prepare, and
// publishes the run's message.
func (l *lane) submit(ctx context.Context, s shape, prepare func(run) error) (run, error) {
	if l.trial.Kind.isSpec() {
		return l.submitSpec(ctx, prepare)
	}
	r, err := l.create(ctx, s)
	if err != nil {
		return r, err
	}
	if err := prepare(r); err != nil {
		return r, err
	}
	return r, l.publish(ctx, r.first)
}

// create inserts the rows of a run and makes its message.
func (l *lane) create(ctx context.Context, s shape) (run, error) {
	r := run{ID: moonmind.NewID(), Shape: s}
	var err error
	if r.Tasks, r.first, err = moonmind.Chain(l.queue, r.ID); err != nil {
		return r, err
	}
	if err := r.limit(); err != nil {
		return r, err
	}
	plan, err := l.plan(r.ID, s)
	if err != nil {
		return r, err
	}
	priority := "normal"
	if s.High {
		priority = "high"
	}
	r.created, err = moonmind.Create(ctx, l.pool, moonmind.Run{ID: r.ID, Queue: l.queue, Plan: plan, ArtifactRoot: filepath.Join(l.artifacts, r.ID), Priority: priority})
	if err == nil && s.Real {
		err = l.approve(ctx, r.ID)
	}
	return r, err
}

// retry does what POST …/retry from the first step does: new attempts in the same
// rows, another plan, a new chain.
func (l *lane) retry(ctx context.Context, r run, s shape) (run, error) {
	again := run{ID: r.ID, Shape: s}
	var err error
	if again.Tasks, again.first, err = moonmind.Chain(l.queue, r.ID); err != nil {
		return again, err
	}
	plan, err := l.plan(r.ID, s)
	if err != nil {
		return again, err
	}
	err = pgx.BeginFunc(ctx, l.pool, func(tx pgx.Tx) error {
		for _, statement := range []string{
			`UPDATE spec_workflow_task_states SET attempt = attempt + 1, plan_step_status = 'pending', celery_state = 'PENDING',
			 message = NULL, started_at = NULL, finished_at = NULL WHERE orchestrator_run_id = $1`,
			`UPDATE orchestrator_runs SET status = 'pending', updated_at = now() WHERE id = $1`,
		} {
			if _, err := tx.Exec(ctx, statement, r.ID); err != nil {
				return err
			}
		}
		_, err := tx.Exec(ctx, `UPDATE orchestrator_action_plans SET steps = $2::text::jsonb
			WHERE id = (SELECT action_plan_id FROM orchestrator_runs WHERE id = $1)`, r.ID, string(plan))
		return err
	})
	if err != nil {
		return again, fmt.Errorf("retrying a run: %w", err)
	}
	return again, l.publish(ctx, again.first)
}

// status reads the run's status, and whether the run has ended. A retried run keeps
// the time of its first end until its first step begins again.
func (l *lane) status(ctx context.Context, id string) (status string, complete bool, err error) {
	if l.trial.Kind.isSpec() {
		return l.specStatus(ctx, id)
	}
	err = l.pool.QueryRow(ctx, `
		SELECT status::text, completed_at IS NOT NULL AND status IN ('succeeded', 'failed', 'rolled_back')
		FROM orchestrator_runs WHERE id = $1`, id).Scan(&status, &complete)
	return status, complete, err
}

// rows returns the rows of a query with one text column.
func (l *lane) rows(ctx context.Context, query string, args ...any) ([]string, error) {
	rows, err := l.pool.Query(ctx, query, args...)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowTo[string])
}
