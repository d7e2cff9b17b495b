package worker_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/worker"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

// malformed has the expected handling of each captured message: the column "here"
// of docs/celery.md#bad-messages. Rejected messages arrive in a dead-letter
// queue.
var malformed = map[string]struct {
	rejected bool
	state    string // of the row, or "" for none
}{
	"ok baseline":                                     {false, "SUCCESS"},
	"no task header, json string body":                {true, ""},
	"no headers at all, json dict without task":       {true, ""},
	"no headers, invalid json":                        {true, ""},
	"v2 invalid json":                                 {true, ""},
	"v2 invalid utf8":                                 {true, ""},
	"v2 pickle content type":                          {true, "FAILURE"},
	"v2 yaml content type":                            {true, "FAILURE"},
	"v2 text/plain":                                   {true, "FAILURE"},
	"v2 no content type":                              {true, ""},
	"v2 content_type application/json; charset=utf-8": {true, "FAILURE"},
	"v2 content_encoding latin-1":                     {false, "SUCCESS"},
	"v2 unknown compression":                          {true, ""},
	"v2 bad zlib":                                     {true, ""},
	"v2 zlib ok":                                      {false, "SUCCESS"},
	"v2 bz2 ok":                                       {false, "SUCCESS"},
	"v2 real gzip framing":                            {true, ""},
	"v2 body 2 elements":                              {true, ""},
	"v2 body dict with args (hybrid)":                 {false, "SUCCESS"},
	"v2 body empty dict":                              {true, ""},
	"v2 body null":                                    {true, ""},
	"v2 body empty bytes":                             {true, ""},
	"v2 body number":                                  {true, ""},
	"v2 embed null":                                   {false, "SUCCESS"},
	"v2 embed empty":                                  {false, "SUCCESS"},
	"v2 kwargs list":                                  {false, "FAILURE"},
	"v2 args dict":                                    {false, "FAILURE"},
	"v2 missing id":                                   {true, ""},
	"v2 minimal headers task+id":                      {false, "SUCCESS"},
	"v2 bad eta":                                      {true, ""},
	"v2 bad expires":                                  {true, ""},
	"v2 naive eta past":                               {false, "SUCCESS"},
	"v2 unregistered missing id":                      {true, ""},
	"v1":                                              {false, "SUCCESS"},
	"v1 minimal":                                      {false, "SUCCESS"},
	"v1 no kwargs":                                    {false, "SUCCESS"},
	"v1 unregistered":                                 {true, "FAILURE"},
	"v1 no id":                                        {true, ""},
}

func TestBadMessagesAreRejectedOrFail(t *testing.T) {
	t.Parallel()
	for _, queueType := range []string{"", "quorum"} {
		t.Run("queue type "+queueType, func(t *testing.T) {
			t.Parallel()
			badMessages(t, queueType)
		})
	}
}

func badMessages(t *testing.T, queueType string) {
	text, err := os.ReadFile("../testdata/celery/malformed_celery-5.7.0.json")
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Cases []struct {
			Case       string
			Properties map[string]any
			Headers    map[string]any
			Body       string `json:"body_base64"`
		}
	}
	if err := json.Unmarshal(text, &file); err != nil {
		t.Fatal(err)
	}
	if len(file.Cases) != len(malformed) {
		t.Fatalf("%d cases are captured, the table has %d", len(file.Cases), len(malformed))
	}
	r := newTestEnv(t)
	if _, err := r.channel.QueueDeclare("dead", true, false, false, false, nil); err != nil {
		t.Fatal(err)
	}
	dead, err := r.channel.Consume("dead", "", true, false, false, false, nil)
	if err != nil {
		t.Fatal(err)
	}
	cfg := r.config()
	cfg.TaskQueues = []worker.Queue{{Name: "orders", Type: queueType, Arguments: map[string]any{
		"x-dead-letter-exchange": "", "x-dead-letter-routing-key": "dead"}}}
	w := newWorker(t, cfg)
	registerShop(w)
	stop := workertest.Start(t, w)

	for i, c := range file.Cases {
		want, known := malformed[c.Case]
		if !known {
			t.Errorf("%s: not in the table", c.Case)
			continue
		}
		body, err := base64.StdEncoding.DecodeString(c.Body)
		if err != nil {
			t.Fatal(err)
		}
		text := func(name string) string { s, _ := c.Properties[name].(string); return s }
		r.send(protocol.Publishing{RoutingKey: "orders", Headers: c.Headers, Body: body,
			Properties: protocol.Properties{ContentType: text("content_type"), ContentEncoding: text("content_encoding")}})
		// When a good message that was sent later is done, so is the bad one.
		r.result(r.send(workertest.Message("orders", "shop.add", workertest.Args(i, 1), nil)))

		id, _ := c.Headers["id"].(string)
		if id == "" {
			var v1 struct{ ID string }
			_ = json.Unmarshal(body, &v1)
			id = v1.ID
		}
		if want.rejected {
			d := receive(t, c.Case+": the message in the dead-letter queue", dead)
			if !bytes.Equal(d.Body, body) {
				t.Errorf("%s: the dead-letter queue has another message: %.60s", c.Case, d.Body)
			}
		}
		row, _ := r.results.Find(id)
		if row.State != want.state {
			t.Errorf("%s: row is %q, want %q", c.Case, row.State, want.state)
		}
	}
	select {
	case d := <-dead:
		t.Errorf("a message was rejected unexpectedly: %.60s", d.Body)
	default:
	}
	if err := w.Health(); err != nil {
		t.Errorf("health: %v", err)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	if n := r.depth("orders"); n != 0 {
		t.Errorf("%d messages remain", n)
	}
}

// longIntegers writes py-amqp's field type for 64-bit integers, which amqp091-go
// does not support.
type longIntegers struct{ net.Conn }

func (c longIntegers) Write(b []byte) (int, error) {
	return c.Conn.Write(bytes.ReplaceAll(b, []byte("x-bigl"), []byte("x-bigL")))
}

func TestHeaderIntegersOf64BitsAreRead(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	w := newWorker(t, r.config())
	seen := make(chan any, 1)
	w.Register("shop.headers", worker.HandlerFunc(func(_ context.Context, task *worker.Task) (any, error) {
		seen <- task.Headers["x-big"]
		return nil, nil
	}))
	workertest.Start(t, w)

	uri, err := amqp.ParseURI(r.url)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := net.Dial("tcp", net.JoinHostPort(uri.Host, fmt.Sprint(uri.Port)))
	if err != nil {
		t.Fatal(err)
	}
	conn, err := amqp.Open(longIntegers{raw}, amqp.Config{SASL: []amqp.Authentication{uri.PlainAuth()}, Vhost: uri.Vhost, Locale: "en_US", Heartbeat: 10 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ch, err := conn.Channel()
	if err != nil {
		t.Fatal(err)
	}
	m := workertest.Message("orders", "shop.headers", nil, nil)
	m.Headers["x-big"] = int64(1) << 40
	if err := ch.PublishWithContext(t.Context(), "", "orders", false, false, amqp.Publishing{
		ContentType: "application/json", ContentEncoding: "utf-8", DeliveryMode: 2, Headers: table(m.Headers), Body: m.Body}); err != nil {
		t.Fatal(err)
	}
	if got := receive(t, "the task runs", seen); got != int64(1)<<40 {
		t.Errorf("header is %v (%T), want 2^40", got, got)
	}
	r.result(m.TaskID)
}
