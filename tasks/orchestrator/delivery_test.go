package orchestrator

import (
	"encoding/json"
	"errors"
	"fmt"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/store"
)

func TestExecuteFollowsTheDecision(t *testing.T) {
	t.Parallel()
	failed := store.Outcome{Status: store.StepFailed, Message: `"Service 'x' is not managed by the orchestrator"`, ErrorType: "KeyError", ErrorModule: "builtins", Traceback: "tb"}
	for _, test := range []struct {
		name     string
		decision store.Decision
		err      error
		want     func(Result, error) bool
	}{
		{"has succeeded", store.Done{Outcome: store.Outcome{Status: store.StepSucceeded, Message: "m", Payload: json.RawMessage(`{"log":"l"}`), Artifacts: []store.Artifact{{Path: "l"}}}}, nil,
			func(r Result, err error) bool {
				return err == nil && r.Message == "m" && fmt.Sprint(r.Artifacts) == "[l]" && string(r.Metadata) == `{"log":"l"}`
			}},
		{"has failed", store.Done{Outcome: failed}, nil, func(_ Result, err error) bool {
			var failure *Failure
			return errors.As(err, &failure) && failure.Arg == "Service 'x' is not managed by the orchestrator" && failure.Error() == failed.Message && failure.Traceback == "tb"
		}},
		{"parked", store.Parked{Why: store.ParkedBusy, Reason: "r"}, nil, func(_ Result, err error) bool { return errors.Is(err, ErrStop) }},
		{"stop", store.Stop{Reason: "r"}, nil, func(_ Result, err error) bool { return errors.Is(err, ErrStop) }},
		{"no such run", nil, fmt.Errorf("no: %w", store.ErrNotFound), func(_ Result, err error) bool {
			var failure *Failure
			return errors.As(err, &failure) && failure.Error() == "Run "+testRun+" not found"
		}},
		{"no database", nil, store.ErrUnavailable, func(_ Result, err error) bool {
			var back *HandBackError
			return errors.As(err, &back)
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			b := newTestEnv(t)
			b.steps.decision, b.steps.beginErr = test.decision, test.err
			result, _, err := b.execute("analyze")
			if !test.want(result, err) || len(b.steps.finished) > 0 {
				t.Errorf("%+v, %v, recorded %d", result, err, len(b.steps.finished))
			}
		})
	}
}

func TestBadRequestsChangeNothing(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	o, err := New(b.config)
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		request Request
		text    string
	}{
		{Request{RunID: testRun, Step: "ghost"}, "'ghost' is not a valid OrchestratorPlanStep"},
		{Request{RunID: "x", Step: "analyze"}, "badly formed hexadecimal UUID string"},
		{Request{RunID: "../" + testRun, Step: "analyze"}, "badly formed hexadecimal UUID string"},
	} {
		_, err := o.Execute(t.Context(), test.request, nil)
		var failure *Failure
		if !errors.As(err, &failure) || failure.Error() != test.text || failure.Type != "ValueError" {
			t.Errorf("%+v: %v", test.request, err)
		}
	}
}
