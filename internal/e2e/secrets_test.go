package e2e

import (
	"archive/zip"
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/internal/leaktest"
	"github.com/moonladderstudios/mm-orchestrator/internal/sample"
)

// A leakStack is a stack whose environment, files and plans are full of secrets.
type leakStack struct {
	*stack
	search *leaktest.Search
	// printed is a file with all spellings of all secrets.
	printed string
	health  *httptest.Server
	statsd  *lockedBuffer
	events  <-chan amqp.Delivery
}

// Secrets that are placed in one spelling only, because they stand in addresses,
// in names of files and in command lines.
const (
	urlPassword   = `Ge@heim/88 w7Kq`
	inArgument    = "tok_Zr5uTq8LmW2xNv4B"
	inFileName    = "tok_8hYw3Kp6Jd9RsC1e"
	inWorkspace   = "tok_Qm7nXc5Vb2ZaL0pK"
	inSecretFile  = "tok_Lk4jHg8Fd3SaP6oI"
	inRedactFile  = "tok_Uy2tRe9Wq5MnB7vC"
	inNamedValue  = "tok_Xs6dCf4Vg1BhN8jM"
	inPolicyNamed = "tok_Az3sXd7Cf5VgB9hN"
	inDatabase    = "tok_Po5iUy8Tr2EwQ4lK"
	inBroker      = "tok_Jh9gFd6Sa3ZxC7vB"
	inCompose     = "tok_Wd4rGy7Uj0KmPn2q"
)

func newLeakStack(t *testing.T) *leakStack {
	t.Helper()
	secrets := leaktest.Secrets()
	var environment []string
	for name, secret := range secrets {
		environment = append(environment, name+"="+secret)
	}
	maps.Copy(secrets, map[string]string{
		"password in a URL": urlPassword, "argument": inArgument, "name of a file": inFileName, ".env": inWorkspace, "_FILE": inSecretFile,
		"MM_ORCHESTRATOR_REDACT_FILES": inRedactFile, "MM_ORCHESTRATOR_REDACT_NAMES": inNamedValue, "policy file": inPolicyNamed,
		"database": inDatabase, "broker": inBroker, "compose file": inCompose,
	})

	folder := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(folder, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	random := rand.New(rand.NewPCG(9, 3))
	var printed strings.Builder
	for _, name := range slices.Sorted(maps.Keys(secrets)) {
		for _, form := range leaktest.Spell(secrets[name], random) {
			for _, context := range [][2]string{{"", ""}, {name + "=\"\x1b[1m", "\x1b[0m\""}} {
				printed.WriteString(context[0] + form.Text + context[1] + "\n")
			}
		}
		printed.WriteString(secrets[name] + secrets[name] + "\n") // overlapping ends
	}

	l := &leakStack{search: leaktest.NewSearch(secrets), printed: file("printed", printed.String())}
	l.health = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Secret", inArgument)
		if r.URL.Path == "/bad" {
			w.WriteHeader(http.StatusInternalServerError)
		}
		_, _ = io.WriteString(w, printed.String())
	}))
	t.Cleanup(l.health.Close)
	statsdPort := ""
	statsdPort, l.statsd = receiveStatsD(t)
	ports, err := devenv.FreePorts(1)
	if err != nil {
		t.Fatal(err)
	}
	environment = append(environment,
		"DEPLOY_PIN="+inNamedValue, "MM_ORCHESTRATOR_REDACT_NAMES=DEPLOY_P*",
		"ROLLOUT_CODE="+inPolicyNamed, "MM_ORCHESTRATOR_PROFILES="+file("profiles.yaml", "redaction:\n  add: [ROLLOUT_CODE]\nservices:\n  api:\n    overrides:\n      - reason: the login "+inPolicyNamed+" is new\n        verify: {quietPeriod: 1s}\n"),
		"DEPLOY_TOKEN_FILE="+file("token", inSecretFile+"\n"), "MM_ORCHESTRATOR_REDACT_FILES="+file("more", "# tokens\nX="+inRedactFile+"\n"),
		"SERVICE_URL=https://deploy:"+url.QueryEscape(urlPassword)+"@registry.example/v2/",
		"ARGUMENT_TOKEN="+inArgument, "FILE_TOKEN="+inFileName, "DATABASE_TOKEN="+inDatabase, "BROKER_TOKEN="+inBroker,
		"MM_ORCHESTRATOR_LISTEN=127.0.0.1:"+fmt.Sprint(ports[0]), "ORCHESTRATOR_STATSD_HOST=127.0.0.1", "ORCHESTRATOR_STATSD_PORT="+statsdPort,
		"MM_ORCHESTRATOR_LOG_LEVEL=debug", "MM_ORCHESTRATOR_AUDIT_DIR="+filepath.Join(folder, "trails"),
	)
	l.stack = newStack(t, stackConfig{Project: true, Healthy: true, NoWorker: true, Environment: environment})
	for name, text := range map[string]string{
		".env":                 read(t, filepath.Join(l.workspace, ".env")) + "WORKSPACE_TOKEN=" + inWorkspace + "\n",
		"secrets/registry.txt": inCompose + "\n",
		"docker-compose.yaml":  read(t, filepath.Join(l.workspace, "docker-compose.yaml")) + "secrets:\n  registry: {file: ./secrets/registry.txt}\n",
	} {
		path := filepath.Join(l.workspace, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	git(t, l.workspace, "add", "--force", ".")
	git(t, l.workspace, "-c", "user.name=e2e", "-c", "user.email=e2e@localhost", "commit", "--quiet", "--message", "settings")
	git(t, l.workspace, "checkout", "--quiet", "-b", "deploy/"+inFileName)
	l.events = l.captureEvents()
	l.startWorker()
	return l
}

// receiveStatsD receives metrics, one line per datagram.
func receiveStatsD(t *testing.T) (port string, lines *lockedBuffer) {
	t.Helper()
	datagrams, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	lines = &lockedBuffer{}
	received := make(chan struct{})
	go func() {
		defer close(received)
		packet := make([]byte, 64<<10)
		for {
			n, _, err := datagrams.ReadFrom(packet)
			if err != nil {
				return
			}
			_, _ = lines.Write(append(packet[:n:n], '\n'))
		}
	}()
	t.Cleanup(func() { _ = datagrams.Close(); <-received })
	_, port, _ = net.SplitHostPort(datagrams.LocalAddr().String())
	return port, lines
}

// captureEvents receives what the worker publishes for monitors of Celery.
func (l *leakStack) captureEvents() <-chan amqp.Delivery {
	t := l.t
	t.Helper()
	conn, err := amqp.Dial(l.broker)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	channel, err := conn.Channel()
	if err != nil {
		t.Fatal(err)
	}
	queue, err := channel.QueueDeclare("", false, true, true, false, nil)
	if err != nil {
		t.Fatal(err)
	}
	deliveries, err := channel.Consume(queue.Name, "", true, true, false, false, nil)
	if err := errors.Join(err, channel.ExchangeDeclare("celeryev", "topic", true, false, false, false, nil), channel.QueueBind(queue.Name, "#", "celeryev", false, nil)); err != nil {
		t.Fatal(err)
	}
	return deliveries
}

// absent fails the test if a text has a piece of a secret.
func (l *leakStack) absent(where, text string) {
	l.t.Helper()
	if name, piece := l.search.Find(text); name != "" {
		at := strings.Index(text, piece)
		l.t.Errorf("%s has %q of the secret %q: %q", where, piece, name, text[max(0, at-60):min(len(text), max(0, at)+60)])
	}
}

// print runs a command of the program and searches what it prints.
func (l *leakStack) print(args ...string) string {
	l.t.Helper()
	command := l.command(args...)
	text, err := command.CombinedOutput()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		l.t.Fatal(err)
	}
	l.absent(fmt.Sprintf("mm-orchestrator %.60q", args), string(text))
	return string(text)
}

// endpoints searches the answers of the worker's HTTP server.
func (l *leakStack) endpoints() {
	l.t.Helper()
	address := ""
	for _, variable := range l.environment {
		if value, found := strings.CutPrefix(variable, "MM_ORCHESTRATOR_LISTEN=127"); found {
			address = "127" + value
		}
	}
	for _, path := range []string{"/healthz", "/readyz", "/metrics", "/" + inArgument} {
		response, err := http.Get("http://" + address + path)
		if err != nil {
			l.t.Errorf("%s: %v", path, err)
			continue
		}
		body, _ := io.ReadAll(response.Body)
		_ = response.Body.Close()
		if strings.HasPrefix(path, "/metrics") && !bytes.Contains(body, []byte("mm_orchestrator_")) {
			l.t.Errorf("/metrics answers %.100q", body)
		}
		l.absent("the answer to "+path, fmt.Sprint(response.Header)+string(body))
	}
}

// tables searches every table but the plans, which their producer has written.
func (l *leakStack) tables() {
	l.t.Helper()
	for _, table := range l.mustRows(`SELECT jsonb_build_object('name', format('%I.%I', table_schema, table_name), 'columns', (
			SELECT string_agg(format(CASE data_type WHEN 'bytea' THEN 'encode(%I, ''escape'')' ELSE '%I::text' END, column_name), ', ')
			FROM information_schema.columns c WHERE (c.table_schema, c.table_name) = (t.table_schema, t.table_name)))
		FROM information_schema.tables t WHERE table_schema NOT IN ('pg_catalog', 'information_schema')`) {
		name := table["name"].(string)
		if strings.HasSuffix(name, ".orchestrator_action_plans") {
			continue
		}
		rows, err := l.conn.Query(l.t.Context(), `SELECT concat_ws(E'\n', `+table["columns"].(string)+`) FROM `+name)
		if err != nil {
			l.t.Fatal(err)
		}
		texts, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			l.t.Fatal(err)
		}
		l.absent("table "+name, strings.Join(texts, "\n"))
	}
}

// folder searches all files below a folder, and their names.
func (l *leakStack) folder(dir string) {
	l.t.Helper()
	files := 0
	err := filepath.WalkDir(dir, func(path string, entry os.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		files++
		text, err := os.ReadFile(path)
		name, _ := filepath.Rel(dir, path)
		l.absent("file "+name, name+"\n"+string(text))
		return err
	})
	if err != nil || files == 0 {
		l.t.Errorf("%d files in %s: %v", files, dir, err)
	}
}

// archive searches what `runs export` writes.
func (l *leakStack) archive(run string) {
	l.t.Helper()
	path := filepath.Join(l.t.TempDir(), "run.zip")
	l.print("runs", "export", run, "--output", path)
	archive, err := zip.OpenReader(path)
	if err != nil {
		l.t.Fatal(err)
	}
	defer archive.Close()
	for _, file := range archive.File {
		reader, err := file.Open()
		if err != nil {
			l.t.Fatal(err)
		}
		text, err := io.ReadAll(reader)
		if err != nil {
			l.t.Fatal(err)
		}
		l.absent("exported "+file.Name, file.Name+"\n"+file.Comment+"\n"+string(text))
	}
}

// A run may print any secret in any form and fail anywhere: no form of any secret must be
// in anything that the worker and its commands write or answer.
func TestNoSecretLeavesTheWorker(t *testing.T) {
	t.Parallel()
	l := newLeakStack(t)
	good, bad := l.health.URL+"/good", strings.Replace(l.health.URL, "://", "://probe:"+url.QueryEscape(urlPassword)+"@", 1)+"/bad?token="+inArgument
	prints := func(code int) []string {
		return []string{"leak", l.printed, fmt.Sprint(code), inArgument, url.PathEscape(urlPassword), "--password=" + inNamedValue}
	}
	quick := []string{set("verify.healthcheck.timeoutSeconds", 1), set("verify.healthcheck.intervalSeconds", 0.2)}
	fine := append([]string{set("build.command", prints(0)), set("restart.command", prints(0)), set("verify.healthcheck.url", good),
		set("rollback.strategies", []any{map[string]any{"type": "rebuild", "commands": []any{prints(0)}}})}, quick...)
	with := func(more ...string) []string { return append(slices.Clone(fine), more...) }
	secretFile := filepath.Join(l.workspace, "api_service", "requirements-"+inFileName+".txt")
	write := func(path, text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	var runs []string
	try := func(name, status string, args []string) submission {
		t.Helper()
		run := l.submit(newest, args...)
		runs = append(runs, run.RunID)
		if row := l.awaitRun(run.RunID); row["status"] != status {
			t.Errorf("%s: the run is %s, want %s: %.2000s", name, row["status"], status, show(l.states(run.RunID)))
		}
		l.endpoints()
		return run
	}

	try("all prints", "succeeded", fine)
	try("analyze fails", "rolled_back", with(set("analyze.logArtifact", "/nothing/"+inFileName)))
	try("patch fails", "rolled_back", with(set("patch.commands", []any{[]string{"git", "status", inFileName}, []string{"git", "rev-parse", "--verify", inArgument}})))
	build := try("build fails", "rolled_back", with(set("build.command", prints(3))))
	try("restart fails", "rolled_back", with(set("restart.command", prints(4))))
	try("verify gets an error", "rolled_back", with(set("verify.healthcheck.url", bad)))
	for _, address := range []string{"http://probe:" + urlPassword + "@127.0.0.1:1/x?key=" + inArgument, "://" + inArgument} {
		try("verify cannot reach "+address, "rolled_back", with(set("verify.healthcheck.url", address)))
	}
	for _, command := range [][]string{{"git", "-c", "alias.x=!echo " + inArgument, "x"}, {"/nothing/" + inArgument}, {"docker", "build", "--build-arg", inArgument, "/" + inFileName}, {"git", "rev-parse", "--verify", inArgument + "\n" + inFileName}} {
		try(fmt.Sprintf("build with %q", command), "rolled_back", with(set("build.command", command)))
	}

	// Secrets in files, and in their names.
	write(secretFile, "# "+inArgument+"\n"+read(t, l.printed))
	try("secrets in a patch", "rolled_back", with(set("build.command", prints(1))))
	write(filepath.Join(l.workspace, "notes-"+inFileName+".md"), inArgument)
	try("a file that may not be changed", "rolled_back", fine)
	_ = os.Remove(filepath.Join(l.workspace, "notes-"+inFileName+".md"))
	_ = os.Remove(secretFile)

	// The real engine.
	if err := l.project.Append(sample.Requirements, "# "+inArgument); err != nil {
		t.Fatal(err)
	}
	engine := append(slices.Clone(quick), set("verify.healthcheck.timeoutSeconds", 30))
	deployed := l.submit(newest, engine...)
	runs = append(runs, deployed.RunID)
	if row := l.awaitRun(deployed.RunID); row["status"] != "succeeded" {
		t.Errorf("the run with docker is %s: %.2000s", row["status"], show(l.states(deployed.RunID)))
	}
	if err := l.project.Append("api_service/Dockerfile", "COPY "+inFileName+" /x\n# "+inArgument); err != nil {
		t.Fatal(err)
	}
	broken := l.submit(newest, engine...)
	runs = append(runs, broken.RunID)
	l.awaitRun(broken.RunID)

	// The same run again, and messages that are none. Names and arguments stay as the producer
	// has sent them, as in every result of Celery.
	var retry submission
	l.python(newest, "retry_run.py", &retry, build.RunID, "--from-step", "build")
	l.await("the retried run to end", func() (bool, error) {
		rows, err := l.rows(`SELECT to_jsonb(s) FROM spec_workflow_task_states s WHERE orchestrator_run_id = $1 AND plan_step = 'rollback' AND attempt = 2 AND plan_step_status::text IN ('succeeded', 'failed')`, build.RunID)
		return len(rows) > 0, err
	})
	for _, body := range []string{"{" + inArgument, `[["x", "build"], {"x": "y"}, {}]`, `[[], {"run_id": "x"}, "` + inArgument + `"]`} {
		l.send(amqp.Publishing{ContentType: "application/json", ContentEncoding: "utf-8", Body: []byte(body),
			Headers: amqp.Table{"task": "moonmind.workflows.orchestrator.tasks.execute_plan_step", "id": "7f1c2f0e-0000-4000-8000-000000000002", "root_id": inFileName, "origin": "gen@" + inArgument}})
	}
	l.send(amqp.Publishing{ContentType: "application/json", ContentEncoding: "utf-8", Body: []byte("[[], {}, {}]"), Headers: amqp.Table{"task": "task.unknown", "origin": "gen@" + inArgument, "id": "7f1c2f0e-0000-4000-8000-000000000001"}})

	// By hand.
	l.print("pause", "--reason", "the key "+inArgument+" is exchanged, see "+urlPassword)
	l.endpoints()
	l.print("runs")
	l.print("resume")
	for _, run := range append(slices.Clone(runs[len(runs)-4:]), runs[0], build.RunID) {
		for _, args := range [][]string{{"runs", run}, {"runs", run, "--json"}, {"audit", "show", run}, {"audit", "show", run, "--json"}, {"audit", "verify", run}, {"changes", run}, {"runs", "set-aside", run}, {"runs", "approve", run}} {
			l.print(args...)
		}
		l.archive(run)
	}
	l.print("runs", "rollback", deployed.RunID)
	l.print("runs", "set-aside", "restore", deployed.RunID)
	for _, args := range [][]string{
		{"runs"}, {"runs", "--json"}, {"runs", "set-aside"}, {"changes"}, {"changes", "--json"}, {"parked"}, {"doctor"}, {"doctor", "--json"}, {"policy", "show"}, {"policy", "show", "api", "--json"},
		{"policy", "check"}, {"policy", "check", "--json"}, {"config"}, {"config", "--json"}, {"health"}, {"migrate", "--dry-run"}, {"runs", inArgument}, {"runs", "revoke", runs[0]},
		{"policy", "show", inArgument}, {"policy", "check", "/nothing/" + inFileName}, {"audit", "show", inArgument}, {"help", inArgument}, {inArgument}, {"--" + inArgument + "=x"},
		{"runs", "--database-url=postgres://x:" + url.QueryEscape(inDatabase) + "@127.0.0.1:1/x"}, {"worker", "--broker-url=amqp://x:" + inBroker + "@127.0.0.1:1//" + inBroker, "--wait=0"},
	} {
		l.print(args...)
	}

	l.barrier()
	l.endpoints()
	l.requireEmptyQueue()
	l.absent("the worker's log", l.worker.log())
	l.tables()
	l.folder(l.artifacts)
	for _, run := range runs {
		for id, result := range l.read(newest, l.taskIDs(run)...) {
			l.absent("the result of "+id+" as Celery reads it", fmt.Sprintf("%s %s %s %+v %s %v %s", result.State, result.Result, result.Stored, result.Get.Raised, result.Traceback, result.Kwargs, result.Args))
		}
	}
	if l.statsd.String() == "" {
		t.Error("no metrics came over StatsD")
	}
	l.absent("StatsD", l.statsd.String())
	var events strings.Builder
	for more := true; more; {
		select {
		case delivery := <-l.events:
			fmt.Fprintf(&events, "%v %s %s\n", delivery.Headers, delivery.RoutingKey, delivery.Body)
		default:
			more = false
		}
	}
	l.absent("events", events.String())
	references := git(t, l.workspace, "for-each-ref", "--format=%(refname) %(contents) %(authorname) %(authoremail)")
	if !strings.Contains(references, "refs/mm-orchestrator/") {
		t.Errorf("no reference of a run: %s", references)
	}
	l.absent("git's references", strings.ReplaceAll(references, "refs/heads/deploy/"+inFileName, ""))
	for _, variable := range l.environment {
		if folder, found := strings.CutPrefix(variable, "MM_ORCHESTRATOR_AUDIT_DIR="); found {
			l.folder(folder)
		}
	}
	containers, err := exec.CommandContext(t.Context(), "docker", "ps", "--all", "--no-trunc", "--format", "{{.Names}} {{.Labels}} {{.Image}} {{.Command}}").Output()
	if err != nil {
		t.Error(err)
	}
	images, err := exec.CommandContext(t.Context(), "docker", "images", "--no-trunc", "--format", "{{.Repository}} {{.Tag}}").Output()
	if err != nil {
		t.Error(err)
	}
	l.absent("the engine", string(containers)+string(images))
}

// taskIDs are the ids of all tasks of a run.
func (l *leakStack) taskIDs(run string) (ids []string) {
	l.t.Helper()
	for _, row := range l.taskmeta(run) {
		ids = append(ids, row["task_id"].(string))
	}
	return ids
}
