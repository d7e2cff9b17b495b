package leaktest

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/internal/codextest"
	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/internal/githubtest"
)

// State is what a test has, and where the secrets in it may be.
type State struct {
	// Secrets are those to look for, by name.
	Secrets map[string]string
	// Files are files and folders that may have a secret, because the test has put it
	// there. All other files below the test's temporary directories are searched.
	Files []string
	// Database is the address of a database that belongs to the test; "" for none. All rows
	// of all its tables are searched.
	Database string
	// Broker is the address of a virtual host that belongs to the test; "" for none. All
	// messages that are left in its queues are searched.
	Broker string
	// GitHub may get the secrets with names in GitHubSecrets, in the header Authorization.
	// Nothing else of a request may have a secret.
	GitHub        *githubtest.Server
	GitHubSecrets []string
	// Model may get the secrets with names in ModelSecrets.
	Model        *codextest.Model
	ModelSecrets []string
	// Environments are the programs that may have a secret in their environment, by the
	// name of the secret.
	Environments map[string][]Program
}

// A Program is one that is started while a test runs.
type Program struct {
	// Name is the last part of its path.
	Name string
	// Children says that the programs that it starts may have what it may have.
	Children bool
}

// A Watch looks for secrets while a test runs, and at its end in everything that the test
// leaves. [Guard] makes one.
type Watch struct {
	t      testing.TB
	search *Search
	state  State

	mu       sync.Mutex
	leaks    []string
	observed map[string]bool // processes as a whole
	saw      map[string]bool // names of processes
	output   map[string]*bytes.Buffer
}

// Guard fails a test that has left a secret anywhere: in a file, a row, a message, a
// request or a text of the test, or in the arguments or the environment of a process.
//
// It looks before the cleanups that were registered earlier, and after those of later:
// call it when servers, databases and temporary directories have been made, and before
// workers are started.
func Guard(t testing.TB, state State) *Watch {
	t.Helper()
	w := &Watch{t: t, search: NewSearch(state.Secrets), state: state, observed: map[string]bool{}, saw: map[string]bool{}, output: map[string]*bytes.Buffer{}}
	for name, value := range state.Secrets {
		if found, _ := w.search.Find("it is " + value); found == "" {
			t.Fatalf("the search does not find the secret %s", name)
		}
	}
	root := filepath.Dir(t.TempDir())
	watchProcesses(w)
	t.Cleanup(func() {
		t.Helper()
		unwatchProcesses(w)
		w.folder(root)
		w.rows()
		w.messages()
		w.requests()
		w.mu.Lock()
		defer w.mu.Unlock()
		for name, text := range w.output {
			w.look(name, text.String())
		}
		for _, leak := range w.leaks {
			t.Error(leak)
		}
	})
	return w
}

// Text searches a text, such as an error.
func (w *Watch) Text(where, text string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.look(where, text)
}

// Error searches the text of an error, nil included, and returns the error.
func (w *Watch) Error(where string, err error) error {
	if err != nil {
		w.Text(where, fmt.Sprintf("%v\n%+v", err, err))
	}
	return err
}

// Output returns a writer for the output of a program or a logger. All of it is searched
// at the end of the test.
func (w *Watch) Output(name string) *Output { return &Output{w, name} }

// Output is a writer whose text a Watch searches.
type Output struct {
	watch *Watch
	name  string
}

// Write keeps the text.
func (o *Output) Write(text []byte) (int, error) {
	o.watch.mu.Lock()
	defer o.watch.mu.Unlock()
	buffer := o.watch.output[o.name]
	if buffer == nil {
		buffer = &bytes.Buffer{}
		o.watch.output[o.name] = buffer
	}
	return buffer.Write(text)
}

// Also changes where the Watch looks, for what the test has made later.
func (w *Watch) Also(change func(*State)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	change(&w.state)
}

// Allow adds files and folders that may have a secret, because the test has put it there.
func (w *Watch) Allow(paths ...string) {
	w.Also(func(state *State) { state.Files = append(state.Files, paths...) })
}

// look records a leak. The caller has the mutex.
func (w *Watch) look(where, text string) {
	if name, piece := w.search.Find(text); name != "" {
		w.leaks = append(w.leaks, fmt.Sprintf("%s has %q of the secret %s", where, piece, name))
	}
}

// without looks for the other secrets than those with these names.
func (w *Watch) without(where, text string, allowed []string) {
	name, piece := w.search.Find(text)
	if name == "" {
		return
	}
	others := map[string]string{}
	for name, value := range w.state.Secrets {
		if !slices.Contains(allowed, name) {
			others[name] = value
		}
	}
	if slices.Contains(allowed, name) {
		if name, piece = NewSearch(others).Find(text); name == "" {
			return
		}
	}
	w.leaks = append(w.leaks, fmt.Sprintf("%s has %q of the secret %s", where, piece, name))
}

// largest is the length of the pieces in which files are read. Few tests have larger ones.
const largest = 4 << 20

func (w *Watch) folder(root string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if slices.Contains(w.state.Files, path) {
			if entry.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		name, _ := filepath.Rel(root, path)
		w.look("the name of a file", name)
		switch {
		case entry.IsDir():
			if isRepository(path) {
				w.look("the repository "+name, objects(path))
			}
		case entry.Type()&fs.ModeSymlink != 0:
			target, err := os.Readlink(path)
			if err == nil {
				w.look("the link "+name, target)
			}
		case entry.Type().IsRegular():
			text, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			for ; len(text) > largest; text = text[largest-1024:] {
				w.look("the file "+name, string(text[:largest]))
			}
			w.look("the file "+name, string(text))
		}
		return nil
	})
	if err != nil {
		w.leaks = append(w.leaks, fmt.Sprintf("the files of the test cannot be searched: %v", err))
	}
}

// isRepository says that a directory has objects of git.
func isRepository(path string) bool {
	for _, name := range []string{"HEAD", "objects", "refs"} {
		if _, err := os.Stat(filepath.Join(path, name)); err != nil {
			return false
		}
	}
	return true
}

// objects are those of a repository, which files have only in compressed form.
func objects(path string) string {
	cmd := exec.Command("git", "cat-file", "--batch", "--batch-all-objects", "--unordered", "--buffer")
	cmd.Env = append(os.Environ(), "GIT_DIR="+path, "GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL=/dev/null")
	text, _ := cmd.Output() // tests break repositories on purpose
	return string(text)
}

func (w *Watch) rows() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.state.Database == "" {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	tables, err := rows(ctx, w.state.Database)
	if err != nil {
		w.leaks = append(w.leaks, fmt.Sprintf("the rows of the test cannot be searched: %v", err))
	}
	for table, text := range tables {
		w.look("table "+table, text)
	}
}

// rows are all rows of all tables, by table.
func rows(ctx context.Context, address string) (map[string]string, error) {
	database, err := pgx.Connect(ctx, address)
	if err != nil {
		return nil, err
	}
	defer database.Close(ctx)
	var query *string
	if err := database.QueryRow(ctx, `
		SELECT string_agg(format('SELECT %L, to_jsonb(t)::text FROM %I.%I t', schemaname || '.' || tablename, schemaname, tablename), ' UNION ALL ')
		FROM pg_tables WHERE schemaname NOT IN ('pg_catalog', 'information_schema')`).Scan(&query); err != nil || query == nil {
		return nil, err
	}
	found, err := database.Query(ctx, *query)
	if err != nil {
		return nil, err
	}
	tables := map[string]string{}
	var table, row string
	_, err = pgx.ForEachRow(found, []any{&table, &row}, func() error {
		tables[table] += row + "\n" + in16(row)[0] + "\n" // results are in binary columns
		return nil
	})
	return tables, err
}

func (w *Watch) messages() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.state.Broker == "" {
		return
	}
	queues, err := messages(w.state.Broker)
	if err != nil {
		w.leaks = append(w.leaks, fmt.Sprintf("the messages of the test cannot be searched: %v", err))
	}
	for queue, text := range queues {
		w.look("a message in queue "+queue, text)
	}
}

// messages takes all messages out of the queues of a virtual host.
func messages(address string) (map[string]string, error) {
	broker, err := url.Parse(address)
	if err != nil {
		return nil, err
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: time.Minute}
	response, err := client.Get(strings.TrimSuffix(os.Getenv(devenv.EnvBrokerAPI), "/") + "/api/queues" + broker.EscapedPath() + "?columns=name")
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	var list []struct{ Name string }
	if err := json.NewDecoder(response.Body).Decode(&list); err != nil {
		return nil, fmt.Errorf("the list of queues (%s): %w", response.Status, err)
	}
	conn, err := amqp.Dial(address)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	found := map[string]string{}
	for _, queue := range list {
		channel, err := conn.Channel()
		if err != nil {
			return nil, err
		}
		for {
			message, ok, err := channel.Get(queue.Name, true)
			if err != nil || !ok { // a queue that is exclusive, or gone
				break
			}
			found[queue.Name] += fmt.Sprintf("%v %s\n", message.Headers, message.Body)
		}
		_ = channel.Close()
	}
	return found, nil
}

func (w *Watch) requests() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.state.GitHub != nil {
		for _, r := range w.state.GitHub.Requests("") {
			var header strings.Builder
			for name, values := range r.Header {
				if name == "Authorization" {
					for _, value := range values {
						w.without("the header Authorization of a request to GitHub", value, w.state.GitHubSecrets)
					}
					continue
				}
				fmt.Fprintf(&header, "%s: %s\n", name, values)
			}
			w.look("the request "+r.Method+" "+r.Path+" to GitHub", r.Path+"\n"+header.String()+string(r.Body))
		}
	}
	if w.state.Model != nil {
		for _, r := range w.state.Model.Requests() {
			w.without("a request to the model", r.Path+"\n"+r.Key+"\n"+r.Body, w.state.ModelSecrets)
		}
	}
}
