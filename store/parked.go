package store

import (
	"context"
	"crypto/sha256"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// ParkedWhy is the reason why a message is parked.
type ParkedWhy string

// The reasons, as in the column mm_orchestrator.parked.why.
const (
	// ParkedWorkspace: another run holds the workspace, or gets it first.
	ParkedWorkspace ParkedWhy = "workspace"
	// ParkedBusy: a worker has a claim on this step, or on another step of the run.
	ParkedBusy ParkedWhy = "busy"
	// ParkedLost: no producer sent it. FailLost made it, as the rollback of a run
	// whose own messages were lost.
	ParkedLost ParkedWhy = "lost"
	// ParkedPaused: the queue is paused.
	ParkedPaused ParkedWhy = "paused"
	// ParkedRequested: RequestRollback made it.
	ParkedRequested ParkedWhy = "requested"
)

// ParkedMessage is a parked message that the caller is to publish.
type ParkedMessage struct {
	// ID for DropParked and KeepParked.
	ID     int64
	RunID  string
	Step   Step
	TaskID string
	Why    ParkedWhy
	Since  time.Time
	// Queue is the queue that it came from and goes back to.
	Queue string
	// Headers, Properties and Body are as the message was delivered.
	Headers    map[string]any
	Properties protocol.Properties
	Body       []byte
}

// parkedInsert is what queuePark inserts.
type parkedInsert struct {
	workspace, queue string
	turn             turn
	step             Step
	taskID, root     string
	why              ParkedWhy
	message          protocol.Delivery
}

// queuePark parks a message. The workspace's row must be locked. If the message
// is parked already, it is replaced under a new id, so that a worker which is
// publishing the old copy does not delete the new one.
func queuePark(batch *pgx.Batch, p parkedInsert) error {
	headers, err := encodeTable(p.message.Headers)
	if err != nil {
		return failure(ErrInvalid, "cannot keep the headers of task %s: %v", cut(p.taskID, 80), err)
	}
	properties, err := encodeProperties(p.message.Properties)
	if err != nil {
		return failure(ErrInvalid, "cannot keep the properties of task %s: %v", cut(p.taskID, 80), err)
	}
	key := StepMessage{p.turn.RunID, p.step, p.taskID}.key()
	body := p.message.Body
	if body == nil {
		body = []byte{}
	}
	batch.Queue(`
		INSERT INTO mm_orchestrator.parked
		       (workspace, queue, run_id, step, task_id, root_task_id, message_key, why, rank, queued_at, headers, properties, body)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11::text::json, $12::text::json, $13)
		ON CONFLICT (message_key) DO UPDATE
		SET id = DEFAULT, workspace = EXCLUDED.workspace, queue = EXCLUDED.queue, why = EXCLUDED.why, rank = EXCLUDED.rank,
		    queued_at = EXCLUDED.queued_at, headers = EXCLUDED.headers, properties = EXCLUDED.properties, body = EXCLUDED.body,
		    taken_by = NULL, taken_at = NULL`,
		p.workspace, p.queue, p.turn.RunID, string(p.step), p.taskID, p.root, key, string(p.why), p.turn.Rank, p.turn.QueuedAt,
		string(headers), string(properties), body)
	return nil
}

// A StepMessage names the message of a step.
type StepMessage struct {
	RunID  string
	Step   Step
	TaskID string
}

// key identifies the message, in the column mm_orchestrator.parked.message_key.
func (m StepMessage) key() []byte {
	key := sha256.Sum256(fmt.Appendf(nil, "%s/%s/%s", m.RunID, m.Step, m.TaskID))
	return key[:]
}

// takenLease is how long a message is reserved for the worker that took it. A
// publication takes milliseconds, unless the broker is unavailable.
const takenLease = 30 * time.Second

// takeLimit bounds how many messages one call returns, and so their memory.
const takeLimit = 8

// lookLimit is how many of the messages that wait for a workspace TakeParked looks at:
// it must not take longer the more runs wait. It is a text of the statement, not a
// parameter, because the planner would take that for a tenth of the table.
const lookLimit = "32"

// TakeParked reserves messages of a queue that can be published now, and returns
// them in the order of turns, and those of one run in the order of their ids. It
// takes at most 8, those with the earliest turns; call it until there are none.
//
// A message can be published if its run holds the workspace, or if its run has
// ended or was deleted, since the message then has no effect. Those that have ended or
// were deleted are found among the first 32 that wait for a workspace. It cannot while
// BeginStep would park it again by the rules of decide: while a live worker has a
// claim on a step of the run, or a dead one on another step, or the queue is paused.
//
// The caller publishes each message and then calls DropParked, or KeepParked if
// it could not. A message is reserved for one worker at a time. Another worker
// can take it once the first has died, or after 30 s. In the worst case it is
// published twice, which BeginStep answers with Done or Parked. If the answer to
// a call is lost, the next call of this Store returns the same messages.
func (s *Store) TakeParked(ctx context.Context, queue string) ([]ParkedMessage, error) {
	// One call at a time: a second one would take again what the first has
	// reserved and not yet returned.
	select {
	case s.taking <- struct{}{}:
		defer func() { <-s.taking }()
	case <-ctx.Done():
		return nil, fmt.Errorf("cannot take parked messages of queue %s: %w", queue, ctx.Err())
	}
	var taken []ParkedMessage
	err := s.retry(ctx, "take parked messages of queue "+queue, func(ctx context.Context) error {
		taken = nil
		// Other workers respect the reservation only while we have our lock.
		if _, err := s.workerLock.ensure(ctx); err != nil {
			return err
		}
		rows, err := s.pool.Query(ctx, `
			WITH candidates AS MATERIALIZED (
			    SELECT c.id
			    FROM mm_orchestrator.holds AS h
			    CROSS JOIN LATERAL (SELECT p.id FROM mm_orchestrator.parked AS p WHERE p.run_id = h.run_id) AS c
			    UNION
			    SELECT c.id
			    FROM mm_orchestrator.holds AS h
			    CROSS JOIN LATERAL (SELECT p.id FROM mm_orchestrator.parked AS p WHERE p.workspace = h.workspace
			                        ORDER BY p.rank, p.queued_at, p.run_id, p.id LIMIT `+lookLimit+`) AS c
			), ready AS MATERIALIZED (
			    SELECT p.id
			    FROM candidates
			    JOIN mm_orchestrator.parked AS p ON p.id = candidates.id
			    JOIN mm_orchestrator.holds AS h ON h.workspace = p.workspace
			    LEFT JOIN orchestrator_runs AS r ON r.id = p.run_id
			    WHERE p.queue = $1
			      AND (h.run_id = p.run_id OR NOT `+runGoesOn+`)
			      AND NOT `+isPaused+`
			      AND NOT EXISTS (SELECT FROM mm_orchestrator.claims AS c
			                      WHERE c.run_id = p.run_id AND c.outcome IS NULL AND c.holder IS NOT NULL
			                        AND (`+runGoesOn+` AND c.step <> p.step AND NOT (p.step = 'rollback' AND c.root_task_id = p.root_task_id)
			                             OR `+holderLives+`))
			      AND (p.taken_by IS NULL OR p.taken_at < clock_timestamp() - make_interval(secs => $3::float8)
			           OR p.taken_by = $2 AND p.id <> ALL ($5)
			           OR pg_try_advisory_xact_lock_shared(p.taken_by))
			    ORDER BY p.rank, p.queued_at, p.run_id, p.id
			    LIMIT $4
			    FOR UPDATE OF p SKIP LOCKED
			), taken AS (
			    UPDATE mm_orchestrator.parked AS p
			    SET taken_by = $2, taken_at = clock_timestamp()
			    FROM ready
			    WHERE p.id = ready.id
			    RETURNING p.*
			)
			SELECT p.id, p.run_id::text, p.step, p.task_id, p.why, p.parked_at, p.queue, p.headers::text, p.properties::text, p.body
			FROM taken AS p
			ORDER BY min(p.rank) OVER (PARTITION BY p.run_id), p.queued_at, p.run_id, p.id`,
			queue, s.workerLock.key, takenLease.Seconds(), takeLimit, s.takenIDs())
		if err != nil {
			return err
		}
		taken, err = pgx.CollectRows(rows, scanParked)
		return err
	})
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, m := range taken {
		s.taken[m.ID] = true
	}
	return taken, nil
}

// takenIDs are the messages that TakeParked has returned and that were neither
// dropped nor kept.
func (s *Store) takenIDs() []int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.AppendSeq([]int64{}, maps.Keys(s.taken))
}

func (s *Store) forgetTaken(id int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.taken, id)
}

// holderLives is SQL over a row c of claims: a worker holds the claim and has its
// lock. It is true for this Store's worker too, whose lock belongs to another
// session than the one that runs the statement.
const holderLives = `(c.holder IS NOT NULL AND NOT pg_try_advisory_xact_lock_shared(c.holder))`

func scanParked(row pgx.CollectableRow) (ParkedMessage, error) {
	var m ParkedMessage
	var headers, properties string
	err := row.Scan(&m.ID, &m.RunID, &m.Step, &m.TaskID, &m.Why, &m.Since, &m.Queue, &headers, &properties, &m.Body)
	if err != nil {
		return m, err
	}
	if m.Headers, err = decodeTable([]byte(headers)); err == nil {
		m.Properties, err = decodeProperties([]byte(properties))
	}
	if err != nil {
		return m, failure(nil, "parked message %d (task %s) cannot be read: %v; to discard it, delete its row from mm_orchestrator.parked", m.ID, m.TaskID, err)
	}
	return m, nil
}

// DropParked deletes a message that the broker has confirmed. If the message was
// parked anew meanwhile, the new copy stays. After an error TakeParked may return
// it again.
func (s *Store) DropParked(ctx context.Context, id int64) error {
	defer s.forgetTaken(id)
	return s.retry(ctx, "drop a parked message", func(ctx context.Context) error {
		_, err := s.pool.Exec(ctx, `DELETE FROM mm_orchestrator.parked WHERE id = $1`, id)
		return err
	})
}

// KeepParked ends the reservation of a message that could not be published. sent says
// that the attempt was made, so that the broker may have the message too: see
// [ParkedState.Sent]. After an error this Store can take it again at once, other workers
// after 30 s.
func (s *Store) KeepParked(ctx context.Context, id int64, sent bool) error {
	defer s.forgetTaken(id)
	return s.retry(ctx, "keep a parked message", func(ctx context.Context) error {
		// A reservation that has ended long ago reserves nothing.
		_, err := s.pool.Exec(ctx, `
			UPDATE mm_orchestrator.parked
			SET taken_by = CASE WHEN $3 THEN taken_by END, taken_at = CASE WHEN $3 THEN to_timestamp(0) END
			WHERE id = $1 AND taken_by = $2`, id, s.workerLock.key, sent)
		return err
	})
}
