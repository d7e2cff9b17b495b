package speckit

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/gitrepo"
	"github.com/moonladderstudios/mm-orchestrator/internal/spectest"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

// A worker may die before it has removed its clone: whoever ends the task, or answers for
// it, removes that.
func TestClonesOfDeadWorkersAreRemoved(t *testing.T) {
	t.Parallel()
	work := t.TempDir()
	c := newChain(t, spectest.Tasks(), func(config *Config) {
		git, err := gitrepo.New(gitrepo.Config{Environ: os.Environ(), Schemes: []string{"file"}})
		if err != nil {
			t.Fatal(err)
		}
		config.Repositories = &Repositories{Git: git, Server: "file://" + work, Dir: work}
	})
	context := c.ok(c.discover(discoverArgs{}))
	s := c.speckit()
	for _, task := range []store.SpecTask{store.SpecSubmit, store.SpecPublish} {
		run := s.submit
		if task == store.SpecPublish {
			run = s.publish
		}
		prepared, err := s.prepare(protocol.NewSignature("any", nil, nil), []json.RawMessage{context})
		if err != nil {
			t.Fatal(err)
		}
		for _, when := range []string{"the end of the task", "its answer"} {
			if err := os.MkdirAll(filepath.Join(work, recordedRun, string(task), "1-77", "tree"), 0o700); err != nil {
				t.Fatal(err)
			}
			context = c.ok(run(c.task("id-of-"+string(task)), contextArgs{prepared.Args[0]}))
			if left, err := os.ReadDir(work); err != nil || len(left) > 0 {
				t.Errorf("%s: after %s the directory for clones has %v, %v", task, when, left, err)
			}
		}
	}
}
