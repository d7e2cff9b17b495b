package store

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// clockTolerance is how much the clocks of the API and of a worker may differ.
const clockTolerance = 5 * time.Second

// The requirements of a gate: labels of orchestratorapprovalrequirement.
const (
	requirePreRun    = "pre-run"
	requirePreVerify = "pre-verify"
)

// A Gate is a row of approval_gates.
type Gate struct {
	ID, Service string
	// Requirement is none, pre-run or pre-verify.
	Requirement string
	// Roles are those that may approve.
	Roles []string
	// Valid is how long an approval is valid at most.
	Valid time.Duration
}

// requires says that runs need an approval because of the gate.
func (g Gate) requires() bool { return g.Requirement != "none" }

// gatesOf returns the gates that apply to a run: that of the service, and the one that
// the row names. Both have to be satisfied, so that neither a change of the row nor
// one of the gate takes away what the other requires.
func gatesOf(all []Gate, service, named string) []Gate {
	var gates []Gate
	for _, g := range all {
		if g.requires() && (g.Service == service || g.ID == named) {
			gates = append(gates, g)
		}
	}
	return gates
}

// Effects are what an approval is about: what a run would do to whom, or has done
// before verify.
type Effects struct {
	// Plan is the SHA-256 of the plan's steps.
	Plan string `json:"plan"`
	// Service is the run's target service.
	Service string `json:"service"`
	// Gates are the gates that apply, each its id and requirement.
	Gates []string `json:"gates"`
	// Files is the workspace; nil if no worker has looked at it.
	Files *Files `json:"files,omitempty"`
	// Images are the images of the service's containers, after the restart. They are
	// nil before, and if there is no engine.
	Images []string `json:"images,omitempty"`
}

// Files is what a run would deploy from its workspace, apart from its own change.
type Files struct {
	// Head is the tree of the commit that is checked out, and "" without a commit.
	Head string `json:"head"`
	// Digest is a SHA-256 over Head and all edits, Tracked one without the files that
	// git does not track: a service that runs may write such files at any time.
	Digest  string `json:"digest"`
	Tracked string `json:"tracked"`
	// Edits has the digest of each file that differs from that commit. It is nil if
	// there are too many of them.
	Edits map[string]string `json:"edits"`
	// Problem says why the workspace could not be read. Then the other fields are "".
	Problem string `json:"problem,omitempty"`
}

// maxEdits is how many files Files.Edits names.
const maxEdits = 500

// NewFiles returns the Files with these edits: a digest for each path of a file that
// git tracks, and of one that it does not track.
func NewFiles(head string, tracked, untracked map[string]string) *Files {
	digest := func(edits map[string]string) string {
		sum := sha256.New()
		fmt.Fprintf(sum, "%s\x00", head)
		for _, path := range slices.Sorted(maps.Keys(edits)) {
			fmt.Fprintf(sum, "%s\x00%s\x00", path, edits[path])
		}
		return hex.EncodeToString(sum.Sum(nil))
	}
	all := map[string]string{}
	maps.Copy(all, untracked)
	maps.Copy(all, tracked)
	f := &Files{Head: head, Digest: digest(all), Tracked: digest(tracked)}
	if len(all) <= maxEdits {
		f.Edits = all
	}
	return f
}

// effectsOf returns the part of a run's effects that is in its rows.
func effectsOf(run Run, gates []Gate) Effects {
	sum := sha256.Sum256(run.Steps) // jsonb prints equal values equally
	e := Effects{Plan: hex.EncodeToString(sum[:]), Service: run.TargetService, Gates: []string{}}
	for _, g := range gates {
		e.Gates = append(e.Gates, g.ID+" "+g.Requirement)
	}
	slices.Sort(e.Gates)
	return e
}

// rowDifferences says in words how the rows' part of now differs from e.
func (e Effects) rowDifferences(now Effects) []string {
	var all []string
	if e.Plan != now.Plan {
		all = append(all, "the plan was changed")
	}
	if e.Service != now.Service {
		all = append(all, fmt.Sprintf("the target service was changed from %q to %q", cut(e.Service, 80), cut(now.Service, 80)))
	}
	if !slices.Equal(e.Gates, now.Gates) {
		all = append(all, "the approval gate was changed")
	}
	return all
}

// maxNamed is how many files a text names.
const maxNamed = 8

// fileDifferences says in words how the workspace and the images of now differ from e.
// What is not known of one of them does not differ. deployed says that only files count
// that git tracks.
func (e Effects) fileDifferences(now Effects, deployed bool) []string {
	var all []string
	if e.Files != nil && now.Files != nil && !e.Files.equal(*now.Files, deployed) {
		all = append(all, e.Files.difference(*now.Files))
	}
	if e.Images != nil && !slices.Equal(e.Images, now.Images) {
		all = append(all, fmt.Sprintf("the service runs other images: %s in place of %s", listed(now.Images), listed(e.Images)))
	}
	return all
}

func (f Files) equal(other Files, deployed bool) bool {
	if deployed {
		return f.Head == other.Head && f.Tracked == other.Tracked && f.Problem == other.Problem
	}
	return f.Head == other.Head && f.Digest == other.Digest && f.Problem == other.Problem
}

func (f Files) difference(now Files) string {
	switch {
	case now.Problem != "":
		return "the workspace can no longer be read (" + now.Problem + ")"
	case f.Problem != "":
		return "the workspace could not be read when the run was approved (" + f.Problem + ")"
	case f.Head != now.Head:
		return "another commit is checked out in the workspace"
	case f.Edits == nil || now.Edits == nil:
		return "files of the workspace were edited"
	}
	var names []string
	for path := range maps.Keys(f.Edits) {
		if f.Edits[path] != now.Edits[path] {
			names = append(names, path)
		}
	}
	for path := range maps.Keys(now.Edits) {
		if _, known := f.Edits[path]; !known {
			names = append(names, path)
		}
	}
	slices.Sort(names)
	return "files of the workspace were edited: " + listed(names)
}

func listed(names []string) string {
	if len(names) == 0 {
		return "none"
	}
	shown := names
	if len(shown) > maxNamed {
		shown = shown[:maxNamed]
	}
	text := strings.Join(shown, ", ")
	if more := len(names) - len(shown); more > 0 {
		text += fmt.Sprintf(" and %d more", more)
	}
	return text
}

// An Approver is who approves a run.
type Approver struct {
	ID   string `json:"id"`
	Role string `json:"role"`
}

// An Approval is what the row of a run says of its approval.
type Approval struct {
	// Key identifies it: SHA-256 of its token and time.
	Key       string    `json:"key"`
	Approver  Approver  `json:"approver"`
	GrantedAt time.Time `json:"grantedAt"`
	// ExpiresAt is zero if the row has none.
	ExpiresAt time.Time `json:"expiresAt,omitzero"`
	// Effects are what it covers.
	Effects Effects `json:"effects"`
}

// approvalRow is what is read about the approval of a run.
type approvalRow struct {
	// Gates are those that apply.
	Gates []Gate
	// Token is approval_token, nil for NULL.
	Token []byte
	// Block is metrics_snapshot.approval, nil for none.
	Block json.RawMessage
	// PlanNewer says that the plan's row was written after the run's.
	PlanNewer bool
	// CopiedFrom is another run with the same token and time, "" for none.
	CopiedFrom string
	// Record is the row of mm_orchestrator.approvals.
	Record approvalRecord
	// Now is the time of the check.
	Now time.Time
}

// approvalRecord is a row of mm_orchestrator.approvals; see the migration for what its
// columns mean.
type approvalRecord struct {
	Presented     *Effects
	PresentedAt   time.Time
	Approved      *Approval
	ActedFor      string
	LeftBehind    *Effects
	PausedAt      *time.Time
	WaitUntil     *time.Time
	PausedAttempt int
	RunStartedAt  *time.Time
	SpentKey      string
	PassedFor     string
}

// approvalVerdict is the answer of judgeApproval. If no field is set, the step needs no
// approval.
type approvalVerdict struct {
	// refuse: the step must not run, for this reason, and the run waits for another
	// approval.
	refuse string
	// pause: the run has to pause before verify.
	pause bool
	// check: the approval is good as far as rows tell. The worker has to call
	// CheckApproval before the step's first effect.
	check bool
	// guard: the run is being carried out. The worker has to call CheckApproval before
	// the step's first effect, to see that nobody else has changed the workspace since
	// the last step.
	guard bool
	// violation: the plan or the service was changed while the run was carried out.
	// The step must fail.
	violation string
	// approval, with check, is what covers the run. It is to be recorded if met is set,
	// also with refuse: if somebody brings the approval back, it covers no more than it
	// did.
	approval *Approval
	met      bool
}

// approvalRequest is who asks whether a step may run.
type approvalRequest struct {
	step    Step
	attempt int
	// submission is the first task of the chain.
	submission string
}

func (r BeginRequest) submission() string {
	if r.RootTaskID != "" {
		return r.RootTaskID
	}
	return r.TaskID
}

// judgeApproval says whether the approval of a run covers a step. It is pure.
//
//   - A rollback needs no approval, and neither does a run without a gate that requires
//     one.
//   - A gate pre-run is looked at in every step until one of them has begun to change
//     something (CheckApproval). From then on the steps of the same chain go on, also
//     after the approval has expired or was withdrawn: a half-deployed service helps
//     nobody. But if the plan is another one, the step fails, and is rolled back.
//   - A gate pre-verify is looked at in verify. Only an approval counts that was granted
//     after the run came to its pause.
func judgeApproval(run Run, a approvalRow, r approvalRequest) approvalVerdict {
	var before, pause bool
	for _, g := range a.Gates {
		before = before || g.Requirement == requirePreRun
		pause = pause || g.Requirement == requirePreVerify
	}
	acted := a.Record.ActedFor != "" && a.Record.ActedFor == r.submission
	switch {
	case r.step == StepRollback || !before && !pause:
		return approvalVerdict{}
	case r.step == StepVerify && a.Record.PassedFor != "" && a.Record.PassedFor == r.submission:
		return approvalVerdict{violation: a.violation(run)}
	case r.step == StepVerify && a.Record.pausedFor(r.attempt):
		// Whatever the gate requires by now: nobody has approved what was deployed.
		return a.judge(run, true)
	case before && !acted:
		v := a.judge(run, false)
		if v.refuse == "" && pause && r.step == StepVerify {
			v.pause = true
		}
		return v
	case before && r.step != StepVerify:
		return approvalVerdict{violation: a.violation(run), guard: r.step == StepBuild || r.step == StepRestart}
	case pause && r.step == StepVerify && !before:
		return approvalVerdict{pause: true}
	case pause && r.step == StepVerify:
		return approvalVerdict{pause: true, violation: a.violation(run)}
	case before:
		return approvalVerdict{violation: a.violation(run)}
	}
	return approvalVerdict{}
}

// start is what the worker has to know of a verdict.
func (a approvalRow) start(v approvalVerdict) *StartApproval {
	if len(a.Gates) == 0 {
		return nil
	}
	return &StartApproval{Check: v.check || v.pause || v.guard || v.refuse != "", Violation: v.violation}
}

func (r approvalRecord) pausedFor(attempt int) bool {
	return r.PausedAt != nil && r.PausedAttempt == attempt
}

// presentedInPause is what an approval of a paused run covers: what was deployed by
// which plan, and not what became of it since. Only a gate may change, as an operator
// changes it for all runs.
func (r approvalRecord) presentedInPause(now Effects) Effects {
	if r.Presented == nil {
		return now
	}
	deployed := *r.Presented
	deployed.Gates = now.Gates
	return deployed
}

// violation says how plan and service differ from what was approved, or "".
func (a approvalRow) violation(run Run) string {
	if a.Record.Approved == nil {
		return ""
	}
	approved := a.Record.Approved.Effects
	approved.Gates = []string{}
	all := approved.rowDifferences(effectsOf(run, nil))
	if len(all) == 0 {
		return ""
	}
	return "Changed while the run was carried out: " + strings.Join(all, "; ") + ". The approval does not cover that. Create a new run for the changed plan"
}

// judge checks the approval that the row has. paused says that the run has paused
// before verify.
func (a approvalRow) judge(run Run, paused bool) approvalVerdict {
	approval, reason := a.read()
	if reason == "" {
		reason = a.checkTerms(run, approval, paused)
	}
	if reason != "" {
		return approvalVerdict{refuse: reason}
	}
	now := effectsOf(run, a.Gates)
	when := "changed after the run was approved: "
	if paused {
		when = "changed while the run was paused: "
	}
	if known := a.Record.Approved; known != nil && known.Key == approval.Key {
		if changed := known.Effects.rowDifferences(now); len(changed) > 0 {
			return approvalVerdict{refuse: when + strings.Join(changed, "; ")}
		}
		return approvalVerdict{check: true, approval: known}
	}
	approval.Effects = now
	if shown := a.Record.Presented; shown != nil {
		if changed := shown.rowDifferences(now); len(changed) > 0 {
			approval.Effects = *shown
			return approvalVerdict{refuse: when + strings.Join(changed, "; "), approval: &approval, met: true}
		}
		if at := a.Record.PresentedAt; at.After(approval.GrantedAt.Add(clockTolerance)) {
			approval.Effects = Effects{}
			return approvalVerdict{approval: &approval, met: true, refuse: fmt.Sprintf("what the run does was changed at %s, after the approval of %s", at.Format(time.RFC3339), approval.GrantedAt.Format(time.RFC3339))}
		}
		approval.Effects.Files, approval.Effects.Images = shown.Files, shown.Images
	} else if a.PlanNewer {
		approval.Effects = Effects{}
		return approvalVerdict{approval: &approval, met: true, refuse: "changed after the run was approved: the plan was changed"}
	}
	return approvalVerdict{check: true, approval: &approval, met: true}
}

// read reads the approval from the columns. The result may be used only if the reason
// for a refusal is "".
func (a approvalRow) read() (approval Approval, reason string) {
	if len(a.Token) == 0 {
		return approval, "there is no approval: the run has no token"
	}
	var block map[string]json.RawMessage
	if err := json.Unmarshal(a.Block, &block); err != nil || block == nil {
		return approval, "there is a token, but metrics_snapshot does not say who has approved the run"
	}
	if status, ok := textIn(block, "status"); !ok || status != "granted" {
		return approval, "there is a token, but metrics_snapshot does not say that the approval was granted"
	}
	if raw, given := block["approver"]; given && string(raw) != "null" {
		var approver map[string]json.RawMessage
		if err := json.Unmarshal(raw, &approver); err != nil {
			return approval, "metrics_snapshot does not name the approver by id and role"
		}
		var hasID, hasRole bool
		approval.Approver.ID, hasID = textIn(approver, "id")
		approval.Approver.Role, hasRole = textIn(approver, "role")
		if !hasID || !hasRole || strings.TrimSpace(approval.Approver.ID) == "" {
			return approval, "metrics_snapshot does not name the approver by id and role"
		}
	}
	var ok bool
	if approval.GrantedAt, ok = timeIn(block, "grantedAt"); !ok {
		return approval, "metrics_snapshot has no time with a time zone at which the approval was granted"
	}
	if raw, given := block["expiresAt"]; given && string(raw) != "null" {
		if approval.ExpiresAt, ok = timeIn(block, "expiresAt"); !ok {
			return approval, "the approval's expiresAt is no time with a time zone"
		}
	}
	approval.Key = approvalKey(a.Token, approval.GrantedAt)
	return approval, ""
}

func approvalKey(token []byte, granted time.Time) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%d\x00%s\x00%s", len(token), token, granted.UTC().Format(time.RFC3339Nano)))
	return hex.EncodeToString(sum[:])
}

func textIn(object map[string]json.RawMessage, name string) (string, bool) {
	var text *string
	if err := json.Unmarshal(object[name], &text); err != nil || text == nil {
		return "", false
	}
	return *text, true
}

func timeIn(object map[string]json.RawMessage, name string) (time.Time, bool) {
	text, ok := textIn(object, name)
	if !ok {
		return time.Time{}, false
	}
	t, err := time.Parse(time.RFC3339Nano, text)
	return t.UTC(), err == nil
}

// checkTerms says why the approval does not satisfy the gates, or "".
func (a approvalRow) checkTerms(run Run, approval Approval, paused bool) string {
	for _, g := range a.Gates {
		switch {
		case len(g.Roles) == 0:
		case approval.Approver.ID == "":
			return fmt.Sprintf("the approval names no approver: a token in the request that creates a run is not enough, the gate of %s wants one of the roles %s", g.Service, strings.Join(g.Roles, ", "))
		case approval.Approver.Role == "" || !slices.Contains(g.Roles, approval.Approver.Role):
			return fmt.Sprintf("approver %s has the role %q, and the gate of %s wants one of %s", cut(approval.Approver.ID, 80), cut(approval.Approver.Role, 80), g.Service, strings.Join(g.Roles, ", "))
		}
	}
	granted := approval.GrantedAt
	switch {
	case granted.After(a.Now.Add(clockTolerance)):
		return fmt.Sprintf("the approval is from the future: it was granted at %s, and now it is %s. Synchronise the clocks of API and worker", granted.Format(time.RFC3339), a.Now.Format(time.RFC3339))
	case granted.Before(run.QueuedAt.Add(-clockTolerance)):
		return fmt.Sprintf("the approval of %s is older than the run, which was queued at %s", granted.Format(time.RFC3339), run.QueuedAt.Format(time.RFC3339))
	case paused && a.Record.SpentKey != "" && a.Record.SpentKey == approval.Key,
		paused && granted.Before(a.Record.PausedAt.Add(-clockTolerance)):
		return fmt.Sprintf("the approval of %s is older than the pause before verify, which began at %s", granted.Format(time.RFC3339), a.Record.PausedAt.Format(time.RFC3339))
	case a.CopiedFrom != "":
		return fmt.Sprintf("the approval is that of run %s", a.CopiedFrom)
	}
	if ends := a.expiry(approval); a.Now.After(ends) {
		return fmt.Sprintf("the approval has expired at %s", ends.Format(time.RFC3339))
	}
	return ""
}

// maxValid bounds the validity of a gate, as its minutes may be more than a
// time.Duration has.
const maxValid = 100 * 365 * 24 * time.Hour

// expiry is the earliest end that the approval and the gates give.
func (a approvalRow) expiry(approval Approval) time.Time {
	ends := approval.GrantedAt.Add(maxValid)
	if e := approval.ExpiresAt; !e.IsZero() && e.Before(ends) {
		ends = e
	}
	for _, g := range a.Gates {
		if e := approval.GrantedAt.Add(g.Valid); e.Before(ends) {
			ends = e
		}
	}
	return ends
}

// whom says whose approval the gates want.
func whom(gates []Gate) string {
	var roles []string
	for _, g := range gates {
		roles = append(roles, g.Roles...)
	}
	slices.Sort(roles)
	return strings.Join(slices.Compact(roles), " or ")
}
