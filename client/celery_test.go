package client_test

import (
	"bytes"
	"compress/zlib"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"math/big"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/client"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// TestSendsWhatPythonSends sends in Go what captured programs sent in Python, and
// compares every field of every message.
func TestSendsWhatPythonSends(t *testing.T) {
	t.Parallel()
	for _, version := range []string{"5.4.0", "5.5.3", "5.6.3", "5.7.0"} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			text, err := os.ReadFile("../testdata/celery/producer_celery-" + version + ".json")
			if err != nil {
				t.Fatal(err)
			}
			var file struct {
				Scenarios map[string]struct {
					Python   string
					Messages []capturedMessage
				}
			}
			if err := json.Unmarshal(text, &file); err != nil {
				t.Fatal(err)
			}
			env := newTestEnv(t, nil)
			if _, err := env.client.Send(t.Context(), add(), client.Queue("mail")); err != nil { // declares both queues
				t.Fatal(err)
			}
			if _, err := env.client.Send(t.Context(), add()); err != nil {
				t.Fatal(err)
			}
			env.take("orders", "mail")
			for name, scenario := range file.Scenarios {
				send, ported := scenarios[name]
				if why, left := notPorted[name]; !ported && !left {
					t.Errorf("%s: no counterpart in Go for %s", name, scenario.Python)
				} else if left {
					t.Logf("%s: %s", name, why)
				}
				if ported {
					t.Run(name, func(t *testing.T) { compareScenario(t, env, version, name, scenario.Messages, send) })
				}
			}
			if n := len(file.Scenarios); n != 33 {
				t.Errorf("%d scenarios", n)
			}
		})
	}
}

// notPorted are the scenarios of what this package does not send, with the reason.
var notPorted = map[string]string{
	"chord":                     "chords are not sent",
	"chain_task_group_task":     "a group with a follower is a chord",
	"group_of_chains_then_task": "chords are not sent",
	"serializer_pickle":         "only JSON is written",
	"serializer_yaml":           "only JSON is written",
	"serializer_msgpack":        "only JSON is written",
	"compression_bzip2":         "compression is zlib; every worker reads it",
}

// differences are the fields that must differ, for all scenarios ("") or one, with
// the reason.
var differences = []struct{ scenario, field, why string }{
	{"", "headers.ignore_result", "like Python's send_task the client does not know the options of a registration; null means those of the worker (docs/celery.md#headers)"},
	{"explicit_queue", "properties.priority", "Python leaves 0 out for a task that it has registered; for the broker both are equal (docs/celery.md#message-properties)"},
	{"send_task_by_name", "headers.argsrepr", "arguments given as a list in Python are shown as a list"},
	{"rich_json_types", "headers.argsrepr", "text for logs: Python prints bytes by the rules of its saferepr"},
	{"rich_json_types", "headers.kwargsrepr", "Go has no tuples in arguments"},
}

func isDifferent(scenario, field string) bool {
	for _, d := range differences {
		if (d.scenario == "" || d.scenario == scenario) && d.field == field {
			return true
		}
	}
	return false
}

var (
	eta     = time.Date(2031, 1, 2, 3, 4, 5, 678901000, time.UTC)
	add     = func(args ...any) client.Signature { return client.Task("shop.add", args...) }
	step    = func(n int) client.Signature { return client.Task("shop.step", n).Immutable() }
	onerr   = func(args ...any) client.Signature { return client.Task("shop.onerr", args...) }
	onok    = func(args ...any) client.Signature { return client.Task("shop.onok", args...) }
	rich    = []any{time.Date(2024, 5, 6, 7, 8, 9, 123456000, time.UTC), protocol.Date{Year: 2024, Month: 5, Day: 6}, protocol.TimeOfDay("07:08:09"), protocol.Decimal("12.340"), uuid("12345678-1234-5678-1234-567812345678")}
	numbers = func() (n []int) {
		for i := range 1000 {
			n = append(n, i)
		}
		return n
	}()
)

func uuid(text string) (u protocol.UUID) {
	for i, part := range regexp.MustCompile("[0-9a-f]{2}").FindAllString(text, -1) {
		fmt.Sscanf(part, "%02x", &u[i])
	}
	return u
}

type scenario func() (client.Signature, []client.Option)

func of(s client.Signature, options ...client.Option) scenario {
	return func() (client.Signature, []client.Option) { return s, options }
}

// scenarios are the captured Python programs in Go.
var scenarios = map[string]scenario{
	"simple":         of(add(2, 3)),
	"kwargs_unicode": of(add().Kwarg("x", "ü€").Kwarg("y", "\U0001F600")),
	"all_options": of(add(1, 2), client.TaskID("11111111-2222-3333-4444-555555555555"), client.ETA(eta), client.ExpiresAt(time.Date(2031, 1, 3, 0, 0, 0, 0, time.UTC)),
		client.Priority(5), client.TimeLimit(30*time.Second, 20*time.Second), client.Shadow("pretty.name"), client.Header("x-tenant", "acme"), client.Header("n", 7)),
	"countdown_expires_seconds": of(add(1, 2), client.Countdown(time.Minute), client.Expires(2*time.Minute)),
	"eta_naive":                 of(add(1, 2), client.ETA(time.Date(2031, 1, 2, 3, 4, 5, 0, protocol.Naive))),
	"ignore_result":             of(client.Task("shop.noresult"), client.IgnoreResult()),
	"explicit_queue":            of(client.Task("shop.mail", "bob"), client.Queue("mail")),
	"explicit_exchange_rk":      of(client.Task("shop.mail", "bob"), client.Exchange("shop", "mail.send")),
	"send_task_by_name":         of(client.Task("other.task", 1).Kwarg("a", 1)),
	"link_and_link_error":       of(add(1, 2), client.Link(add(10)), client.LinkError(onerr())),
	"link_list_with_options": of(add(1, 2), client.Link(add(10), onok("x").Immutable().With(client.Queue("mail"))),
		client.LinkError(onerr(1).Immutable().With(client.Queue("mail")), onerr())),
	"chain_immutable_link_error": of(client.Chain(step(1), step(2), step(3)), client.LinkError(onerr("order-7").Immutable())),
	"chain_on_error_queue":       of(client.Chain(step(1), step(2)).With(client.LinkError(onerr("order-7").Immutable().With(client.Queue("mail"))))),
	"chain_link":                 of(client.Chain(step(1), step(2)), client.Link(onok("done").Immutable())),
	"chain_mutable_mixed": of(client.Chain(add(1, 2), add(10).With(client.Queue("mail"), client.Priority(3), client.Countdown(5*time.Second)),
		onok("z").Immutable().With(client.TimeLimit(9*time.Second, 0), client.Expires(time.Minute)))),
	"chain_options": of(client.Chain(step(1), step(2)), client.Queue("mail"), client.Priority(4), client.TaskID("aaaaaaaa-0000-0000-0000-000000000001")),
	"chain_unregistered_names": of(client.Chain(client.Task("go.a", 1).Immutable(), client.Task("go.b", 2).Immutable()),
		client.LinkError(client.Task("go.err", "e").Immutable())),
	"group":                   of(client.Group(add(1, 1), add(2, 2))),
	"chain_task_then_group":   of(client.Chain(add(1, 2), client.Group(add(1), add(2)))),
	"stamped":                 of(add(1, 1).With(client.Stamp("tenant", "acme"), client.Stamp("trace", []string{"a", "b"}))),
	"stamped_chain":           of(client.Chain(step(1), step(2)).With(client.Stamp("tenant", "acme")), client.LinkError(onerr("e").Immutable())),
	"rich_json_types_nobytes": of(client.Task("shop.onok", rich...)),
	"rich_json_types": of(client.Task("shop.onok", append(slices.Clone(rich), []byte("abc"), []byte{0xff, 0})...).
		Kwarg("n", nil).Kwarg("f", 1.5).Kwarg("big", new(big.Int).Lsh(big.NewInt(1), 70)).Kwarg("t", []int{1, 2}).Kwarg("inf", math.Inf(1))),
	"compression_zlib": of(add(1, 2), client.Compress()),
	"compression_gzip": of(add(1, 2), client.Compress()),
	"long_argsrepr":    of(add(strings.Repeat("a", 3000), numbers)),
}

type capturedMessage struct {
	Queue      string
	Delivery   struct{ Exchange, RoutingKey string }
	Properties map[string]any
	Headers    map[string]any
	Body       string `json:"body_base64"`
}

func (m *capturedMessage) UnmarshalJSON(text []byte) error {
	var raw struct {
		Queue      string
		Delivery   struct{ Exchange, Routing_key string }
		Properties map[string]any
		Headers    map[string]any
		Body       string `json:"body_base64"`
	}
	if err := json.Unmarshal(text, &raw); err != nil {
		return err
	}
	m.Queue, m.Properties, m.Headers, m.Body = raw.Queue, raw.Properties, raw.Headers, raw.Body
	m.Delivery.Exchange, m.Delivery.RoutingKey = raw.Delivery.Exchange, raw.Delivery.Routing_key
	return nil
}

func compareScenario(t *testing.T, env *testEnv, version, name string, want []capturedMessage, program scenario) {
	signature, options := program()
	now := time.Now()
	if _, err := env.client.Send(t.Context(), signature, options...); err != nil {
		t.Fatal(err)
	}
	sent := env.take("orders", "mail")
	if len(sent) != len(want) {
		t.Fatalf("%d messages, Python sent %d", len(sent), len(want))
	}
	ours, theirs := newNames(), newNames()
	for i, m := range sent {
		got := flat(t, ours, now, m.Exchange, m.RoutingKey, propertiesOf(m), m.Headers, m.Body)
		body, err := base64.StdEncoding.DecodeString(want[i].Body)
		if err != nil {
			t.Fatal(err)
		}
		captured := want[i]
		wanted := flat(t, theirs, sentAt(t, captured), captured.Delivery.Exchange, captured.Delivery.RoutingKey, captured.Properties, captured.Headers, body)
		for _, field := range union(got, wanted) {
			if field == "headers.ignore_result" && got[field] != "null" {
				if got[field] != wanted[field] {
					t.Errorf("message %d, %s: got %s, want %s", i, field, got[field], wanted[field])
				}
				continue
			}
			if got[field] != wanted[field] && !isDifferent(name, field) {
				t.Errorf("message %d, %s:\n got %s\nwant %s", i, field, got[field], wanted[field])
			}
		}
	}
}

func union(a, b map[string]string) []string {
	var keys []string
	for _, m := range []map[string]string{a, b} {
		for key := range m {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	return slices.Compact(keys)
}

// sentAt is when a captured message with a relative time was sent: its expiration is
// relative to it.
func sentAt(t *testing.T, m capturedMessage) time.Time {
	expires, _ := m.Headers["expires"].(string)
	expiration, _ := m.Properties["expiration"].(string)
	if expires == "" || expiration == "" {
		return time.Time{}
	}
	at, err := protocol.ParseTime(expires)
	if err != nil {
		t.Fatal(err)
	}
	var ms int64
	fmt.Sscan(expiration, &ms)
	return at.Add(-time.Duration(ms) * time.Millisecond)
}

// flat returns every field of a message as text. Ids and the sender become names by
// their first place; times near now are written relative to it.
func flat(t *testing.T, names *names, now time.Time, exchange, key string, properties, headers map[string]any, body []byte) map[string]string {
	fields := map[string]string{"exchange": exchange, "routing_key": key}
	put := func(prefix string, values map[string]any) {
		for _, name := range slices.Sorted(maps.Keys(values)) {
			value := values[name]
			switch name {
			case "origin":
				if text, _ := value.(string); !regexp.MustCompile(`^gen\d+@.+$`).MatchString(text) {
					t.Errorf("origin is %v", value)
				}
				value = "sender"
			case "stamped_headers":
				if list, ok := value.([]any); ok {
					list = slices.Clone(list)
					slices.SortFunc(list, func(a, b any) int { return strings.Compare(fmt.Sprint(a), fmt.Sprint(b)) })
					value = list
				}
			case "eta", "expires":
				if text, ok := value.(string); ok {
					if at, err := protocol.ParseTime(text); err == nil && at.Sub(now).Abs() < 24*time.Hour && !now.IsZero() {
						value = "now+" + at.Sub(now).Round(time.Second).String()
					}
				}
			case "expiration":
				var ms int64
				if fmt.Sscan(fmt.Sprint(value), &ms); ms > 1e9 {
					value = "until expires"
				}
			}
			text, err := json.Marshal(value)
			if err != nil {
				t.Fatal(err)
			}
			fields[prefix+name] = names.replace(string(text))
		}
	}
	// In a fixed order, so that names are given in the same order on both sides.
	put("headers.", map[string]any{"id": headers["id"]})
	put("properties.", properties)
	put("headers.", headers)
	if headers["compression"] == "application/x-gzip" {
		z, err := zlib.NewReader(bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		if body, err = io.ReadAll(z); err != nil {
			t.Fatal(err)
		}
	}
	fields["body"] = names.replace(string(body))
	return fields
}

func propertiesOf(d amqp.Delivery) map[string]any {
	m := map[string]any{}
	for name, value := range map[string]string{
		"content_type": d.ContentType, "content_encoding": d.ContentEncoding, "correlation_id": d.CorrelationId, "reply_to": d.ReplyTo, "expiration": d.Expiration,
		"message_id": d.MessageId, "type": d.Type, "user_id": d.UserId, "app_id": d.AppId,
	} {
		if value != "" {
			m[name] = value
		}
	}
	m["delivery_mode"], m["priority"] = d.DeliveryMode, d.Priority
	return m
}

// names gives ids names by the order in which they are seen.
type names struct{ known map[string]string }

func newNames() *names { return &names{map[string]string{}} }

var idPattern = regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}`)

func (n *names) replace(text string) string {
	return idPattern.ReplaceAllStringFunc(text, func(id string) string {
		if n.known[id] == "" {
			n.known[id] = fmt.Sprintf("id%d", len(n.known)+1)
		}
		return n.known[id]
	})
}
