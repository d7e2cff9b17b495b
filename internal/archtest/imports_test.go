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

// goPackage is what `go list -json` says about a package.
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

// within tells whether path is one of the folders or below one. A folder with
// a host name is a foreign module, others are ours.
func within(path string, folders ...string) bool {
	return slices.ContainsFunc(folders, func(folder string) bool {
		return path == folder || strings.HasPrefix(path, folder+"/")
	})
}

// shared are the packages of this module that all may import: they hold no
// domain and import nothing of ours.
var shared = []string{"internal/secret", "internal/address", "internal/faultpoint", "internal/stall"}

// Foreign modules by what they stand for.
var (
	amqp   = []string{"github.com/rabbitmq/amqp091-go"}
	sql    = []string{"database/sql", "github.com/jackc/pgx"}
	docker = []string{"github.com/moby/moby", "github.com/docker"}
)

func join(lists ...[]string) []string { return slices.Concat(lists...) }

// rule says what the packages in a folder may know. Test files are free.
type rule struct {
	folder string
	// ours lists the folders of this module that may be imported.
	ours []string
	// never lists foreign packages that may be reached in no way, also not
	// through others.
	never []string
	why   string
}

// The order in which imports go: cmd → api, tasks → store, compose, artifacts,
// worker → protocol. The first rule whose folder matches holds.
var rules = []rule{
	{folder: "protocol", never: join(amqp, sql, docker, []string{"net/http"}),
		why: "protocol is bytes in, bytes out: whoever reads or tests it needs no server and nothing of this project"},
	{folder: "compose", never: join(amqp, sql),
		why: "compose serves anybody who drives docker compose: it knows no runs, queues or tables"},
	{folder: "artifacts", never: join(amqp, sql, docker),
		why: "artifacts writes files: a run's state and its commands are the business of tasks"},
	{folder: "metrics", never: join(amqp, docker), // the Prometheus client itself links database/sql
		why: "metrics names numbers: those who count hand them in"},
	{folder: "worker/workertest", ours: []string{"worker", "protocol"}, never: join(sql, docker),
		why: "workertest runs handlers of anybody who uses the worker library"},
	{folder: "worker", ours: []string{"protocol"}, never: join(sql, docker),
		why: "worker is a library for anybody's tasks: results go through its ResultBackend interface, the domain through Handler"},
	{folder: "store/storetest", ours: []string{"store", "protocol", "internal/devenv"}, never: join(amqp, docker),
		why: "storetest serves tests of the tables only, on a database that devenv hands out"},
	{folder: "store", ours: []string{"store", "protocol"}, never: join(amqp, docker),
		why: "store is all SQL and nothing else: it takes protocol.Result so that the engine need not know tables, and must not know the engine"},
	{folder: "tasks", ours: []string{"tasks", "store", "compose", "artifacts", "metrics", "worker", "protocol"}, never: nil,
		why: "tasks put store, compose and artifacts together for one step; cmd puts tasks together"},
	{folder: "api", ours: []string{"api", "store", "artifacts", "metrics", "protocol", "tasks", "worker"}, never: nil,
		why: "api reads what tasks and store have written"},
	{folder: "cmd", ours: []string{"cmd", "api", "tasks", "store", "compose", "artifacts", "metrics", "worker", "protocol"}, never: nil,
		why: "cmd puts the program together from the public packages; what it needs from elsewhere belongs into one of them"},
	{folder: "internal/address", ours: []string{"internal/address"}, never: join(amqp, sql, docker),
		why: "address is read by worker, store, artifacts and cmd alike, and opens no connection"},
	{folder: "internal/devenv", ours: []string{"internal/devenv"}, never: amqp,
		why: "devenv starts servers for every package's tests, so it can import none of them"},
}

// What reads a command line stays out of the libraries, and out of programs that
// import them.
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

// Everything else takes its settings as values, so that tests run in parallel
// and the worker is usable as a library.
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
			t.Errorf("%s has no package doc.\n\tWhy: a stranger finds out there what it owns and what it leaves to others.", p.name())
		}
	}
}

// The rules name folders; one that is renamed must not escape its rule.
func TestRulesNameFolders(t *testing.T) {
	t.Parallel()
	later := []string{"api", "cmd", "worker/workertest", "store/storetest"} // not built by every state of the tree
	for _, r := range rules {
		if _, err := os.Stat(filepath.Join("..", "..", r.folder)); err != nil && !slices.Contains(later, r.folder) {
			t.Errorf("rule for %s: %v", r.folder, err)
		}
	}
}

// What ships is read by people who must be able to trust it: a defect that is
// there on purpose, even if it is switched off, makes them look twice at each
// line. Defects are patches (internal/chaos/defects).
func TestNoDefectIsPlantedInTheProgram(t *testing.T) {
	t.Parallel()
	for _, p := range list(t) {
		if within(p.name(), "internal/chaos", "internal/archtest") {
			continue
		}
		// Of all builds, whatever their tags.
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
