package moonmind

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
	amqp "github.com/rabbitmq/amqp091-go"
)

// SpecTasks are the tasks of the Spec workflow chain, in their order.
var SpecTasks = []string{"discover_next_phase", "submit_codex_job", "apply_and_publish"}

// capturedSpecIDs are the task ids in the captured message of the Spec workflow, and
// capturedSpecRun and capturedFeature its run.
var capturedSpecIDs = map[string]string{
	"discover_next_phase": "d1238aa9-e826-4ffa-90f4-476dbae7e801",
	"submit_codex_job":    "2ad8de9b-e764-4e93-991a-bc068e0d0202",
	"apply_and_publish":   "0e88ef59-5fce-4291-b12a-b07f56940303",
}

const (
	capturedSpecRun = "e2b7c4d0-19af-4c55-8b3e-0a6d5f4c3b2a"
	capturedFeature = "014-refresh-docs"
)

// SpecChain returns the message that starts a run of the Spec workflow, as the API
// publishes it, with new task ids, and these ids by task.
func SpecChain(run, feature string) (map[string]string, amqp.Publishing, error) {
	return newMessage(firstSpecMessage, capturedSpecIDs, capturedSpecRun, run, capturedFeature, feature)
}

// CreateSpec inserts the row of a run of the Spec workflow, as the API does before it
// publishes the message.
func CreateSpec(ctx context.Context, database Beginner, run, feature, repository string) error {
	err := pgx.BeginFunc(ctx, database, func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, `
			INSERT INTO spec_workflow_runs (id, feature_key, repository, artifacts_path)
			VALUES ($1, $2, $3, $4)`, run, feature, repository, "var/artifacts/spec_workflows/"+run)
		return err
	})
	if err != nil {
		return fmt.Errorf("creating a run of the Spec workflow: %w", err)
	}
	return nil
}
