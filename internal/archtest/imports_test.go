package archtest

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go/ast"
	"go/parser"
	"go/token"
)

const module = "github.com/moonladderstudios/mm-orchestrator"

// goPackage is a package in the output of `go list -json`.
type goPackage struct {
	ImportPath   string
	Dir          string
	Doc          string
	GoFiles      []string
	TestGoFiles  []string
	XTestGoFiles []string
	Imports      []string
	Deps         []string
}

func (p goPackage) name() string {
	return strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, module), "/")
}

func list(t *testing.T) []goPackage {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "list", "-json=ImportPath,Dir,Doc,GoFiles,TestGoFiles,XTestGoFiles,Imports,Deps", "./...")
	cmd.Dir = filepath.Join("..", "..")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v: %s", err, stderr.String())
	}
	var packages []goPackage
	decoder := json.NewDecoder(bytes.NewReader(out))
	for {
		var p goPackage
		err := decoder.Decode(&p)
		if errors.Is(err, io.EOF) {
			return packages
		}
		if err != nil {
			t.Fatal(err)
		}
		packages = append(packages, p)
	}
}

// within reports whether path is one of the folders or below one. A folder that
// begins with a host name is in another module, others are in this one.
func within(path string, folders ...string) bool {
	return slices.ContainsFunc(folders, func(folder string) bool {
		return path == folder || strings.HasPrefix(path, folder+"/")
	})
}

// shared are the packages of this module that every package may import. They
// contain no domain logic and import no other package of this module.
var shared = []string{"internal/secret", "internal/address", "internal/faultpoint", "internal/stall", "internal/timeout", "internal/excerpt", "internal/disklimit", "audit"}

// Packages of other modules, grouped by purpose.
var (
	amqp   = []string{"github.com/rabbitmq/amqp091-go"}
	sql    = []string{"database/sql", "github.com/jackc/pgx"}
	docker = []string{"github.com/moby/moby", "github.com/docker"}
)

func join(lists ...[]string) []string { return slices.Concat(lists...) }

// rule says what the packages in a folder may import. Test files are exempt.
type rule struct {
	folder string
	// ours lists the folders of this module that may be imported.
	ours []string
	// never lists packages of other modules that must not be imported, neither
	// directly nor through other packages.
	never []string
	why   string
}

// The direction of imports: cmd → api, tasks → store, change, compose, artifacts, worker
// → protocol. The first rule whose folder matches applies.
var rules = []rule{
	{folder: "audit", never: join(amqp, sql, docker, []string{"os/exec", "net/http"}),
		why: "audit defines and checks records: whoever has a trail can check it, wherever it is kept"},
	{folder: "protocol", never: join(amqp, sql, docker), // the decoder for Brotli itself links net/http
		why: "protocol converts bytes: reading and testing it needs neither a server nor another package of this project"},
	{folder: "compose", never: join(amqp, sql),
		why: "compose is usable without this project's runs, queues and tables"},
	{folder: "artifacts", never: join(amqp, sql, docker),
		why: "artifacts writes files: a run's state and its commands belong to tasks"},
	{folder: "metrics", never: join(amqp, docker), // the Prometheus client itself links database/sql
		why: "metrics exposes counts: the packages that count call it"},
	{folder: "results/postgres", ours: []string{"results", "protocol", "internal/database"}, never: join(amqp, docker),
		why: "results/postgres contains the SQL of Celery's tables: any program may use it, without a broker and without runs"},
	{folder: "results", ours: []string{"protocol"}, never: join(amqp, sql, docker),
		why: "results says what a backend is: each backend is a package of its own, so that a program links only the one that it uses"},
	{folder: "client", ours: []string{"worker", "results", "protocol"}, never: join(sql, docker),
		why: "client is a library for any tasks: it shares routes and connections with worker, and reads results through results.Backend"},
	{folder: "worker/internal/wire", never: join(amqp, sql, docker),
		why: "wire rewrites bytes: whoever uses amqp091-go puts it under that library"},
	{folder: "worker/internal/runners", ours: []string{}, never: join(amqp, sql, docker, []string{"net"}),
		why: "runners reuses goroutines for any work"},
	{folder: "worker/broker/amqp", ours: []string{"worker/broker", "worker/internal/runners", "worker/internal/wire", "protocol"}, never: join(sql, docker),
		why: "broker/amqp is one of several brokers: it knows neither deliveries' states nor tasks, which are worker's"},
	{folder: "worker/broker", ours: []string{"protocol"}, never: join(amqp, sql, docker),
		why: "broker says what a worker needs of any broker: an implementation imports it, not the other way round"},
	{folder: "worker/workertest", ours: []string{"worker", "client", "results", "protocol"}, never: join(sql, docker),
		why: "workertest runs the handlers of any user of the worker library"},
	{folder: "worker", ours: []string{"results", "protocol"}, never: join(sql, docker),
		why: "worker is a library for any tasks: results go through results.Backend, the domain through Handler"},
	{folder: "store/storetest", ours: []string{"store", "protocol", "internal/devenv"}, never: join(amqp, docker),
		why: "storetest is for tests of the tables only, on a database that devenv provides"},
	{folder: "store", ours: []string{"store", "results", "protocol", "internal/database"}, never: join(amqp, docker),
		why: "store contains the SQL of runs and nothing else: Celery's tables are those of results/postgres, and the engine and the tables need not know each other"},
	{folder: "change", ours: []string{"change", "compose"}, never: join(amqp, sql),
		why: "change compares and restores: steps decide when, and store records it"},
	{folder: "policy/programs", never: join(amqp, sql, docker, []string{"os/exec"}),
		why: "programs decides about command lines and starts none: its rules are tested without git and docker"},
	{folder: "policy", ours: []string{"policy"}, never: join(amqp, sql, docker, []string{"net/http", "os/exec"}),
		why: "policy reads one file and says what is allowed: steps apply it, and an operator checks it without servers"},
	{folder: "credential", ours: []string{"tasks/processes"}, never: join(amqp, sql, docker, []string{"net/http"}),
		why: "credential reads what an operator has put somewhere: what it is good for is asked elsewhere"},
	{folder: "codex", ours: []string{"tasks/processes", "credential"}, never: join(amqp, sql, docker, []string{"net/http"}),
		why: "codex runs a program and says how it has ended: what that means for a run is decided in tasks"},
	{folder: "gitrepo", never: join(amqp, sql, docker, []string{"net/http"}),
		why: "gitrepo runs git on one clone: what is changed there, and what becomes of it, is decided elsewhere"},
	{folder: "github", never: join(amqp, sql, docker, []string{"os/exec"}),
		why: "github sends requests: what is published, and by which credential, is decided elsewhere"},
	{folder: "tasks", ours: []string{"tasks", "policy", "store", "change", "compose", "artifacts", "metrics", "worker", "protocol", "credential", "codex", "gitrepo", "github"}, never: nil,
		why: "tasks combine store, compose and artifacts into steps; cmd combines tasks"},
	{folder: "api", ours: []string{"api", "store", "artifacts", "metrics", "protocol", "tasks", "worker"}, never: nil,
		why: "api reads what tasks and store have written"},
	{folder: "cmd", ours: []string{"cmd", "api", "tasks", "policy", "store", "change", "compose", "artifacts", "metrics", "worker", "client", "results", "protocol", "credential", "codex", "gitrepo", "github"}, never: nil,
		why: "cmd combines the public packages into the program; anything else that it needs belongs in one of them"},
	{folder: "internal/address", ours: []string{"internal/address"}, never: join(amqp, sql, docker),
		why: "address is read by worker, store, artifacts and cmd alike, and opens no connection"},
	{folder: "internal/database", never: join(amqp, docker),
		why: "database connects and classifies errors for store and results/postgres: the SQL is theirs"},
	{folder: "internal/bench", ours: []string{"internal/bench", "internal/devenv", "internal/moonmind", "artifacts", "client", "results", "worker"}, never: docker,
		why: "bench measures the library as a program outside of this module uses it"},
	{folder: "internal/changetest", ours: []string{"internal/changetest", "internal/devenv", "internal/moonmind"}, never: nil,
		why: "changetest sees the worker from outside: it could not find a fault of code that it shares with the worker"},
	{folder: "internal/githubtest", never: join(amqp, sql, docker),
		why: "githubtest stands for somebody else's server: it could not find a fault of code that it shares with the client"},
	{folder: "internal/devenv", ours: []string{"internal/devenv"}, never: amqp,
		why: "devenv starts servers for the tests of every package, so it can import none of them"},
}

// No library may import a package that parses command lines: every program that
// imports the library would contain it.
func TestOnlyCmdParsesCommandLines(t *testing.T) {
	t.Parallel()
	for _, p := range list(t) {
		if within(p.name(), "cmd") {
			continue
		}
		for _, path := range p.Deps {
			if within(path, "github.com/spf13") {
				t.Errorf("%s reaches %s: the command line is read in cmd only", p.name(), path)
			}
		}
	}
}

func TestImportsGoOneWay(t *testing.T) {
	t.Parallel()
	for _, p := range list(t) {
		name := p.name()
		i := slices.IndexFunc(rules, func(r rule) bool { return within(name, r.folder) })
		if i < 0 {
			continue
		}
		r := rules[i]
		for _, imported := range p.Imports {
			other, isOurs := strings.CutPrefix(imported, module+"/")
			if isOurs && !within(other, r.folder) && !within(other, r.ours...) && !within(other, shared...) {
				t.Errorf("%s imports %s; it may import %v.\n\tWhy: %s.", name, other, r.ours, r.why)
			}
		}
		for _, reached := range append(p.Imports, p.Deps...) {
			if within(reached, r.never...) {
				t.Errorf("%s reaches %s (go list -deps ./%s).\n\tWhy not: %s.", name, reached, name, r.why)
				break
			}
		}
	}
}

// What a worker knows of AMQP is in one package, so that another broker needs one
// package and no change elsewhere. Only the place where worker chooses by the scheme of
// the address names an implementation.
func TestOnlyOnePackageSpeaksAMQP(t *testing.T) {
	t.Parallel()
	implementation := module + "/worker/broker/amqp"
	choosing := "worker/transport.go"
	for _, p := range list(t) {
		if within(p.name(), "internal") || p.ImportPath == implementation {
			continue // tools and test support are programs of their own
		}
		for _, file := range p.GoFiles {
			name := p.name() + "/" + file
			parsed, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, file), nil, parser.ImportsOnly)
			if err != nil {
				t.Fatal(err)
			}
			for _, imported := range parsed.Imports {
				path := strings.Trim(imported.Path.Value, `"`)
				if within(path, amqp...) || path == implementation && name != choosing {
					t.Errorf("%s imports %s.\n\tWhy not: all else goes through package worker/broker.", name, path)
				}
			}
		}
	}
}

// All other packages take their settings as values, so that tests can run in
// parallel and the worker can be used as a library.
func TestOnlyCommandsReadEnvironmentAndFlags(t *testing.T) {
	t.Parallel()
	for _, p := range list(t) {
		// Other internal packages are tools and test support.
		if within(p.name(), "cmd") || within(p.name(), "internal") && !within(p.name(), shared...) {
			continue
		}
		for _, file := range p.GoFiles {
			path := filepath.Join(p.Dir, file)
			parsed, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
			if err != nil {
				t.Fatal(err)
			}
			for _, imported := range parsed.Imports {
				if imported.Path.Value == `"flag"` {
					t.Errorf("%s/%s imports flag.\n\tWhy not: only cmd reads the command line; take a Config field.", p.name(), file)
				}
			}
			ast.Inspect(parsed, func(node ast.Node) bool {
				selector, ok := node.(*ast.SelectorExpr)
				if !ok {
					return true
				}
				from, ok := selector.X.(*ast.Ident)
				if ok && from.Name == "os" && slices.Contains([]string{"Getenv", "LookupEnv", "Environ", "ExpandEnv"}, selector.Sel.Name) {
					t.Errorf("%s/%s uses os.%s.\n\tWhy not: only cmd reads the environment; take a Config field.", p.name(), file, selector.Sel.Name)
				}
				return true
			})
		}
	}
}

func TestPackagesSayWhatTheyAreFor(t *testing.T) {
	t.Parallel()
	for _, p := range list(t) {
		if len(p.GoFiles) > 0 && p.Doc == "" {
			t.Errorf("%s has no package doc.\n\tWhy: a new reader learns there what the package owns and what it leaves to others.", p.name())
		}
	}
}

// Every folder that a rule names must exist, so that a renamed folder cannot
// escape its rule.
func TestRulesNameFolders(t *testing.T) {
	t.Parallel()
	later := []string{"api", "cmd", "worker/workertest", "store/storetest"} // may be missing
	for _, r := range rules {
		if _, err := os.Stat(filepath.Join("..", "..", r.folder)); err != nil && !slices.Contains(later, r.folder) {
			t.Errorf("rule for %s: %v", r.folder, err)
		}
	}
}

// Readers must be able to trust the code that ships. A deliberate defect, even
// one that is switched off, makes them doubt every line. Defects are patches
// (internal/chaos/defects).
func TestNoDefectIsPlantedInTheProgram(t *testing.T) {
	t.Parallel()
	for _, p := range list(t) {
		if within(p.name(), "internal/chaos", "internal/archtest") {
			continue
		}
		// All files, whatever their build tags.
		files, err := filepath.Glob(filepath.Join(p.Dir, "*.go"))
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			for _, word := range []string{"planted", "chaosbug", "internal/chaos/defects"} {
				if !strings.HasSuffix(file, "_test.go") && bytes.Contains(text, []byte(word)) {
					t.Errorf("%s/%s says %q.\n\tWhy not: a known defect is a patch in internal/chaos/defects, which the chaos proof applies.",
						p.name(), filepath.Base(file), word)
				}
			}
		}
	}
}
