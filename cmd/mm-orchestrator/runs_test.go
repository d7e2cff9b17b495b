package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
)

// Contents of rows are untrusted: no control character reaches the terminal, no line
// break disrupts the table, no secret is shown.
func TestRunsAreShown(t *testing.T) {
	t.Parallel()
	at := func(seconds int) *time.Time {
		t := time.Date(2026, 2, 22, 12, 0, seconds, 0, time.UTC)
		return &t
	}
	run := store.Run{
		ID: "6f1c2f0e-8a5b-4f2e-9f63-0d6c0c6e5a11", Instruction: "clear \x1b[2J the\r\nscreen with hunter2hunter2 and " + strings.Repeat("long ", 30),
		TargetService: "api", Priority: "high", Status: store.RunFailed, ArtifactRoot: "/srv/artifacts/6f1c",
		QueuedAt: *at(0), StartedAt: at(1), CompletedAt: at(42),
	}
	waiting := store.Run{ID: "b20d2f0e-8a5b-4f2e-9f63-0d6c0c6e5a11", Instruction: "wait", TargetService: "celery-worker", Priority: "normal", Status: store.RunPending, QueuedAt: *at(5)}
	working := store.Activity{Working: &store.Working{Step: store.StepPatch, Attempt: 1, Worker: "orchestrator@box", Alive: true, Since: *at(2), Starts: 2}}
	abandoned := store.Activity{Working: &store.Working{Step: store.StepPatch, Attempt: 1, Worker: "orchestrator@a-host-with-a-name-\x1bof-more-than-forty-letters", Since: *at(2), Starts: 1}}
	inLine := store.Activity{Waiting: &store.Waiting{Step: store.StepAnalyze, Since: *at(6), Workspace: "orchestrator.run:/workspace", Holder: run.ID, Place: 12}}
	free := store.Activity{Waiting: &store.Waiting{Step: store.StepAnalyze, Since: *at(6), Workspace: "orchestrator.run:/workspace", Place: 1}}
	behind := store.Activity{
		Working:        &store.Working{Step: store.StepRollback, Attempt: 1, Worker: "orchestrator@box", Alive: true, Since: *at(2), Starts: 1},
		WaitingForStep: &store.WaitingForStep{Step: store.StepPatch, Since: *at(6), For: store.Working{Step: store.StepRollback, Attempt: 1, Worker: "orchestrator@box", Alive: true, Since: *at(2), Starts: 1}},
	}
	behindDead := behind
	behindDead.Working = &store.Working{Step: store.StepRollback, Attempt: 1, Worker: "orchestrator@box", Since: *at(2), Starts: 1}
	behindDead.WaitingForStep = &store.WaitingForStep{Step: store.StepRestart, Since: *at(6), For: *behindDead.Working}
	detail := store.RunDetail{
		Run: run, Activity: working,
		States: []store.StepState{
			{Step: store.StepAnalyze, Attempt: 1, Status: "succeeded", CeleryTaskID: "t1", StartedAt: at(1), FinishedAt: at(2), Worker: "orchestrator@box", Starts: 1},
			{Step: store.StepPatch, Attempt: 2, Status: "failed", Message: "bad\tthing: hunter2hunter2\x00", StartedAt: at(2), FinishedAt: at(42)},
			{Step: store.StepBuild, Attempt: 1, Status: "pending"},
		},
		Artifacts: []store.RegisteredArtifact{{ID: "a", CreatedAt: *at(2), Artifact: store.Artifact{Type: "patch_diff", Path: "patch.diff", Checksum: strings.Repeat("ab", 32), SizeBytes: 1234}}},
	}
	var list, one, asJSON bytes.Buffer
	printer := func(out *bytes.Buffer) runPrinter {
		return runPrinter{out: out, redactor: artifacts.NewRedactor(environment{"MY_SECRET=hunter2hunter2"})}
	}
	if err := printer(&list).list([]runLine{
		printer(&list).line(run, working), printer(&list).line(waiting, inLine), printer(&list).line(waiting, free), printer(&list).line(run, abandoned), printer(&list).line(waiting, behind), printer(&list).line(waiting, behindDead), printer(&list).line(run, store.Activity{}),
	}); err != nil {
		t.Fatal(err)
	}
	if err := printer(&one).run(printer(&one).detail(detail)); err != nil {
		t.Fatal(err)
	}
	if err := printer(&asJSON).json(printer(&asJSON).detail(detail)); err != nil {
		t.Fatal(err)
	}
	var line bytes.Buffer
	if err := printer(&line).run(printer(&line).detail(store.RunDetail{
		Run: waiting, Activity: inLine, Revocation: &store.Revocation{By: "ann@\x1bbox", Reason: "hunter2hunter2", At: *at(9)},
	})); err != nil {
		t.Fatal(err)
	}
	var retried, retriedJSON bytes.Buffer
	if err := printer(&retried).run(printer(&retried).detail(store.RunDetail{Run: waiting, Activity: behind})); err != nil {
		t.Fatal(err)
	}
	if err := printer(&retriedJSON).json([]runLine{printer(&retriedJSON).line(waiting, behind)}); err != nil {
		t.Fatal(err)
	}
	for text := range strings.Lines(list.String()) {
		if n := utf8.RuneCountInString(strings.TrimSpace(text)); n > terminalWidth {
			t.Errorf("%d columns: %s", n, text)
		}
	}
	for name, out := range map[string]*bytes.Buffer{"list.txt": &list, "run.txt": &one, "run.json": &asJSON, "waiting.txt": &line, "retried.txt": &retried, "retried.json": &retriedJSON} {
		if strings.ContainsAny(out.String(), "\x00\x1b\r") || strings.Contains(out.String(), "hunter2") {
			t.Errorf("%s shows what it must not:\n%q", name, out.String())
		}
		golden(t, filepath.Join("testdata", "runs", name), out.Bytes())
	}
}

// The beginning of an id is sufficient if one run matches. If several match they are
// listed, and nothing is changed.
func TestIDPrefixes(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	env := environment{"MM_ORCHESTRATOR_DATABASE_URL=" + d.URL, "USER=ann"}
	const first, second = "6f1c2f0e-8a5b-4f2e-9f63-0d6c0c6e5a11", "6f1c7777-8a5b-4f2e-9f63-0d6c0c6e5a11"
	d.Create(t, storetest.Seed{ID: first})
	d.Create(t, storetest.Seed{ID: second, TargetService: "celery-worker"})
	for i := range maxCandidates + 2 {
		d.Create(t, storetest.Seed{ID: fmt.Sprintf("bead%04d-8a5b-4f2e-9f63-0d6c0c6e5a11", i)})
	}
	for _, word := range []string{"6f1c2", "6F1C2F0E", "urn:uuid:" + first, "{" + strings.ToUpper(first) + "}", strings.ReplaceAll(first, "-", "")} {
		got := invoke(t, env, "runs", word, "--json")
		var detail runDetail
		if err := json.Unmarshal([]byte(got.stdout), &detail); err != nil || got.code != exitOK || detail.Run.ID != first {
			t.Errorf("%s: exit %d, %v: %s%s", word, got.code, err, got.stdout, got.stderr)
		}
	}
	got := invoke(t, env, "runs", "abcd")
	if want := "mm-orchestrator: there is no run abcd in database "; got.code != exitFailure || !strings.HasPrefix(got.stderr, want) {
		t.Errorf("of none: exit %d: %s", got.code, got.stderr)
	}
	for _, args := range [][]string{{"runs", "6f1c"}, {"runs", "revoke", "6f1c"}} {
		got := invoke(t, env, args...)
		at := d.Run(t, first)["queued_at"].(string)[:len("2006-01-02T15:04")]
		want := "mm-orchestrator: several runs match 6f1c: give more digits\n" +
			"mm-orchestrator:   " + first + "  api  pending  " + strings.Replace(at, "T", " ", 1) + "\n" +
			"mm-orchestrator:   " + second + "  celery-worker  pending  "
		if got.code != exitFailure || got.stdout != "" || !strings.HasPrefix(got.stderr, want) {
			t.Errorf("%s: exit %d: %s%s\nwant %s", args, got.code, got.stdout, got.stderr, want)
		}
	}
	if got := invoke(t, env, "runs", "bead"); strings.Count(got.stderr, "\n") != maxCandidates+2 || !strings.HasSuffix(got.stderr, "  and more\n") {
		t.Errorf("many: %s", got.stderr)
	}
	for _, run := range []string{first, second} {
		if status := d.Run(t, run)["status"]; status != "pending" {
			t.Fatalf("run %s is %s", run, status)
		}
	}
	got = invoke(t, env, "runs", "revoke", "6f1c7", "--reason", "wrong branch")
	if got.code != exitOK || !strings.Contains(got.stdout, "run "+second+" had not started (pending) and is now failed") {
		t.Errorf("revoke: exit %d: %s%s", got.code, got.stdout, got.stderr)
	}
	if a, b := d.Run(t, first)["status"], d.Run(t, second)["status"]; a != "pending" || b != "failed" {
		t.Errorf("the runs are %s and %s", a, b)
	}
}
