package protocol_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// A delivery as received from a broker: the second of three chain steps.
var exampleDelivery = protocol.Delivery{
	Headers:    map[string]any{"task": "shop.pack", "id": "step-2", "root_id": "step-1", "parent_id": "step-1"},
	Properties: protocol.Properties{ContentType: "application/json", ContentEncoding: "utf-8"},
	Body: []byte(`[[7], {}, {"callbacks": null, "errbacks": [{"task": "shop.refund", "args": [7], "kwargs": {}, ` +
		`"options": {"queue": "mail"}, "subtask_type": null, "immutable": true}], "chain": [{"task": "shop.ship", "args": [], ` +
		`"kwargs": {}, "options": {"task_id": "step-3"}, "subtask_type": null, "immutable": false}], "chord": null}]`),
}

func ExampleDecode() {
	m, err := protocol.Decode(exampleDelivery, nil)
	if err != nil {
		fmt.Println(err)
		return
	}
	var order int
	if err := protocol.DecodeJSON(m.Args[0], &order); err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(m.Task, m.ID, order, len(m.Embed.Chain))
	// Output: shop.pack step-2 7 1
}

func ExampleMalformedError() {
	d := exampleDelivery
	d.Body = []byte(`[[7], [], {}]`)
	_, err := protocol.Decode(d, nil)
	var malformed *protocol.MalformedError
	if errors.As(err, &malformed) {
		fmt.Println(err)
		fmt.Printf("%+v\n", malformed.Disposition())
		fmt.Println(malformed.Exception().Repr())
	}
	// Output:
	// message of task "shop.pack" (id "step-2") cannot be run: kwargs is not an object: it is []
	// {StoreFailure:true Reject:false}
	// InvalidTaskError('Task keyword arguments is not a mapping')
}

func ExampleAfterSuccess() {
	m, err := protocol.Decode(exampleDelivery, nil)
	if err != nil {
		fmt.Println(err)
		return
	}
	value, err := protocol.EncodeJSON(map[string]any{"parcel": 3})
	if err != nil {
		fmt.Println(err)
		return
	}
	plan, err := protocol.AfterSuccess(m, value, protocol.Sender{Origin: "gen1@host", Now: time.Unix(0, 0)})
	if err != nil {
		fmt.Println(err)
		return
	}
	next := plan.FollowUps[0].Publishing
	fmt.Println(next.Task, next.TaskID, next.Headers["parent_id"], next.Headers["root_id"])
	fmt.Println(string(next.Body))
	fmt.Println(string(plan.Children))
	// Output:
	// shop.ship step-3 step-2 step-1
	// [[{"parcel": 3}], {}, {"callbacks": null, "errbacks": null, "chain": [], "chord": null}]
	// [[["step-3", null], null]]
}

func ExampleAfterFailure() {
	m, err := protocol.Decode(exampleDelivery, nil)
	if err != nil {
		fmt.Println(err)
		return
	}
	plan, err := protocol.AfterFailure(m, protocol.Sender{})
	if err != nil {
		fmt.Println(err)
		return
	}
	errback := plan.FollowUps[0]
	fmt.Println(errback.Publishing.Task, errback.Publishing.Headers["argsrepr"], errback.Destination.Queue)
	for _, step := range protocol.LaterSteps(m) {
		fmt.Println("never runs:", step.TaskID, step.Task)
	}
	// Output:
	// shop.refund (7,) mail
	// never runs: step-3 shop.ship
}

func ExampleSignature_Apply() {
	s := protocol.NewSignature("shop.add", []json.RawMessage{json.RawMessage("2"), json.RawMessage("3")}, nil,
		protocol.Member{Key: "queue", Value: json.RawMessage(`"orders"`)},
		protocol.Member{Key: "countdown", Value: json.RawMessage("60")})
	p, destination, err := s.Apply(protocol.ApplyOptions{
		NewID: func() string { return "3f0c" },
		Now:   time.Date(2031, 1, 2, 3, 4, 5, 0, time.UTC),
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(destination.Queue, p.TaskID, p.Headers["eta"])
	fmt.Println(string(p.Body))
	// Output:
	// orders 3f0c 2031-01-02T03:05:05+00:00
	// [[2, 3], {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]
}

func ExampleEncodeJSON() {
	text, err := protocol.EncodeJSON(struct {
		Name string    `json:"name"`
		Rate float64   `json:"rate"`
		Due  time.Time `json:"due"`
	}{"Zoë", 5, time.Date(2031, 1, 2, 3, 4, 5, 0, time.UTC)})
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(string(text))
	// Output: {"name": "Zo\u00eb", "rate": 5.0, "due": {"__type__": "datetime", "__value__": "2031-01-02T03:04:05+00:00"}}
}

func ExampleReadResult() {
	column := []byte("\x80\x05K\x03.")
	value, err := protocol.ReadResult(column)
	fmt.Println(string(value), err)
	// A pickle that needs a Python class is refused.
	_, err = protocol.ReadResult([]byte("\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R."))
	fmt.Println(err)
	// Output:
	// 3 <nil>
	// pickle cannot be read, at byte 2: it contains an object of Python's "os.system", and only plain values can be read outside Python
}
