package store

import (
	"cmp"
	"context"
	"crypto/sha256"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// ParkedWhy says why a message waits.
type ParkedWhy string

// Why a message waits, as the column has it.
const (
	// ParkedWorkspace: another run holds the workspace, or comes first.
	ParkedWorkspace ParkedWhy = "workspace"
	// ParkedBusy: a worker has this very step, or another one of the run.
	ParkedBusy ParkedWhy = "busy"
	// ParkedLost: nobody sent it. It is the rollback of a run whose own
	// messages are gone, see FailLost.
	ParkedLost ParkedWhy = "lost"
)

// ParkedMessage is a message that TakeParked gave out to be published.
type ParkedMessage struct {
	// ID for DropParked and KeepParked.
	ID     int64
	RunID  string
	Step   Step
	TaskID string
	Why    ParkedWhy
	Since  time.Time
	// Queue is where it came from and goes to.
	Queue string
	// Headers, Properties and Body are those of the message as it came.
	Headers    map[string]any
	Properties protocol.Properties
	Body       []byte
}

// parcel is a message on its way into the table.
type parcel struct {
	workspace, queue string
	turn             turn
	step             Step
	taskID, root     string
	why              ParkedWhy
	message          protocol.Delivery
}

// queuePark stores a message. The workspace's lock is held. A message that is
// there already is replaced, under a new id: whoever is publishing the old
// copy must not delete the new one.
func queuePark(batch *pgx.Batch, p parcel) error {
	headers, err := encodeTable(p.message.Headers)
	if err != nil {
		return failure(ErrInvalid, "cannot keep the headers of task %s: %v", cut(p.taskID, 80), err)
	}
	properties, err := encodeProperties(p.message.Properties)
	if err != nil {
		return failure(ErrInvalid, "cannot keep the properties of task %s: %v", cut(p.taskID, 80), err)
	}
	key := sha256.Sum256(fmt.Appendf(nil, "%s/%s/%s", p.turn.RunID, p.step, p.taskID))
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
		p.workspace, p.queue, p.turn.RunID, string(p.step), p.taskID, p.root, key[:], string(p.why), p.turn.Rank, p.turn.QueuedAt,
		string(headers), string(properties), body)
	return nil
}

// takenFor is how long a message belongs to the live worker that took it. A
// publication takes milliseconds, or as long as a broker is away.
const takenFor = 30 * time.Second

// mostTaken bounds what one call of TakeParked holds in memory.
const mostTaken = 8

// TakeParked gives out messages of a queue that can be published now: those of
// runs that hold their workspace, and of runs that have ended or are gone,
// whose messages are without effect. While a live worker has a step of the run
// they wait, and while one that is gone has another step, by the rules of
// decide: what BeginStep would park again is not given out. There are at most
// 8, those of the best turns first; call until there are none.
//
// A message is given to one worker at a time: to another one when that died or
// did not settle it within 30 s. The caller publishes it, and then says
// DropParked or, if it could not, KeepParked. In the worst case it is
// published twice, which BeginStep answers with Done or Parked. What was taken
// by a call whose answer was lost, the next call of this Store gives out.
func (s *Store) TakeParked(ctx context.Context, queue string) ([]ParkedMessage, error) {
	// One call at a time: another one must not take for lost what this one is
	// about to return.
	select {
	case s.taking <- struct{}{}:
		defer func() { <-s.taking }()
	case <-ctx.Done():
		return nil, fmt.Errorf("cannot take parked messages of queue %s: %w", queue, ctx.Err())
	}
	var taken []ParkedMessage
	err := s.retry(ctx, "take parked messages of queue "+queue, func(ctx context.Context) error {
		taken = nil
		// The lock by which others know that we live.
		if _, err := s.workerLock.ensure(ctx); err != nil {
			return err
		}
		rows, err := s.pool.Query(ctx, `
			WITH ready AS MATERIALIZED (
			    SELECT p.id
			    FROM mm_orchestrator.parked AS p
			    JOIN mm_orchestrator.holds AS h ON h.workspace = p.workspace
			    LEFT JOIN orchestrator_runs AS r ON r.id = p.run_id
			    WHERE p.queue = $1
			      AND (h.run_id = p.run_id OR NOT `+runGoesOn+`)
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
			)
			UPDATE mm_orchestrator.parked AS p
			SET taken_by = $2, taken_at = clock_timestamp()
			FROM ready
			WHERE p.id = ready.id
			RETURNING p.id, p.run_id::text, p.step, p.task_id, p.why, p.parked_at, p.queue, p.headers::text, p.properties::text, p.body`,
			queue, s.workerLock.key, takenFor.Seconds(), mostTaken, s.unsettled())
		if err != nil {
			return err
		}
		taken, err = pgx.CollectRows(rows, scanParked)
		slices.SortFunc(taken, func(a, b ParkedMessage) int { return cmp.Compare(a.ID, b.ID) })
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

// unsettled are the messages that were given out and neither dropped nor kept.
func (s *Store) unsettled() []int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.AppendSeq([]int64{}, maps.Keys(s.taken))
}

func (s *Store) settled(id int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.taken, id)
}

// holderLives is SQL over a row c of claims: a worker holds it, and its
// session has its lock. (That of this Store has it in another session.)
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
		return m, failure(nil, "parked message %d (task %s) cannot be read: %v; delete its row from mm_orchestrator.parked to give it up", m.ID, m.TaskID, err)
	}
	return m, nil
}

// DropParked forgets a message that the broker has again. If it was parked
// anew meanwhile, that copy stays. After an error it may be given out again.
func (s *Store) DropParked(ctx context.Context, id int64) error {
	defer s.settled(id)
	return s.retry(ctx, "drop a parked message", func(ctx context.Context) error {
		_, err := s.pool.Exec(ctx, `DELETE FROM mm_orchestrator.parked WHERE id = $1`, id)
		return err
	})
}

// KeepParked gives back a message that could not be published. After an error
// this Store can take it again at once, another one after 30 s.
func (s *Store) KeepParked(ctx context.Context, id int64) error {
	defer s.settled(id)
	return s.retry(ctx, "keep a parked message", func(ctx context.Context) error {
		_, err := s.pool.Exec(ctx, `
			UPDATE mm_orchestrator.parked SET taken_by = NULL, taken_at = NULL WHERE id = $1 AND taken_by = $2`, id, s.workerLock.key)
		return err
	})
}
