package leaktest_test

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	amqp "github.com/rabbitmq/amqp091-go"
	"go.uber.org/goleak"

	"github.com/moonladderstudios/mm-orchestrator/internal/codextest"
	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/internal/githubtest"
	"github.com/moonladderstudios/mm-orchestrator/internal/leaktest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// watched is a test that a Watch looks at.
type watched struct {
	testing.TB
	dir      string
	cleanups []func()
	errors   []string
}

func (w *watched) TempDir() string   { return filepath.Join(w.dir, "001") }
func (w *watched) Cleanup(f func())  { w.cleanups = append(w.cleanups, f) }
func (w *watched) Error(args ...any) { w.errors = append(w.errors, fmt.Sprint(args...)) }

// stand is what a test has. The token and the key are its own: all tests of a package look
// at the processes of all of them, and some let a process have a secret that it must not
// have.
type stand struct {
	*testing.T
	token, key            string
	dir, database, broker string
	github                *githubtest.Server
	model                 *codextest.Model
	watch                 *leaktest.Watch
}

func (s *stand) must(err error) {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
}

// in64 is the token as Git puts it into a header.
func (s *stand) in64() string {
	return base64.StdEncoding.EncodeToString([]byte("x-access-token:" + s.token))
}

// sleep runs a program for as long as it takes to be seen.
func (s *stand) sleep(name string, environment []string, arguments ...string) {
	s.Helper()
	program := filepath.Join(s.TempDir(), name) // not below the directory that is searched
	s.must(os.WriteFile(program, []byte("#!/bin/sh\nread line\n"), 0o755))
	id := rand.Text() // other tests have processes of the same name
	cmd := exec.Command("/bin/sh", append([]string{program, id}, arguments...)...)
	cmd.Env = environment
	input, err := cmd.StdinPipe()
	s.must(err)
	s.must(cmd.Start())
	deadline := time.Now().Add(time.Minute)
	for !s.watch.Saw(id) {
		if time.Now().After(deadline) {
			s.Fatal("the process was not seen")
		}
		time.Sleep(time.Millisecond)
	}
	s.must(input.Close())
	_ = cmd.Wait() // read has failed
}

func (s *stand) request(method, path string, header http.Header, body string) {
	s.Helper()
	client, err := s.github.Client()
	s.must(err)
	defer client.CloseIdleConnections()
	r, err := http.NewRequestWithContext(s.Context(), method, s.github.URL+path, strings.NewReader(body))
	s.must(err)
	r.Header = header
	response, err := client.Do(r)
	s.must(err)
	response.Body.Close()
}

// A token is found wherever it may be left, and nowhere else.
func TestAWatchFindsASecretInEveryPlace(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		// leave leaves the token somewhere.
		leave func(s *stand)
		// want is a part of what is said; "" if it is no leak.
		want string
	}{
		"nothing": {func(*stand) {}, ""},
		"file":    {func(s *stand) { s.must(os.WriteFile(filepath.Join(s.dir, "001", "log"), []byte(s.in64()), 0o600)) }, "the file 001/log"},
		"file that is allowed": {func(s *stand) {
			path := filepath.Join(s.dir, "002")
			s.watch.Allow(path)
			s.must(os.WriteFile(path, []byte(s.token), 0o600))
		}, ""},
		"large file": {func(s *stand) {
			s.must(os.WriteFile(filepath.Join(s.dir, "001", "log"), []byte(strings.Repeat(" ", 4<<20-20)+s.token), 0o600))
		}, "the file 001/log"},
		"name of a file": {func(s *stand) { s.must(os.Mkdir(filepath.Join(s.dir, "001", s.token), 0o700)) }, "the name of a file"},
		"link":           {func(s *stand) { s.must(os.Symlink("/"+s.token, filepath.Join(s.dir, "001", "link"))) }, "the link 001/link"},
		"address of a remote": {func(s *stand) {
			s.must(exec.Command("git", "init", "-q", s.dir+"/001/clone").Run())
			s.must(exec.Command("git", "-C", s.dir+"/001/clone", "remote", "add", "origin", "https://x-access-token:"+s.token+"@github.com/octo/widgets").Run())
		}, "the file 001/clone/.git/config"},
		"commit": {func(s *stand) {
			s.must(s.github.AddRepository(s.Context(), "octo/widgets", map[string]string{"README": "with " + s.in64() + "\n"}))
		}, "the repository 001/github/repositories/octo/widgets.git"},
		"row": {func(s *stand) {
			database, err := pgx.Connect(s.Context(), s.database)
			s.must(err)
			defer database.Close(context.Background())
			_, err = database.Exec(s.Context(), `CREATE SCHEMA other; CREATE TABLE other.results (result bytea); CREATE TABLE empty (a int)`)
			s.must(err)
			_, err = database.Exec(s.Context(), `INSERT INTO other.results VALUES ($1)`, []byte("error: "+s.in64()))
			s.must(err)
		}, "table other.results"},
		"message": {func(s *stand) {
			conn, err := amqp.Dial(s.broker)
			s.must(err)
			defer conn.Close()
			channel, err := conn.Channel()
			s.must(err)
			_, err = channel.QueueDeclare("codex-0", true, false, false, false, nil)
			s.must(err)
			s.must(channel.Confirm(false))
			confirmed, err := channel.PublishWithDeferredConfirm("", "codex-0", false, false, amqp.Publishing{Headers: amqp.Table{"x": s.token}})
			s.must(err)
			confirmed.Wait()
		}, "a message in queue codex-0"},
		"header Authorization": {func(s *stand) {
			s.request("GET", "/api/v3/user", http.Header{"Authorization": {"Bearer " + s.token}}, "")
			s.request("GET", "/octo/widgets.git/info/refs", http.Header{"Authorization": {"Basic " + s.in64()}}, "")
		}, ""},
		"key for GitHub": {func(s *stand) {
			s.request("GET", "/api/v3/user", http.Header{"Authorization": {"Bearer " + s.key}}, "")
		}, "Authorization"},
		"other header":    {func(s *stand) { s.request("GET", "/api/v3/user", http.Header{"X": {s.token}}, "") }, "to GitHub"},
		"query":           {func(s *stand) { s.request("GET", "/api/v3/user?access_token="+s.token, nil, "") }, "to GitHub"},
		"body":            {func(s *stand) { s.request("POST", "/api/v3/user", nil, `{"body":"`+s.in64()+`"}`) }, "to GitHub"},
		"token for model": {func(s *stand) { s.ask("with " + s.token) }, "a request to the model"},
		"key for model":   {func(s *stand) { s.ask("with " + s.key) }, ""},
		"argument":        {func(s *stand) { s.sleep("git", nil, "clone", "https://x:"+s.token+"@github.com") }, "an argument of sh git"},
		"key in argument": {func(s *stand) { s.sleep("codex", nil, "exec", s.key) }, "an argument of sh codex"},
		"environment":     {func(s *stand) { s.sleep("codex", []string{"GITHUB_TOKEN=" + s.token}) }, "the environment of sh codex"},
		"key for codex":   {func(s *stand) { s.sleep("codex", []string{"CODEX_API_KEY=" + s.key}) }, ""},
		"key for git":     {func(s *stand) { s.sleep("git", []string{"CODEX_API_KEY=" + s.key}) }, "the environment of sh git"},
		"error": {func(s *stand) {
			if s.watch.Error("the error", errors.New("push: "+s.in64())) == nil {
				s.Fatal("no error")
			}
		}, "the error"},
		"log": {func(s *stand) {
			for _, half := range []string{s.token[:20], s.token[20:]} {
				fmt.Fprint(s.watch.Output("the log"), half)
			}
		}, "the log"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := &watched{TB: t, dir: t.TempDir()}
			s := &stand{T: t, token: "ghp_" + rand.Text(), key: "sk-proj-" + rand.Text(), dir: w.dir, database: devenv.Database(t), broker: devenv.Broker(t)}
			s.must(os.MkdirAll(filepath.Join(w.TempDir(), "github"), 0o700))
			var err error
			s.github, err = githubtest.Start(filepath.Join(w.TempDir(), "github"))
			s.must(err)
			defer s.github.Close()
			s.model, err = codextest.StartModel(codextest.Always(codextest.None))
			s.must(err)
			defer s.model.Close()
			s.watch = leaktest.Guard(w, leaktest.State{
				Secrets: map[string]string{"token": s.token, "key": s.key}, Database: s.database, Broker: s.broker,
				GitHub: s.github, GitHubSecrets: []string{"token"}, Model: s.model, ModelSecrets: []string{"key"},
				Environments: map[string][]leaktest.Program{"key": {{Name: "codex", Children: true}}},
			})
			c.leave(s)
			for _, cleanup := range slices.Backward(w.cleanups) {
				cleanup()
			}
			switch {
			case c.want == "" && len(w.errors) > 0:
				t.Errorf("found %q", w.errors)
			case c.want != "" && (len(w.errors) == 0 || !strings.Contains(strings.Join(w.errors, "\n"), c.want)):
				t.Errorf("found %q, want %q", w.errors, c.want)
			}
		})
	}
}

func (s *stand) ask(prompt string) {
	s.Helper()
	body := `{"input":[{"role":"user","content":[{"text":"` + prompt + `"}]}]}`
	response, err := http.Post(s.model.URL()+"/responses", "application/json", strings.NewReader(body))
	s.must(err)
	response.Body.Close()
	http.DefaultClient.CloseIdleConnections()
}
