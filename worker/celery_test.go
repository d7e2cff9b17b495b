package worker_test

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/worker"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

// The scenarios of testdata/celery about plain tasks, chains, callbacks and error
// callbacks. The test publishes each message of the producer as it was captured.
// The worker must then publish and store what the Python worker did.
var scenarios = []string{
	"success", "success_none", "success_unicode_nested", "failure_valueerror", "failure_custom",
	"link_mutable", "link_two",
	"chain_immutable_link_error_success", "chain_mutable", "chain_step_options", "chain_step_exchange", "chain_step_rk_only", "chain_step_unregistered",
	"chain_fail_errback_varargs", "chain_fail_errback_one_arg_immutable", "fail_errback_one_arg_mutable", "fail_errbacks_unregistered",
	"retry_twice_then_fail", "retry_with_custom_header_priority", "retry_inside_chain",
	"chain_then_group", "stamped_chain",
	"unregistered_task", "expired", "hard_time_limit", "soft_time_limit", "reject", "ignore", "update_state_progress",
}

// intended lists the intended differences: what the comparison of a scenario leaves
// out, for which Celery version ("" for all), and why.
var intended = []struct {
	version, scenario, what, why string
}{
	{"", "chain_fail_errback_varargs", "messages", "Python calls an errback with *args inline; this worker publishes every error callback (docs/celery.md#error-callbacks)"},
	{"", "chain_step_unregistered", "ignore_result", "before 5.7 false, since then null for a task that the worker does not know (docs/celery.md#headers)"},
	{"", "fail_errbacks_unregistered", "ignore_result", "as above"},
	{"5.4.0", "reject", "rows", "before 5.7 a rejected task stayed PENDING; this worker does what 5.7 does and stores FAILURE (docs/celery.md#outcomes)"},
	{"5.5.3", "reject", "rows", "as in 5.4.0"},
	{"5.6.3", "reject", "rows", "as in 5.4.0"},
}

func isIntended(version, scenario, what string) bool {
	for _, d := range intended {
		if (d.version == "" || d.version == version) && d.scenario == scenario && d.what == what {
			return true
		}
	}
	return false
}

type capturedFile struct {
	Version   string                      `json:"celery_version"`
	Scenarios map[string]capturedScenario `json:"scenarios"`
}

type capturedScenario struct {
	Messages []capturedMessage `json:"messages_in_publish_order"`
	Rows     []capturedRow     `json:"celery_taskmeta_rows_in_insert_order"`
}

type capturedMessage struct {
	By         string         `json:"published_by"`
	Exchange   string         `json:"exchange"`
	RoutingKey string         `json:"routing_key"`
	Properties map[string]any `json:"properties"`
	Headers    map[string]any `json:"headers"`
	Body       string         `json:"body_base64"`
}

type capturedRow struct {
	TaskID    string  `json:"task_id"`
	Status    string  `json:"status"`
	Result    *string `json:"result_hex"`
	DateDone  *string `json:"date_done"`
	Traceback *string `json:"traceback"`
	Name      *string `json:"name"`
	Args      *string `json:"args_text"`
	Kwargs    *string `json:"kwargs_text"`
	Worker    *string `json:"worker"`
	Retries   *int    `json:"retries"`
	Queue     *string `json:"queue"`
	Children  *string `json:"children_text"`
	Stamps    *string `json:"stamps_text"`
}

func TestPublishesAndStoresWhatPythonDoes(t *testing.T) {
	t.Parallel()
	for _, version := range []string{"5.4.0", "5.5.3", "5.6.3", "5.7.0"} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			text, err := os.ReadFile("../testdata/celery/worker_celery-" + version + ".json")
			if err != nil {
				t.Fatal(err)
			}
			var file capturedFile
			decoder := json.NewDecoder(bytes.NewReader(text))
			decoder.UseNumber()
			if err := decoder.Decode(&file); err != nil {
				t.Fatal(err)
			}
			replay(t, file)
		})
	}
}

func replay(t *testing.T, file capturedFile) {
	r := newTestEnv(t)
	trace := r.trace()
	cfg := r.config()
	cfg.Queues = []string{"orders", "mail"}
	cfg.TaskQueues = []worker.Queue{
		{Name: "orders"},
		{Name: "mail", Exchange: "shop", RoutingKey: "mail.send"},
	}
	w := newWorker(t, cfg)
	registerShop(w)
	workertest.Start(t, w)

	sent := map[string]bool{} // by the producer
	for _, name := range scenarios {
		scenario, ok := file.Scenarios[name]
		if !ok {
			t.Errorf("%s: not in the capture", name)
			continue
		}
		t.Run(name, func(t *testing.T) {
			r := *r
			r.t = t
			replayScenario(t, &r, trace, sent, file.Version, name, scenario)
		})
	}
}

func replayScenario(t *testing.T, r *testEnv, trace <-chan capturedMessage, sent map[string]bool, version, name string, scenario capturedScenario) {
	want, got := newNormalizer(), newNormalizer()
	published := 0
	for _, m := range scenario.Messages {
		if m.By != "producer" {
			published++
			continue
		}
		postponeExpiry(t, &m)
		want.message(t, m)
		got.message(t, m)
		sent[key(m)] = true
		r.send(publishing(t, m))
	}
	if isIntended(version, name, "messages") {
		published++ // the errback itself
	}
	var messages []capturedMessage
	for len(messages) < published {
		m := receive(t, fmt.Sprintf("message %d of %d that the worker publishes", len(messages)+1, published), trace)
		if !sent[key(m)] {
			messages = append(messages, m)
		}
	}
	// The order of publishing decides which id corresponds to which.
	if !isIntended(version, name, "messages") {
		i := 0
		for _, m := range scenario.Messages {
			if m.By == "producer" {
				continue
			}
			if isIntended(version, name, "ignore_result") {
				m.Headers["ignore_result"] = nil
			}
			w, g := want.message(t, m), got.message(t, messages[i])
			if w != g {
				t.Errorf("message %d:\ngot  %s\nwant %s", i+1, g, w)
			}
			i++
		}
	}
	if isIntended(version, name, "rows") {
		return
	}
	var gotRows, wantRows []string
	for _, row := range scenario.Rows {
		id := got.translate(want, row.TaskID)
		gotRows = append(gotRows, got.text(rowOf(t, version, r.result(id, row.Status))))
		wantRows = append(wantRows, want.text(row.text(t)))
	}
	slices.Sort(gotRows)
	slices.Sort(wantRows)
	if !slices.Equal(gotRows, wantRows) {
		t.Errorf("rows:\ngot  %s\nwant %s", strings.Join(gotRows, "\n     "), strings.Join(wantRows, "\n     "))
	}
}

// key tells the messages of one scenario apart.
func key(m capturedMessage) string { return fmt.Sprint(m.Headers["id"], " ", m.Headers["retries"]) }

// postponeExpiry moves an expiry date of the capture into the future.
func postponeExpiry(t *testing.T, m *capturedMessage) {
	expiration, _ := m.Properties["expiration"].(string)
	switch expiration {
	case "":
		return
	case "0":
		// The broker would drop the message unless it could deliver it at once.
		m.Properties = maps.Clone(m.Properties)
		delete(m.Properties, "expiration")
		return
	}
	m.Headers = maps.Clone(m.Headers)
	m.Headers["expires"] = protocol.FormatTime(time.Now().Add(5 * time.Minute))
}

// normalizer replaces what differs between two runs (ids and process numbers) by
// numbers, in the order of appearance.
type normalizer struct {
	numbers map[string]int
	names   []string
}

func newNormalizer() *normalizer { return &normalizer{numbers: map[string]int{}} }

var (
	generated = regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|gen\d+@[\w.-]+`)
	times     = regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?\+00:00`)
	remaining = regexp.MustCompile(`"expiration":"[1-9]\d*"`)
)

func (c *normalizer) text(text string) string {
	text = times.ReplaceAllString(text, "<time>")
	text = remaining.ReplaceAllString(text, `"expiration":"<ms>"`)
	return generated.ReplaceAllStringFunc(text, func(id string) string {
		n, ok := c.numbers[id]
		if !ok {
			n = len(c.names)
			c.numbers[id] = n
			c.names = append(c.names, id)
		}
		return fmt.Sprintf("<%d>", n)
	})
}

// translate returns the id in this run for an id of the capture.
func (c *normalizer) translate(other *normalizer, id string) string {
	n, ok := other.numbers[id]
	if !ok || n >= len(c.names) {
		return id
	}
	return c.names[n]
}

func (c *normalizer) message(t *testing.T, m capturedMessage) string {
	body, err := base64.StdEncoding.DecodeString(m.Body)
	if err != nil {
		t.Fatal(err)
	}
	return c.text(fmt.Sprintf("to %q %q properties %s headers %s body %s", m.Exchange, m.RoutingKey, sorted(t, m.Properties), sorted(t, m.Headers), body))
}

// sorted formats a value as JSON, with sorted keys.
func sorted(t *testing.T, value any) string {
	text, err := json.Marshal(value)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func (row capturedRow) text(t *testing.T) string {
	value := "null"
	if row.Result != nil {
		column, err := hex.DecodeString(*row.Result)
		if err != nil {
			t.Fatal(err)
		}
		text, err := protocol.ReadResult(column)
		if err != nil {
			t.Fatal(err)
		}
		value = string(text)
	}
	return fmt.Sprint(row.TaskID, " ", row.Status, " ", value, " done ", row.DateDone != nil, " traceback ", row.Traceback != nil,
		" name ", show(row.Name), " args ", show(row.Args), " kwargs ", show(row.Kwargs), " worker ", show(row.Worker),
		" retries ", show(row.Retries), " queue ", show(row.Queue), " children ", show(row.Children), " stamps ", show(row.Stamps))
}

func show[T any](value *T) string {
	if value == nil {
		return "NULL"
	}
	return fmt.Sprint(*value)
}

// rowOf formats a result of this worker like a captured row.
func rowOf(t *testing.T, version string, r protocol.Result) string {
	column, err := protocol.EncodeResult(r, protocol.EncodingJSON)
	if err != nil {
		t.Fatal(err)
	}
	value, err := protocol.ReadResult(column)
	if err != nil {
		t.Fatal(err)
	}
	orNull := func(text string) string {
		if text == "" {
			return "NULL"
		}
		return text
	}
	children, stamps := string(r.Children), string(r.Stamps)
	if version < "5.7" {
		children, stamps = "", "" // no such columns
	}
	return fmt.Sprint(r.TaskID, " ", r.State, " ", string(value), " done ", !r.DateDone.IsZero(), " traceback ", r.Traceback != "",
		" name ", orNull(r.Task), " args ", orNull(string(r.Args)), " kwargs ", orNull(string(r.Kwargs)), " worker ", orNull(r.Worker),
		" retries ", show(r.Retries), " queue ", orNull(r.Queue), " children ", orNull(children), " stamps ", orNull(stamps))
}

func publishing(t *testing.T, m capturedMessage) protocol.Publishing {
	t.Helper()
	body, err := base64.StdEncoding.DecodeString(m.Body)
	if err != nil {
		t.Fatal(err)
	}
	text := func(name string) string { s, _ := m.Properties[name].(string); return s }
	p := protocol.Publishing{
		TaskID: fmt.Sprint(m.Headers["id"]), Exchange: m.Exchange, RoutingKey: m.RoutingKey, Headers: m.Headers, Body: body,
		Properties: protocol.Properties{
			ContentType: text("content_type"), ContentEncoding: text("content_encoding"), CorrelationID: text("correlation_id"),
			ReplyTo: text("reply_to"), Expiration: text("expiration"),
		},
	}
	if n, ok := m.Properties["priority"].(json.Number); ok {
		number, err := n.Int64()
		if err != nil {
			t.Fatal(err)
		}
		priority := uint8(number)
		p.Properties.Priority = &priority
	}
	return p
}

// trace turns on the broker's message tracer for this virtual host. The channel
// receives every message that is published from then on.
func (r *testEnv) trace() <-chan capturedMessage {
	r.t.Helper()
	address, err := url.Parse(r.url)
	if err != nil {
		r.t.Fatal(err)
	}
	ch, err := r.conn.Channel()
	if err != nil {
		r.t.Fatal(err)
	}
	q, err := ch.QueueDeclare("", false, true, true, false, nil)
	if err != nil {
		r.t.Fatal(err)
	}
	if err := ch.QueueBind(q.Name, "publish.#", "amq.rabbitmq.trace", false, nil); err != nil {
		r.t.Fatal(err)
	}
	deliveries, err := ch.Consume(q.Name, "", true, true, false, false, nil)
	if err != nil {
		r.t.Fatal(err)
	}
	messages, probes := make(chan capturedMessage, 1000), make(chan struct{}, 1000)
	go func() {
		for d := range deliveries {
			if keys, _ := d.Headers["routing_keys"].([]any); len(keys) == 1 && keys[0] == probe {
				probes <- struct{}{}
				continue
			}
			properties, _ := plain(d.Headers["properties"]).(map[string]any)
			headers, _ := properties["headers"].(map[string]any)
			delete(properties, "headers")
			keys, _ := d.Headers["routing_keys"].([]any)
			exchange, _ := d.Headers["exchange_name"].(string)
			messages <- capturedMessage{
				By: "worker", Exchange: exchange, RoutingKey: fmt.Sprint(keys[0]), Properties: properties, Headers: headers,
				Body: base64.StdEncoding.EncodeToString(d.Body),
			}
		}
	}()
	traceMutex.Lock()
	defer traceMutex.Unlock()
	eventually(r.t, "the broker traces what is published", func() bool {
		r.api(http.MethodPut, "vhosts/"+path.Base(address.Path), map[string]any{"tracing": true})
		if err := r.channel.PublishWithContext(r.t.Context(), "", probe, false, false, amqp.Publishing{}); err != nil {
			r.t.Fatal(err)
		}
		select {
		case <-probes:
			return true
		case <-time.After(time.Second):
			return false
		}
	})
	return messages
}

// probe is the routing key of messages that only test whether the broker traces.
const probe = "probe of the tracer"

// traceMutex serialises turning on the tracer: when this is done for two virtual
// hosts at the same time, RabbitMQ traces only one of them. Against other
// processes the probe messages help.
var traceMutex sync.Mutex

func plain(value any) any {
	switch v := value.(type) {
	case amqp.Table:
		m := map[string]any{}
		for k, e := range v {
			m[k] = plain(e)
		}
		return m
	case []any:
		list := make([]any, len(v))
		for i := range v {
			list[i] = plain(v[i])
		}
		return list
	case int8:
		return int64(v)
	case int16:
		return int64(v)
	case uint8:
		return int64(v)
	case uint16:
		return int64(v)
	case int32:
		return int64(v)
	}
	return value
}
