package protocol_test

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// Intended differences between our follow-ups and those of a Python worker.
var intendedDifferences = map[string]string{
	"header origin":        "ours names our own process",
	"header ignore_result": "null instead of false: only the executing worker knows the task's own setting; a retry keeps it, as 5.7",
	"property priority":    "0 instead of absent for a task that the Python sender has registered: brokers treat both alike",
}

// Scenarios in which a Python worker's follow-ups differ, or depend on the
// task's code.
var otherFollowUps = map[string]string{
	"chain_fail_errback_varargs":     "Python calls this errback inline; a worker without the function sends it (docs/celery.md#error-callbacks)",
	"errback_raises_then_other":      "Python calls one of the errbacks inline, and it raises",
	"hard_time_limit_errbacks":       "Python sends each errback twice (docs/celery.md#outcomes)",
	"on_success_raises":              "up to 5.6 an exception in on_success sent errbacks",
	"replace":                        "the replacement is made by the task's code",
	"replace_with_chain_callbacks":   "the replacement is made by the task's code",
	"second_run_fails_after_success": "one id runs twice with different outcomes, and one row is for both",
	"unserializable_in_chain":        "Celery publishes the next step and then fails; here the value is encoded first (docs/celery.md#outcomes)",
}

// The follow-ups of each task equal those that a Python worker published, in
// every field except for the intended differences.
func TestFollowUpsAreThoseOfPythonWorkers(t *testing.T) {
	t.Parallel()
	compared := map[string]int{}
	for _, file := range capturedFiles(t, "worker_*.json") {
		for _, s := range capturedScenarios(t, file) {
			name := file + "/" + s.Name
			if why, ok := otherFollowUps[s.Name]; ok {
				t.Logf("%s: %s", name, why)
				continue
			}
			for i := range s.Messages {
				checkFollowUps(t, name, s, i, compared)
			}
		}
	}
	for what, least := range map[string]int{"success": 60, "failure": 15, "retry": 20, "chord refused": 10} {
		if compared[what] < least {
			t.Errorf("only %d cases of %s compared, want %d", compared[what], what, least)
		}
	}
}

// checkFollowUps compares the follow-ups of message i of a scenario.
func checkFollowUps(t *testing.T, name string, s capturedScenario, i int, compared map[string]int) {
	t.Helper()
	d := s.Messages[i].delivery(t)
	m, err := protocol.Decode(d, nil)
	if err != nil {
		t.Errorf("%s[%d]: %v", name, i, err)
		return
	}
	if strings.HasPrefix(m.Task, "celery.") {
		return
	}
	if err := protocol.CheckCanvas(m); err != nil {
		if !errors.Is(err, protocol.ErrUnsupportedCanvas) || !strings.Contains(string(d.Body), `"chord"`) {
			t.Errorf("%s[%d]: %v", name, i, err)
		}
		compared["chord refused"]++
		return
	}
	var want []capturedMessage
	for _, later := range s.Messages[i+1:] {
		h := later.headers(t)
		switch {
		case later.PublishedBy != "worker":
		case h["id"] == m.ID && h["retries"] == int32(m.Retries)+1:
			compared["retry"]++
			checkRetry(t, name, m, later)
			return
		case h["parent_id"] == m.ID && h["id"] != m.ID && h["retries"] == int32(0):
			want = append(want, later)
		}
	}
	row, ok := rowOf(s, m.ID)
	if !ok || row.Worker == nil {
		return
	}
	sender := protocol.Sender{ReplyTo: "worker", Origin: "gen1@go", NewID: freshIDs(), Now: senderTime(t, m, want)}
	var plan protocol.Plan
	switch row.Status {
	case "SUCCESS":
		compared["success"]++
		if plan, err = protocol.AfterSuccess(m, readRow(t, name, row), sender); err != nil {
			t.Errorf("%s[%d]: %v", name, i, err)
			return
		}
		checkChildren(t, name, row, plan, want)
	case "FAILURE":
		compared["failure"]++
		if plan, err = protocol.AfterFailure(m, sender); err != nil {
			t.Errorf("%s[%d]: %v", name, i, err)
			return
		}
		checkLaterSteps(t, name, s, m, row)
	default:
		return
	}
	if len(plan.FollowUps) != len(want) {
		t.Errorf("%s[%d] %s %s: %d follow-ups, want %d", name, i, m.Task, row.Status, len(plan.FollowUps), len(want))
		return
	}
	for j := range want {
		checkPublishing(t, fmt.Sprintf("%s[%d] follow-up %d", name, i, j), m, plan.FollowUps[j], want[j])
	}
}

func rowOf(s capturedScenario, id string) (capturedRow, bool) {
	for _, row := range s.Rows {
		if row.TaskID == id {
			return row, true
		}
	}
	return capturedRow{}, false
}

func readRow(t *testing.T, name string, row capturedRow) json.RawMessage {
	t.Helper()
	if row.ResultHex == nil {
		return nil
	}
	column, err := hex.DecodeString(*row.ResultHex)
	if err != nil {
		t.Fatal(err)
	}
	value, err := protocol.ReadResult(column)
	var refused *protocol.PickleError
	if err != nil && !errors.As(err, &refused) {
		t.Errorf("%s: %v", name, err)
	}
	return value
}

func freshIDs() func() string {
	n := 0
	return func() string { n++; return fmt.Sprintf("new-%d", n) }
}

// senderTime is the time from which the captured worker must have counted
// expires, if it has set that header.
func senderTime(t *testing.T, m *protocol.Message, want []capturedMessage) time.Time {
	t.Helper()
	now := time.Now()
	for i, next := range m.Embed.Chain {
		var seconds float64
		text, ok := want0(want, t)["expires"].(string)
		if i != len(m.Embed.Chain)-1 || !ok || protocol.DecodeJSON(next.Option("expires"), &seconds) != nil {
			continue
		}
		at, err := protocol.ParseTime(text)
		if err != nil {
			t.Fatal(err)
		}
		now = at.Add(-time.Duration(seconds * float64(time.Second)))
	}
	return now
}

func want0(want []capturedMessage, t *testing.T) map[string]any {
	if len(want) == 0 {
		return nil
	}
	return want[0].headers(t)
}

func checkPublishing(t *testing.T, name string, parent *protocol.Message, got protocol.FollowUp, want capturedMessage) {
	t.Helper()
	p, headers := got.Publishing, want.headers(t)
	for _, header := range []string{"id", "group", "root_id"} {
		if id, ok := p.Headers[header].(string); ok && strings.HasPrefix(id, "new-") {
			if headers[header] == nil {
				t.Errorf("%s: header %s: got a new id, want null", name, header)
			}
			p.Headers[header] = headers[header]
		}
	}
	p.TaskID = p.Headers["id"].(string)
	if strings.HasPrefix(p.Properties.CorrelationID, "new-") {
		p.Properties.CorrelationID = p.TaskID
	}
	if p.Properties.ReplyTo == "worker" {
		if want.Properties.ReplyTo == parent.Properties.ReplyTo && parent.ParentID == "" {
			t.Errorf("%s: reply_to is the worker's own, want the producer's", name)
		}
		p.Properties.ReplyTo = want.Properties.ReplyTo
	}
	checkHeaderTable(t, name, p.Headers, headers)
	if want.Properties.Priority == nil && *p.Properties.Priority == 0 {
		p.Properties.Priority = nil
	}
	if !reflect.DeepEqual(p.Properties, want.properties()) {
		t.Errorf("%s: properties:\ngot  %+v\nwant %+v", name, p.Properties, want.properties())
	}
	if !bytes.Equal(p.Body, want.Body) {
		t.Errorf("%s: body:\ngot  %s\nwant %s", name, p.Body, want.Body)
	}
	if p.Task != headers["task"] || p.TaskID != headers["id"] {
		t.Errorf("%s: task %q id %q do not repeat the headers", name, p.Task, p.TaskID)
	}
	exchange, key := "", "orders"
	switch d := got.Destination; {
	case d.Queue != "":
		key = d.Queue
	case d.Exchange != "" && d.RoutingKey != "":
		exchange, key = d.Exchange, d.RoutingKey
	}
	if exchange != want.Exchange || key != want.RoutingKey {
		t.Errorf("%s: sent to %q %q, want %q %q", name, exchange, key, want.Exchange, want.RoutingKey)
	}
}

func checkHeaderTable(t *testing.T, name string, got, want map[string]any) {
	t.Helper()
	for header := range want {
		if _, ok := got[header]; !ok {
			t.Errorf("%s: header %s is missing", name, header)
		}
	}
	for header, value := range got {
		if _, ok := intendedDifferences["header "+header]; ok && !reflect.DeepEqual(value, want[header]) {
			if header == "ignore_result" && want[header] != false {
				t.Errorf("%s: header ignore_result: got %v, want %v", name, value, want[header])
			}
			continue
		}
		if expected, ok := want[header]; !ok || !reflect.DeepEqual(value, expected) {
			t.Errorf("%s: header %s: got %#v, want %#v", name, header, value, expected)
		}
	}
}

func checkRetry(t *testing.T, name string, m *protocol.Message, want capturedMessage) {
	t.Helper()
	headers := want.headers(t)
	options := protocol.RetryOptions{KeepParent: headers["parent_id"] == nil}
	if text, ok := headers["eta"].(string); ok {
		eta, err := protocol.ParseTime(text)
		if err != nil {
			t.Fatal(err)
		}
		options.ETA = eta
	}
	if m.Expires != nil {
		var ms int
		fmt.Sscan(want.Properties.Expiration, &ms)
		options.Now = m.Expires.Add(-time.Duration(ms) * time.Millisecond)
	}
	p, err := protocol.RetryMessage(m, options)
	if err != nil {
		t.Errorf("%s: %v", name, err)
		return
	}
	checkHeaderTable(t, name+" retry", p.Headers, headers)
	if p.Headers["origin"] != headers["origin"] {
		t.Errorf("%s: origin of a retry: got %v, want the producer's %v", name, p.Headers["origin"], headers["origin"])
	}
	if !reflect.DeepEqual(p.Properties, want.properties()) {
		t.Errorf("%s: properties:\ngot  %+v\nwant %+v", name, p.Properties, want.properties())
	}
	if !bytes.Equal(p.Body, want.Body) {
		t.Errorf("%s: body:\ngot  %s\nwant %s", name, p.Body, want.Body)
	}
	if p.Exchange != want.Exchange || p.RoutingKey != want.RoutingKey {
		t.Errorf("%s: retry goes to %q %q, want %q %q", name, p.Exchange, p.RoutingKey, want.Exchange, want.RoutingKey)
	}
}

// checkChildren compares the children that Celery 5.7 has stored.
func checkChildren(t *testing.T, name string, row capturedRow, plan protocol.Plan, want []capturedMessage) {
	t.Helper()
	if !strings.Contains(name, "5.7.0") {
		return
	}
	got := string(plan.Children)
	for _, message := range want {
		for header, value := range message.headers(t) {
			id, ok := value.(string)
			if header != "id" && header != "group" || !ok {
				continue
			}
			if row.ChildrenText == nil || !strings.Contains(*row.ChildrenText, id) {
				t.Errorf("%s: stored children %v do not name %s", name, row.ChildrenText, id)
			}
		}
	}
	switch {
	case row.ChildrenText == nil && got == "":
	case row.ChildrenText == nil || shapeOf(got) != shapeOf(*row.ChildrenText):
		t.Errorf("%s: children: got %s, want %v", name, got, row.ChildrenText)
	}
}

// shapeOf replaces every id, so that only the structure is compared.
func shapeOf(children string) string {
	parts := strings.Split(children, `"`)
	for i := 1; i < len(parts); i += 2 {
		parts[i] = "id"
	}
	return strings.Join(parts, `"`)
}

// checkLaterSteps compares the rows that Celery stored for steps that will
// never run. They are the rows without a worker.
func checkLaterSteps(t *testing.T, name string, s capturedScenario, m *protocol.Message, failed capturedRow) {
	t.Helper()
	steps := protocol.LaterSteps(m)
	var got, want []string
	for _, step := range steps {
		got = append(got, step.TaskID+" "+step.Task+" "+string(step.Args)+" "+string(step.Kwargs))
	}
	for _, row := range s.Rows {
		if row.Worker == nil && row.Status == "FAILURE" && row.Name != nil && *row.Name != "" && sameText(row.Traceback, failed.Traceback) {
			want = append(want, row.TaskID+" "+*row.Name+" "+*row.ArgsText+" "+*row.KwargsText)
		}
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("%s: later steps of %s:\ngot  %q\nwant %q", name, m.Task, got, want)
	}
}

func sameText(a, b *string) bool { return a == b || a != nil && b != nil && *a == *b }
