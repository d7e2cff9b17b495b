package bench

import (
	"encoding/json"
	"fmt"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/internal/bench/contender"
)

// ids makes the task ids of one sample. All begin with the same eight digits.
type ids struct {
	prefix string
	next   int
}

// chainDigits is the number of digits at the end of an id that are 0, for the
// tasks of a chain.
const chainDigits = 4

func (i *ids) new() string {
	i.next++
	return fmt.Sprintf("%s-0000-4000-8000-%08x%0*d", i.prefix, i.next, chainDigits, 0)
}

// message is a message as Celery 5.7 publishes it.
func message(task, id string, argument int64, chain []signature, results bool) amqp.Publishing {
	embed := struct {
		Callbacks *int        `json:"callbacks"`
		Errbacks  *int        `json:"errbacks"`
		Chain     []signature `json:"chain"`
		Chord     *int        `json:"chord"`
	}{Chain: chain}
	body, err := json.Marshal([]any{[]int64{argument}, struct{}{}, embed})
	if err != nil {
		panic(err) // numbers and texts
	}
	return amqp.Publishing{
		Headers: amqp.Table{
			"lang": "py", "task": task, "id": id, "shadow": nil, "eta": nil, "expires": nil, "group": nil, "group_index": nil,
			"retries": int32(0), "timelimit": []any{nil, nil}, "root_id": id, "parent_id": nil, "argsrepr": fmt.Sprintf("(%d,)", argument),
			"kwargsrepr": "{}", "origin": "gen1@bench", "ignore_result": !results, "replaced_task_nesting": int32(0),
			"stamped_headers": nil, "stamps": amqp.Table{},
		},
		ContentType: "application/json", ContentEncoding: "utf-8", DeliveryMode: amqp.Persistent,
		CorrelationId: id, ReplyTo: "7b5f1ac8-2d63-3e5b-9e36-2f2f9d1a1c11", Body: body,
	}
}

// signature is a task of a chain in the body of the one before it.
type signature struct {
	Task      string            `json:"task"`
	Args      []int64           `json:"args"`
	Kwargs    struct{}          `json:"kwargs"`
	Options   map[string]string `json:"options"`
	Subtask   *string           `json:"subtask_type"`
	Immutable bool              `json:"immutable"`
}

// chainOf returns the first message of a chain of n tasks, of which the first and
// the last are marks. The last element of the embedded list runs next.
func chainOf(n int, queue, id string, results bool) amqp.Publishing {
	chain := make([]signature, n-1)
	for i := range chain {
		task := contender.Noop
		if i == 0 {
			task = contender.Mark
		}
		taskID := id[:len(id)-chainDigits] + fmt.Sprintf("%0*x", chainDigits, i+1)
		chain[i] = signature{Task: task, Args: []int64{3}, Immutable: true, Options: map[string]string{"queue": queue, "task_id": taskID}}
	}
	one, err := json.Marshal(chain[0])
	if err != nil {
		panic(err) // numbers and texts
	}
	m := message(contender.Mark, id, 3, chain, results)
	m.Headers[contender.HeaderLeft] = int32(n - 1)
	m.Headers[contender.HeaderCut] = int32(len(one) + 1)
	return m
}
