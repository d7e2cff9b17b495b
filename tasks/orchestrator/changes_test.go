package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
)

// pinEngine is an engine that only knows pins.
type pinEngine struct {
	fakeEngine
	mu   sync.Mutex
	pins map[string]string // owner by name
	err  error
}

func (e *pinEngine) ListPins(_ context.Context, owner string) (list []compose.Pin, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for name, of := range e.pins {
		if of == owner {
			list = append(list, compose.Pin{Name: name, Owner: of})
		}
	}
	return list, e.err
}

func (e *pinEngine) RemovePin(_ context.Context, name string) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.pins, name)
	return nil
}

// keptChange makes a run that was over for so long, with two refs and a pin.
func (b *testEnv) keptChange(d *storetest.Database, engine *pinEngine, n int, ago string) string {
	b.t.Helper()
	run := fmt.Sprintf("00000000-0000-4000-8000-%012d", n)
	for _, name := range []string{"baseline", "after"} {
		b.git("update-ref", "refs/mm-orchestrator/runs/"+run+"/"+name, "HEAD^{tree}")
	}
	engine.mu.Lock()
	engine.pins["pin-"+run] = run
	engine.mu.Unlock()
	d.Rows(b.t, `INSERT INTO mm_orchestrator.changes (run_id, queue, workspace, record, created_at, updated_at)
		VALUES ($1, 'q', $2, '{"version":1,"files":{},"image":{"engineSeen":true}}', now() - $3::interval, now() - $3::interval) RETURNING run_id`, run, "q:"+b.workspace, ago)
	return run
}

func (b *testEnv) keptRefs() string {
	b.t.Helper()
	cmd := exec.Command("git", "for-each-ref", "--format=%(refname:lstrip=3)", "refs/mm-orchestrator")
	cmd.Dir, cmd.Env = b.workspace, b.config.Environ
	out, err := cmd.Output()
	if err != nil {
		b.t.Fatal(err)
	}
	return strings.Join(strings.Fields(string(out)), " ")
}

// sweeperOf is a sweeper of a worker with its own connections.
func (b *testEnv) sweeperOf(d *storetest.Database, name string) *sweeper {
	b.t.Helper()
	config := b.config
	config.Steps = d.Open(b.t, func(c *store.Config) { c.Worker = name })
	o, err := New(config)
	if err != nil {
		b.t.Fatal(err)
	}
	return &sweeper{Orchestrator: o, changes: oldChanges{failed: map[string]time.Time{}}}
}

// TestTwoWorkersRemoveOldChanges: at once, from one repository.
func TestTwoWorkersRemoveOldChanges(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.repository()
	d := storetest.New(t)
	engine := &pinEngine{pins: map[string]string{}}
	b.config.Engine, b.config.KeepChanges = engine, time.Hour
	for n := range 12 {
		b.keptChange(d, engine, n, "2 hours")
	}
	young := b.keptChange(d, engine, 99, "30 minutes")
	var group sync.WaitGroup
	for _, name := range []string{"one", "two"} {
		s := b.sweeperOf(d, name)
		group.Go(func() {
			for range 12 {
				s.changes.next = time.Time{}
				if err := s.removeOldChanges(t.Context()); err != nil {
					t.Error(err)
				}
			}
		})
	}
	group.Wait()
	same(t, "refs", b.keptRefs(), young+"/after "+young+"/baseline")
	if len(engine.pins) != 1 || engine.pins["pin-"+young] == "" {
		t.Errorf("pins %v", engine.pins)
	}
	if rows := d.Rows(t, `SELECT run_id FROM mm_orchestrator.changes`); len(rows) != 1 || rows[0]["run_id"] != young {
		t.Errorf("records %v", rows)
	}
	if logged := b.logged.String(); strings.Contains(logged, "level=WARN") || strings.Count(logged, "removed what was kept") != 12 {
		t.Error(logged)
	}
}

// TestOldChangesOfAnEngineThatDoesNotAnswer stay, and those of others do not.
func TestOldChangesOfAnEngineThatDoesNotAnswer(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.repository()
	d := storetest.New(t)
	engine := &pinEngine{pins: map[string]string{}, err: errors.New("no engine")}
	b.config.Engine, b.config.KeepChanges = engine, time.Hour
	run, filesOnly := b.keptChange(d, engine, 1, "3 hours"), b.keptChange(d, engine, 2, "2 hours")
	d.Rows(t, `UPDATE mm_orchestrator.changes SET record = '{"version":1,"files":{}}' WHERE run_id = $1 RETURNING run_id`, filesOnly)
	s := b.sweeperOf(d, "one")
	look := func() {
		t.Helper()
		s.changes.next = time.Time{}
		if err := s.removeOldChanges(t.Context()); err != nil {
			t.Error(err)
		}
	}
	look()
	same(t, "refs", b.keptRefs(), run+"/after "+run+"/baseline")
	look()
	if n := strings.Count(b.logged.String(), "trying again later"); n != 1 {
		t.Errorf("logged %d times", n)
	}
	engine.err = nil
	look()
	same(t, "refs before the next try", b.keptRefs(), run+"/after "+run+"/baseline")
	s.changes.failed[run] = time.Now()
	look()
	same(t, "refs", b.keptRefs(), "")
	if rows := d.Rows(t, `SELECT run_id FROM mm_orchestrator.changes`); len(rows) != 0 {
		t.Errorf("records %v", rows)
	}
}

// TestOldChangesWithSavedImages: the folder of the run goes, no other.
func TestOldChangesWithSavedImages(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.repository()
	d := storetest.New(t)
	b.config.Engine, b.config.KeepChanges = &pinEngine{pins: map[string]string{}}, time.Hour
	run := b.keptChange(d, b.config.Engine.(*pinEngine), 1, "3 hours")
	saved := t.TempDir()
	for _, name := range []string{run + "/aa.tar", run + "/bb.json", "other/aa.tar"} {
		path := filepath.Join(saved, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, nil, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	d.Rows(t, `UPDATE mm_orchestrator.changes SET record = $1::text::json RETURNING run_id`, fmt.Sprintf(
		`{"version":1,"image":{"engineSeen":true,"pins":[{"archive":"%[1]s/%[2]s/aa.tar"},{"archive":"%[1]s/other/aa.tar"}]}}`, saved, run))
	if err := b.sweeperOf(d, "one").removeOldChanges(t.Context()); err != nil {
		t.Fatal(err)
	}
	left, err := filepath.Glob(filepath.Join(saved, "*", "*"))
	if err != nil {
		t.Fatal(err)
	}
	same(t, "files", strings.Join(left, " "), filepath.Join(saved, "other/aa.tar"))
}

// TestOldChangesOfAMissingWorkspace: it may only be unmounted.
func TestOldChangesOfAMissingWorkspace(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.repository()
	d := storetest.New(t)
	engine := &pinEngine{pins: map[string]string{}}
	b.config.Engine, b.config.KeepChanges = engine, time.Hour
	run := b.keptChange(d, engine, 1, "3 hours")
	d.Rows(t, `UPDATE mm_orchestrator.changes SET workspace = workspace || '/elsewhere' RETURNING run_id`)
	s := b.sweeperOf(d, "one")
	if err := s.removeOldChanges(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(b.logged.String(), "refs of run "+run+" cannot be removed: workspace "+b.workspace+"/elsewhere cannot be used: no such file or directory") {
		t.Error(b.logged)
	}
	same(t, "refs", b.keptRefs(), run+"/after "+run+"/baseline")
}
