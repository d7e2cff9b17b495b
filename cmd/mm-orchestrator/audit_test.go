package main

import (
	"archive/zip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/moonladderstudios/mm-orchestrator/audit"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
)

// auditedRun makes a run that was rolled back, with a trail and with artifacts, some of
// them hostile. It returns the run's id and the folder of its artifacts.
func (s testEnv) auditedRun(t *testing.T) (run, dir string) {
	t.Helper()
	pool, err := pgxpool.New(t.Context(), s.database)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	d := &storetest.Database{URL: s.database, OwnerURL: s.database, Pool: pool}
	base := t.TempDir()
	run = "6f1c2f0e-8a5b-4f2e-9f63-0d6c0c6e5a11"
	dir = filepath.Join(base, run)
	d.Create(t, storetest.Seed{ID: run, ArtifactRoot: dir, Instruction: "<script>alert(1)</script> & more", TargetService: "api"})
	db := d.Open(t)
	file := func(name, text string) store.Artifact {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256([]byte(text))
		return store.Artifact{Type: "metrics", Path: name, Checksum: hex.EncodeToString(sum[:]), SizeBytes: int64(len(text))}
	}
	if err := os.WriteFile(filepath.Join(base, "outside.txt"), []byte("not of the run\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("../outside.txt", filepath.Join(dir, "link.txt")); err != nil {
		t.Fatal(err)
	}
	gone := file("gone.log", "gone\n")
	gone.Path = "gone-really.log"
	changed := file("changed.log", "as registered\n")
	file("changed.log", "altered since\n")
	outcomes := map[store.Step][]store.Artifact{
		store.StepAnalyze: {file("analyze.log", "fine\n")},
		store.StepPatch: {file("page.html", "<script>alert(2)</script>"), file("logs/con fig?.log", "x"), file("secret.log", "the password is hunter2hunter2\n"),
			gone, changed, {Type: "metrics", Path: "../outside.txt"}, {Type: "metrics", Path: "link.txt", SizeBytes: 15}, {Type: "metrics", Path: "/etc/hostname"}},
	}
	for _, step := range []store.Step{store.StepAnalyze, store.StepPatch, store.StepRollback} {
		decision, err := db.BeginStep(t.Context(), store.BeginRequest{
			RunID: run, Step: step, TaskID: "t-" + string(step), Queue: "q", Workspace: func(r store.Run) string { return "q:/" + r.ID },
		})
		start, isStart := decision.(store.Start)
		if err != nil || !isStart {
			t.Fatalf("begin %s: %+v, %v", step, decision, err)
		}
		outcome := store.Outcome{Status: store.StepSucceeded, Message: "done", FinishedAt: time.Now(), Artifacts: outcomes[step]}
		if step == store.StepPatch {
			exit := 1
			outcome.Status, outcome.Message, outcome.ErrorType, outcome.ErrorModule = store.StepFailed, "</td><script>alert(3)</script>", "RuntimeError", "builtins"
			outcome.Audit = []audit.Record{
				{Kind: audit.ApprovalGranted, Approval: &audit.Approval{Approver: "ops-<b>417</b>", Role: "sre", Requirement: "pre-run"}},
				{Kind: audit.CommandEnded, DurationMS: 1500, Command: &audit.Command{Number: 1, Argv: []string{"git", "apply", "<img src=x>"}, Exit: &exit}},
				{Kind: audit.FileChanged, File: &audit.File{Path: "services/api.py", After: &audit.Version{SHA256: strings.Repeat("a", 64), Mode: "100644"}}},
			}
		}
		if _, err := db.FinishStep(t.Context(), start.Claim, outcome); err != nil {
			t.Fatal(err)
		}
	}
	return run, dir
}

func TestAuditCommands(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	run, dir := s.auditedRun(t)
	command := func(code int, args ...string) string {
		t.Helper()
		p := start(t, s.env(), args...)
		if got := p.exit(); got != code {
			t.Errorf("%q: exit %d, want %d: %s%s", args, got, code, p.stdout.String(), p.stderr.String())
		}
		return p.stdout.String() + p.stderr.String()
	}
	shown := command(exitOK, "audit", "show", "6f1c2f0e")
	for _, line := range []string{"run-started          service api, priority normal", "command-ended        git apply <img src=x> (exit 1, 1.5s)", "file-changed         services/api.py: none -> 100644 aaaaaaaaaaaa",
		"approval-granted     by ops-<b>417</b> (sre), gate pre-run", "run-ended            rolled_back"} {
		if !strings.Contains(shown, line) {
			t.Errorf("show lacks %q:\n%s", line, shown)
		}
	}
	good := command(exitOK, "audit", "verify", "6f1c")
	if !strings.Contains(good, "is good: 11 records") || !strings.Contains(good, "\nhead 11:") {
		t.Errorf("verify: %s", good)
	}
	head := strings.TrimSpace(good[strings.Index(good, "head ")+5:])
	text := command(exitOK, "audit", "show", "--json", run)
	file := filepath.Join(dir, "audit.jsonl")
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	command(exitOK, "audit", "verify", run, "--copy", file)
	command(exitOK, "audit", "verify", run, "--head", head)
	offline := start(t, environment{}, "audit", "verify", "--copy", file, "--head", head) // no database
	if offline.exit() != exitOK {
		t.Errorf("verify of a file with a head, without a database: %s", offline.stderr.String())
	}

	// A copy that was altered, one that was cut, and a head of more records.
	if err := os.WriteFile(file, []byte(strings.Replace(text, `"exit":1`, `"exit":0`, 1)), 0o644); err != nil {
		t.Fatal(err)
	}
	edited := slices.IndexFunc(strings.Split(text, "\n"), func(line string) bool { return strings.Contains(line, `"exit":1`) }) + 1
	if out := command(exitFailure, "audit", "verify", run, "--copy", file); !strings.Contains(out, fmt.Sprintf("record %d is edited", edited)) {
		t.Errorf("an edited copy: %s", out)
	}
	if err := os.WriteFile(file, []byte(text[:strings.LastIndex(strings.TrimSpace(text), "\n")+1]), 0o644); err != nil {
		t.Fatal(err)
	}
	if out := command(exitFailure, "audit", "verify", run, "--copy", file); !strings.Contains(out, "record 11 is missing at the end") {
		t.Errorf("a cut copy: %s", out)
	}
	if out := command(exitFailure, "audit", "verify", run, "--head", "12:"+strings.Repeat("0", 64)); !strings.Contains(out, "record 12 is missing at the end") {
		t.Errorf("a head of 12 records: %s", out)
	}

	// Somebody edits a row, as only an owner can who switches the triggers off.
	s.exec(t, `ALTER TABLE mm_orchestrator.audit DISABLE TRIGGER USER`)
	s.exec(t, `UPDATE mm_orchestrator.audit SET record = replace(record, '"exit":1', '"exit":0')`)
	out := command(exitFailure, "audit", "verify", run, "--json")
	var report verifyReport
	if err := json.NewDecoder(strings.NewReader(out)).Decode(&report); err != nil || report.Good || len(report.Faults) != 1 || report.Faults[0].Record != int64(edited) || report.Faults[0].Fault != "edited" {
		t.Errorf("an edited row: %v\n%s", err, out)
	}
	if out := command(exitUsage, "audit", "verify", run, "--head", "x"); !strings.Contains(out, "a head is LENGTH:HASH") {
		t.Errorf("a bad head: %s", out)
	}
	if out := command(exitUsage, "audit"); !strings.Contains(out, "audit needs show or verify") {
		t.Errorf("no subcommand: %s", out)
	}
	if out := command(exitFailure, "audit", "show", "00000000-0000-4000-8000-000000000009"); !strings.Contains(out, "has no audit trail") {
		t.Errorf("no such run: %s", out)
	}
}

// TestExport: the archive opens anywhere, says what is not as recorded, and is checked by
// sha256sum and a shell alone.
func TestExport(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	run, dir := s.auditedRun(t)
	output := filepath.Join(t.TempDir(), "run.zip")
	p := start(t, append(s.env(), "MY_PASSWORD=hunter2hunter2"), "runs", "export", "6f1c2f0e", "-o", output)
	if p.exit() != exitFailure {
		t.Errorf("exit %d: %s%s", p.code, p.stdout.String(), p.stderr.String())
	}
	for _, text := range []string{"artifact changed.log: differs from its row", "artifact gone-really.log: not exported: no such file", "artifact ../outside.txt: not exported",
		"artifact link.txt: not exported", "artifact /etc/hostname: not exported"} {
		if !strings.Contains(p.stderr.String(), text) {
			t.Errorf("the command does not say %q: %s", text, p.stderr.String())
		}
	}
	archive, err := zip.OpenReader(output)
	if err != nil {
		t.Fatal(err)
	}
	defer archive.Close()
	unpacked := t.TempDir()
	files := map[string]string{}
	for _, f := range archive.File {
		if !filepath.IsLocal(f.Name) || strings.ContainsAny(f.Name, `\:*?"<>|`) {
			t.Errorf("archive has the name %q", f.Name)
		}
		content, err := f.Open()
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(content)
		if err != nil {
			t.Fatal(err)
		}
		name := strings.TrimPrefix(f.Name, "run-"+run+"/")
		files[name] = string(text)
		path := filepath.Join(unpacked, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	var names []string
	for name, text := range files {
		names = append(names, name)
		if strings.Contains(text, "hunter2hunter2") || strings.Contains(text, "not of the run") {
			t.Errorf("%s has what must not be exported", name)
		}
	}
	slices.Sort(names)
	want := []string{"README.txt", "SHA256SUMS", "artifacts/analyze.log", "artifacts/changed.log", "artifacts/logs/con_fig_.log", "artifacts/page.html.txt", "artifacts/secret.log",
		"audit.head", "audit.jsonl", "index.html", "rows.json"}
	if !slices.Equal(names, want) {
		t.Errorf("archive has %q, want %q", names, want)
	}
	index := files["index.html"]
	for _, bad := range []string{"<script", "<img", "<b>", `href="http`, `src="`, "url(", "@import"} {
		if strings.Contains(index, bad) {
			t.Errorf("index.html has %s", bad)
		}
	}
	for _, good := range []string{"&lt;script&gt;alert(1)", "ops-&lt;b&gt;417", "as recorded; secrets were removed from the copy", "differs from its row", `href="artifacts/page.html.txt"`, "git apply &lt;img src=x&gt;", "rolled_back"} {
		if !strings.Contains(index, good) {
			t.Errorf("index.html lacks %s", good)
		}
	}
	var rows map[string]any
	if err := json.Unmarshal([]byte(files["rows.json"]), &rows); err != nil || rows["run"] == nil || rows["steps"] == nil || rows["plan"] == nil || rows["artifacts"] == nil {
		t.Errorf("rows.json: %v\n%s", err, files["rows.json"])
	}

	// What README.txt says, in a shell.
	shell := func(script string) string {
		t.Helper()
		cmd := exec.Command("sh", "-ec", script)
		cmd.Dir = unpacked
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v\n%s", script, err, out)
		}
		return string(out)
	}
	shell("sha256sum --strict -c SHA256SUMS")
	_, script, _ := strings.Cut(files["README.txt"], "    prev=")
	script, _, _ = strings.Cut(script, "\n\n")
	script = "prev=" + strings.ReplaceAll(script, "\n    ", "\n")
	if got := shell(script); got != files["audit.head"] {
		t.Errorf("the loop in README.txt prints %q, the head is %q", got, files["audit.head"])
	}
	shell(`sed -i 's/"exit":1/"exit":0/' audit.jsonl`)
	if got := shell(script); got == files["audit.head"] || !strings.Contains(got, "is broken") {
		t.Errorf("after an edit the loop prints %q", got)
	}

	// A flag that says what is secret counts as its variable does.
	p = start(t, append(s.env(), "REGISTRY_LOGIN=hunter2hunter2"), "runs", "export", run, "-o", "-", "--redact-names", "registry_*")
	p.exit()
	flagged, err := zip.NewReader(strings.NewReader(p.stdout.String()), int64(len(p.stdout.String())))
	if err != nil {
		t.Fatal(err)
	}
	secret, err := fs.ReadFile(flagged, "run-"+run+"/artifacts/secret.log")
	if err != nil || strings.Contains(string(secret), "hunter2hunter2") {
		t.Errorf("secret.log is %q, %v", secret, err)
	}

	// So does what the policy file says.
	p = start(t, append(s.env(), "DEPLOY_PIN=hunter2hunter2", "MM_ORCHESTRATOR_PROFILES="+policyFile(t, "redaction: {add: [DEPLOY_PIN]}\n")), "runs", "export", run, "-o", "-")
	p.exit()
	masked, err := zip.NewReader(strings.NewReader(p.stdout.String()), int64(len(p.stdout.String())))
	if err != nil {
		t.Fatal(err)
	}
	if secret, err = fs.ReadFile(masked, "run-"+run+"/artifacts/secret.log"); err != nil || strings.Contains(string(secret), "hunter2hunter2") {
		t.Errorf("secret.log is %q, %v", secret, err)
	}

	// The name is taken now, and stays.
	if p := start(t, s.env(), "runs", "export", run, "--output", output); p.exit() != exitFailure || !strings.Contains(p.stderr.String(), "exists: remove it") {
		t.Errorf("exit %d: %s", p.code, p.stderr.String())
	}
	// Without the folder of the artifacts, everything else is there.
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if p := start(t, s.env(), "runs", "export", run, "-o", "-"); p.exit() != exitFailure || !strings.HasPrefix(p.stdout.String(), "PK") ||
		!strings.Contains(p.stderr.String(), "the run's directory cannot be read here: no such file") {
		t.Errorf("exit %d: %s", p.code, p.stderr.String())
	}
}

// A run with a log of 200 MiB is exported by a process that needs a fraction of that.
func TestExportOfALargeLogNeedsLittleMemory(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	run, dir := s.auditedRun(t)
	s.exec(t, `DELETE FROM orchestrator_run_artifacts WHERE path <> 'analyze.log'`)
	const size = 200 << 20
	file, err := os.Create(filepath.Join(dir, "build.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	sum := sha256.New()
	lines := []byte(strings.Repeat("#12 3.141 compiling a module of the service, as builds do\n", 18000))
	for written := 0; written < size; {
		part := lines[:min(len(lines), size-written)]
		if _, err := io.MultiWriter(file, sum).Write(part); err != nil {
			t.Fatal(err)
		}
		written += len(part)
	}
	s.exec(t, fmt.Sprintf(`INSERT INTO orchestrator_run_artifacts (id, run_id, artifact_type, path, checksum, size_bytes)
		VALUES (gen_random_uuid(), '%s', 'build_log', 'build.log', '%s', %d)`, run, hex.EncodeToString(sum.Sum(nil)), size))
	output := filepath.Join(t.TempDir(), "run.zip")
	p := start(t, append(s.env(), "A_TOKEN=hunter2hunter2"), "runs", "export", run, "-o", output)
	// Not ru_maxrss of the ended process, which begins with that of this one.
	peak := make(chan int64)
	go func() {
		defer close(peak)
		status := fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid)
		most := int64(0)
		for {
			text, err := os.ReadFile(status)
			_, after, found := strings.Cut(string(text), "\nVmHWM:")
			if err != nil || !found { // ended
				peak <- most
				return
			}
			var now int64
			fmt.Sscan(after, &now)
			most = max(most, now)
			time.Sleep(5 * time.Millisecond)
		}
	}()
	if p.exit() != exitOK {
		t.Fatalf("exit %d: %s", p.code, p.stderr.String())
	}
	most := <-peak // in KiB
	t.Logf("at most %d MiB were in use", most>>10)
	if most == 0 || most > 100<<10 {
		t.Errorf("%d MiB were in use", most>>10)
	}
}
