package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/tasks/orchestrator"
)

var approveCommand = &command{
	name:     "approve",
	args:     "RUN",
	words:    1,
	synonyms: []string{"accept", "grant", "allow"},
	summary:  "approve a run that waits for approval",
	about: "Approves a run as MoonMind's API does, and sends its steps. It first prints what the approval covers: the plan, the target service, and what the workspace has beside the commit that is checked out. " +
		"If any of that is changed afterwards, the worker refuses the approval. RUN is the id of a run or its beginning, as for `mm-orchestrator runs`.\n\n" +
		"It refuses a run that does not wait for approval, and a role that the gate of the service does not have. Identity and role are recorded as given: who may run this command with the rights to the database may approve.\n\n" +
		"It needs ENCRYPTION_MASTER_KEY with the value that the API has. With another one the API could not read the run any more.\n\n" +
		"Exit code 0: the run is approved, or was approved before by the same approver. 1: it cannot be approved. 69: broker or database unreachable.",
	examples: []example{
		{"mm-orchestrator runs approve 6f1c2f0e --by ops-417 --role sre", "approve it"},
		{"mm-orchestrator runs approve 6f1c2f0e --dry-run", "what would the approval cover?"},
	},
	topics: []topic{topicBroker, topicDatabase, topicFiles, topicSteps},
	setup: func(fs *pflag.FlagSet) runFunc {
		f := &approveFlags{}
		fs.StringVar(&f.by, "by", "", "The identity of who approves, as `text`. Required.")
		fs.StringVar(&f.role, "role", "", "The `role` in which they approve: one of the gate's. Required.")
		fs.BoolVarP(&f.dryRun, "dry-run", "n", false, "Print what the approval would cover, without approving.")
		return f.run
	},
}

type approveFlags struct {
	by, role string
	dryRun   bool
}

func (f *approveFlags) run(ctx context.Context, p *program, in input) (err error) {
	switch {
	case len(in.words) == 0:
		return &usageError{"runs approve needs the id of a run; " + seeHelp(in.parsed)}
	case !f.dryRun && (strings.TrimSpace(f.by) == "" || strings.TrimSpace(f.role) == ""):
		return &usageError{"runs approve needs --by and --role: they are recorded with the run; " + seeHelp(in.parsed)}
	}
	wanted, err := parseRun(in)
	if err != nil {
		return err
	}
	c, db, err := p.openCommand(ctx, in)
	if err != nil {
		return err
	}
	defer db.Close()
	defer func() { err = explainSchemaError(ctx, db, err) }()
	if err := c.loadPolicy(); err != nil {
		return err
	}
	id, err := findRun(ctx, db, wanted)
	if err != nil {
		return err
	}
	run, err := db.FindRun(ctx, id)
	if err != nil {
		return err
	}
	covers, err := db.FindPresented(ctx, id, c.Queue, orchestrator.GateService(c.Policy))
	if err != nil {
		return err
	}
	if again, err := f.approvedBefore(ctx, p, c, db, run, covers); again || err != nil {
		return err
	}
	p.printCovered(run, covers)
	if f.dryRun {
		fmt.Fprintln(p.stdout, "nothing was changed")
		return nil
	}
	token, err := approvalToken(c)
	if err != nil {
		return err
	}
	approved, err := db.Approve(ctx, store.ApproveRequest{
		RunID: id, Approver: store.Approver{ID: f.by, Role: f.role}, Token: token, Queue: c.Queue, GateService: orchestrator.GateService(c.Policy),
		Workspace: func(run store.Run) string { return orchestrator.Workspace(c.Queue, c.Workspace, run) },
	}, func(run store.Run) (string, protocol.Delivery, error) {
		return orchestrator.ChainMessage(run, c.Queue, c.Node, time.Now(), nil)
	})
	if errors.Is(err, store.ErrInvalid) {
		return fmt.Errorf("%s; nothing was changed", err) // no error of the configuration
	}
	if err != nil {
		return err
	}
	what := "begins"
	if approved.Paused {
		what = "goes on with verify"
	}
	fmt.Fprintf(p.stdout, "run %s is approved by %s (%s) until %s, and %s\n", id, oneLine(f.by, 80), oneLine(f.role, 80), clock(&approved.ExpiresAt), what)
	return p.sendApproved(ctx, c, db, id)
}

// approvedBefore says whether the run has been approved already, by the same approver.
// It publishes what an interrupted command has left.
func (f *approveFlags) approvedBefore(ctx context.Context, p *program, c *configuration, db *store.Store, run store.Run, covers store.Presented) (bool, error) {
	if f.dryRun || run.Status == store.RunAwaitingApproval || covers.Approver != strings.TrimSpace(f.by) || covers.Role != f.role {
		return false, nil
	}
	fmt.Fprintf(p.stdout, "run %s was approved by %s (%s) at %s already, and is %s\n", run.ID, oneLine(covers.Approver, 80), oneLine(covers.Role, 80), oneLine(covers.GrantedAt, 40), run.Status)
	return true, p.sendApproved(ctx, c, db, run.ID)
}

// sendApproved publishes the message that Approve has parked.
func (p *program) sendApproved(ctx context.Context, c *configuration, db *store.Store, id string) error {
	if _, err := p.publishParked(ctx, c, db); err != nil {
		return fmt.Errorf("run %s is approved, but its message cannot be published yet; a worker publishes it: %w", id, err)
	}
	return nil
}

// approvalToken returns what the column approval_token gets: a random token, encrypted
// with the API's key.
func approvalToken(c *configuration) ([]byte, error) {
	if c.MasterKey.Reveal() == "" {
		return nil, &curedError{errors.New("the approval's token cannot be encrypted: ENCRYPTION_MASTER_KEY is not set"),
			"Set it to the value that MoonMind's API has; with another one the API could not read the run any more"}
	}
	return store.EncryptApprovalToken(c.MasterKey.Reveal(), "mm-orchestrator-"+protocol.NewID())
}

// maxShownEdits is how many edited files are listed.
const maxShownEdits = 40

// printCovered prints what an approval covers.
func (p *program) printCovered(run store.Run, covers store.Presented) {
	// Redacted before it is cut: half of a secret is none that a redactor knows.
	line := func(name, text string) {
		fmt.Fprintf(p.stdout, "%-10s %s\n", name, p.redactor().String(text))
	}
	short := func(text string) string { return oneLine(p.redactor().String(text), 400) }
	line("run", run.ID+", "+string(run.Status))
	line("service", short(run.TargetService))
	line("gate", dash(strings.Join(covers.Requirements, ", "))+", approved by the roles "+dash(short(strings.Join(covers.Roles, ", "))))
	line("asked for", short(run.Instruction))
	line("plan", joinSteps(covers.Steps)+" (SHA-256 "+covers.Plan+")")
	switch files := covers.Files; {
	case files == nil:
		line("workspace", "no worker has looked at it yet: the first step that begins records what it finds")
	case files.Problem != "":
		line("workspace", "cannot be read: "+short(files.Problem))
	default:
		at := ""
		if covers.LookedAt != nil {
			at = ", as a worker has seen it at " + clock(covers.LookedAt)
		}
		line("workspace", fmt.Sprintf("commit tree %s, %s beside it (digest %s)%s", dash(files.Head), counted(len(files.Edits), "edited file"), files.Digest, at))
		for i, path := range slices.Sorted(maps.Keys(files.Edits)) {
			if i == maxShownEdits {
				line("", fmt.Sprintf("  and %d more", len(files.Edits)-i))
				break
			}
			line("", "  "+short(path))
		}
	}
	if covers.Paused {
		line("deployed", "yes: the run waits before verify, and has deployed the images "+dash(strings.Join(covers.Images, ", ")))
	}
}
