package audit

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

// A Kind says what a record is about.
type Kind string

// The kinds of records. docs/audit.md#kinds-of-records has them for readers: a new
// kind belongs there too.
const (
	// RunStarted: the first step of the run, or of a retry, begins.
	RunStarted Kind = "run-started"
	// StepStarted: a worker has begun a step, or goes on with one that another worker
	// has left.
	StepStarted Kind = "step-started"
	// ApprovalGranted: a worker acts under an approval. ApprovalRefused: there is none
	// that covers the step. ApprovalGiven: an operator has approved the run with our
	// program.
	ApprovalGranted Kind = "approval-granted"
	ApprovalRefused Kind = "approval-refused"
	ApprovalGiven   Kind = "approval-given"
	// CommandStarted is written before a command starts, CommandEnded after its end.
	// CommandRefused: a rule of the policy has refused it before it started.
	CommandStarted Kind = "command-started"
	CommandEnded   Kind = "command-ended"
	CommandRefused Kind = "command-refused"
	// FilesChanging is written before the worker itself alters files of the workspace.
	FilesChanging Kind = "files-changing"
	// FileChanged: the run has altered a file. FileRestored: the worker has brought it
	// back. SetAside: the worker keeps a version of files before it replaces them.
	FileChanged  Kind = "file-changed"
	FileRestored Kind = "file-restored"
	SetAside     Kind = "set-aside"
	// ImagePinned: an image of before the run is kept until the run is over.
	ImagePinned Kind = "image-pinned"
	// ImageBuilt: a name stands for another image than before the run.
	ImageBuilt Kind = "image-built"
	// ContainerChanging is written before the worker itself changes containers, images
	// or networks.
	ContainerChanging Kind = "container-changing"
	// ContainerReplaced: a service has another container than before.
	ContainerReplaced Kind = "container-replaced"
	// ContainerRestored: images and containers are as before the run again.
	ContainerRestored Kind = "container-restored"
	// Health is the verdict on the service.
	Health Kind = "health"
	// LimitReached: a limit of the policy has ended something.
	LimitReached Kind = "limit-reached"
	// Refused: the run asked for something that it must not do.
	Refused Kind = "refused"
	// Paused and Resumed are about a run that does not go on for a time.
	Paused  Kind = "paused"
	Resumed Kind = "resumed"
	// Revoked: an operator has ended the run.
	Revoked Kind = "revoked"
	// Lost: a worker ends a run of which no message and no worker is left.
	Lost Kind = "lost"
	// RollbackRequested: an operator wants the run to be rolled back.
	RollbackRequested Kind = "rollback-requested"
	// BroughtBack: an operator has brought back what was set aside.
	BroughtBack Kind = "brought-back"
	// StepReleased: a worker has given up a step that another start will go on with.
	StepReleased Kind = "step-released"
	// StepEnded and RunEnded have the status.
	StepEnded Kind = "step-ended"
	RunEnded  Kind = "run-ended"
)

// A Record is one line of a trail. The fields from ID on are the caller's. Fields that
// a kind has no use for are left out.
type Record struct {
	// Seq is the number of the record in its run, from 1. Prev is the hash of the record
	// before, that of [Genesis] for the first.
	Seq  int64  `json:"seq"`
	Prev string `json:"prev"`
	// ID makes the record unique in its run: one that is written twice, because the
	// answer to the first write was lost, counts once.
	ID string `json:"id"`
	// At is when it happened, by the clock of who recorded it.
	At time.Time `json:"at"`
	// Run is the run's id.
	Run string `json:"run"`
	// Step, Attempt and Start say which start of which attempt of a step this is about.
	Step    string `json:"step,omitempty"`
	Attempt int    `json:"attempt,omitempty"`
	Start   int    `json:"start,omitempty"`
	// Worker is who recorded it, By the operator who asked for it.
	Worker string `json:"worker,omitempty"`
	By     string `json:"by,omitempty"`
	Kind   Kind   `json:"kind"`
	// Text is what happened, in words, or the reason.
	Text string `json:"text,omitempty"`
	// Status is how a step or a run has ended, or the verdict on the service.
	Status string `json:"status,omitempty"`
	// DurationMS is how long it took, in milliseconds.
	DurationMS int64 `json:"duration_ms,omitempty"`

	Command   *Command   `json:"command,omitempty"`
	File      *File      `json:"file,omitempty"`
	Image     *Image     `json:"image,omitempty"`
	Container *Container `json:"container,omitempty"`
	Approval  *Approval  `json:"approval,omitempty"`
	Rule      *Rule      `json:"rule,omitempty"`
	// Artifacts are those that a step has registered at its end.
	Artifacts []Artifact `json:"artifacts,omitempty"`
}

// A Command is a program that a step runs.
type Command struct {
	// Number counts the commands of the step from 1. Commands that the worker runs for
	// itself have none.
	Number int `json:"number,omitempty"`
	// Argv are the arguments, redacted.
	Argv []string `json:"argv"`
	Dir  string   `json:"dir,omitempty"`
	// Exit is the exit code; minus the number of a signal that has ended the command,
	// nil if it did not end by itself.
	Exit *int `json:"exit,omitempty"`
	// OutputBytes is how much it has added to the step's log, redacted.
	OutputBytes int64 `json:"output_bytes,omitempty"`
	// Ended says why a command did not end by itself, or could not start.
	Ended string `json:"ended,omitempty"`
	// Found says that a later worker recorded the end, from what the earlier worker had
	// recorded of its progress.
	Found bool `json:"found,omitempty"`
}

// A File is a file that was altered or brought back. Before and After are nil where
// there is none.
type File struct {
	Path   string   `json:"path"`
	Before *Version `json:"before"`
	After  *Version `json:"after"`
}

// A Version identifies the content of a file, or the target of a link.
type Version struct {
	SHA256 string `json:"sha256,omitempty"`
	// Mode has the file's type and permissions, as git writes them.
	Mode string `json:"mode"`
}

// An Image is a name of an image, and what it stood for.
type Image struct {
	Name   string `json:"name,omitempty"`
	Before string `json:"before,omitempty"`
	After  string `json:"after,omitempty"`
	// Digests are those under which registries know the image of before.
	Digests []string `json:"digests,omitempty"`
}

// A Container is that of a service, before and after.
type Container struct {
	Service     string `json:"service,omitempty"`
	Before      string `json:"before,omitempty"`
	After       string `json:"after,omitempty"`
	ImageBefore string `json:"image_before,omitempty"`
	ImageAfter  string `json:"image_after,omitempty"`
}

// An Approval is one that a run acts under, or was given.
type Approval struct {
	Approver string `json:"approver,omitempty"`
	Role     string `json:"role,omitempty"`
	// GrantedAt and ExpiresAt are as the run's row has them.
	GrantedAt time.Time `json:"granted_at,omitzero"`
	ExpiresAt time.Time `json:"expires_at,omitzero"`
	// Requirement is that of the gate: pre-run or pre-verify.
	Requirement string `json:"requirement,omitempty"`
	// Digest identifies what the approval covers.
	Digest string `json:"digest,omitempty"`
}

// A Rule is what has refused or ended something.
type Rule struct {
	Name string `json:"name"`
	// Limit is the value of a limit, as the policy file writes it.
	Limit string `json:"limit,omitempty"`
}

// An Artifact is a file of the run's directory.
type Artifact struct {
	Type      string `json:"type"`
	Path      string `json:"path"`
	SHA256    string `json:"sha256,omitempty"`
	SizeBytes int64  `json:"size_bytes"`
}

const (
	// maxText bounds one text of a record, in bytes, maxArgv the arguments of a command
	// together. What is cut says so.
	maxText = 8 << 10
	maxArgv = 64 << 10
	// maxLine bounds a record that Decode reads.
	maxLine = 1 << 20
)

// Redact passes every text of the record through redact, and cuts long ones. Hashes,
// ids and names of kinds are no texts.
func (r *Record) Redact(redact func(string) string) {
	if redact == nil {
		redact = func(text string) string { return text }
	}
	text := func(s *string) { *s = cut(redact(valid(*s))) }
	for _, s := range []*string{&r.Step, &r.Worker, &r.By, &r.Text, &r.Status} {
		text(s)
	}
	if c := r.Command; c != nil {
		copied := *c
		copied.Argv = redactArgv(c.Argv, redact)
		text(&copied.Dir)
		text(&copied.Ended)
		r.Command = &copied
	}
	if f := r.File; f != nil {
		copied := *f
		text(&copied.Path)
		r.File = &copied
	}
	if i := r.Image; i != nil {
		copied := *i
		text(&copied.Name)
		copied.Digests = nil
		for _, digest := range i.Digests {
			text(&digest)
			copied.Digests = append(copied.Digests, digest)
		}
		r.Image = &copied
	}
	if c := r.Container; c != nil {
		copied := *c
		text(&copied.Service)
		r.Container = &copied
	}
	if a := r.Approval; a != nil {
		copied := *a
		text(&copied.Approver)
		text(&copied.Role)
		text(&copied.Requirement)
		r.Approval = &copied
	}
	if rule := r.Rule; rule != nil {
		copied := *rule
		text(&copied.Name)
		text(&copied.Limit)
		r.Rule = &copied
	}
	for i := range r.Artifacts {
		text(&r.Artifacts[i].Path)
	}
}

// redactArgv redacts arguments together: an option and its value are two of them.
func redactArgv(argv []string, redact func(string) string) []string {
	const between = "\x1f" // in no argument that a shell would take
	whole := make([]string, len(argv))
	for i, arg := range argv {
		whole[i] = strings.ReplaceAll(valid(arg), between, " ")
	}
	redacted := make([]string, len(argv))
	for i, arg := range whole {
		redacted[i] = redact(arg)
		// An argument that is the value of the option before: "--password secret".
		if i > 0 {
			pair := whole[i-1] + " "
			if both := redact(pair + arg); strings.HasPrefix(both, pair) {
				if alone := both[len(pair):]; alone != arg && redacted[i] == arg {
					redacted[i] = alone
				}
			}
		}
	}
	left := maxArgv
	for i, arg := range redacted {
		redacted[i] = cut(arg)
		if left -= len(redacted[i]); left < 0 {
			return append(redacted[:i], fmt.Sprintf("… and %d more arguments", len(argv)-i))
		}
	}
	return redacted
}

func valid(text string) string { return strings.ToValidUTF8(text, "\uFFFD") }

func cut(text string) string {
	if len(text) <= maxText {
		return text
	}
	end := maxText - 64 // so that the result is not cut again
	for !utf8.RuneStart(text[end]) {
		end--
	}
	return fmt.Sprintf("%s… (cut here; %d bytes in all)", text[:end], len(text))
}

// Body encodes a record without Seq and Prev, which only the database knows:
// [Join] adds them.
func (r Record) Body() ([]byte, error) {
	type plain Record // without the methods
	r.At = r.At.UTC().Truncate(time.Microsecond)
	var out bytes.Buffer
	encoder := json.NewEncoder(&out)
	encoder.SetEscapeHTML(false)
	r.Seq, r.Prev = 0, ""
	if err := encoder.Encode(plain(r)); err != nil {
		return nil, fmt.Errorf("audit record %s of run %s cannot be encoded: %w", r.Kind, r.Run, err)
	}
	const empty = `{"seq":0,"prev":"",`
	text := bytes.TrimSuffix(out.Bytes(), []byte("\n"))
	if !bytes.HasPrefix(text, []byte(empty)) {
		return nil, errors.New("audit: a record does not begin with seq and prev")
	}
	return text[len(empty):], nil
}

// Join makes the text of a record. The database does the same, in SQL.
func Join(seq int64, prev string, body []byte) []byte {
	return append(fmt.Appendf(nil, `{"seq":%d,"prev":"%s",`, seq, prev), body...)
}

// Decode reads the text of a record.
func Decode(text []byte) (Record, error) {
	var r Record
	if len(text) > maxLine {
		return r, fmt.Errorf("it has %d bytes, a record has at most %d", len(text), maxLine)
	}
	if err := json.Unmarshal(text, &r); err != nil {
		return r, fmt.Errorf("it is no record: %w", err)
	}
	if r.Seq < 1 || r.Kind == "" {
		return r, errors.New("it is no record: seq or kind is missing")
	}
	return r, nil
}

// Summary is the record in words, without its step and its time.
func (r Record) Summary() string {
	var parts []string
	add := func(format string, args ...any) { parts = append(parts, fmt.Sprintf(format, args...)) }
	if r.Status != "" {
		add("%s", r.Status)
	}
	if c := r.Command; c != nil {
		add("%s", strings.Join(append(slices.Clone(c.Argv), c.outcome(r.DurationMS)...), " "))
	} else if r.DurationMS > 0 {
		add("after %s", time.Duration(r.DurationMS)*time.Millisecond)
	}
	if r.Kind == StepStarted && r.Worker != "" {
		add("on worker %s", r.Worker)
	}
	if f := r.File; f != nil {
		add("%s: %s -> %s", f.Path, f.Before, f.After)
	}
	if i := r.Image; i != nil {
		text := short(i.Before)
		if i.Name != "" {
			text = i.Name + ": " + text
		}
		if i.After != "" {
			text += " -> " + short(i.After)
		}
		parts = append(parts, text)
	}
	if c := r.Container; c != nil {
		if c.Service != "" {
			add("service %s", c.Service)
		}
		if c.After != "" || r.Kind == ContainerReplaced {
			add("container %s (%s) -> %s (%s)", short(c.Before), short(c.ImageBefore), short(c.After), short(c.ImageAfter))
		} else if c.Before != "" {
			add("container %s", short(c.Before))
		}
	}
	if a := r.Approval; a != nil {
		if a.Approver != "" {
			add("by %s (%s)", a.Approver, a.Role)
		}
		if a.Requirement != "" {
			add("gate %s", a.Requirement)
		}
		if !a.ExpiresAt.IsZero() {
			add("until %s", a.ExpiresAt.UTC().Format(time.RFC3339))
		}
		if a.Digest != "" {
			add("covers %s", short(a.Digest))
		}
	}
	if rule := r.Rule; rule != nil {
		add("%s", strings.TrimSpace(rule.Name+" "+rule.Limit))
	}
	if r.By != "" && (r.Approval == nil || r.Approval.Approver != r.By) {
		add("by %s", r.By)
	}
	text := strings.Join(parts, ", ")
	if text != "" && r.Text != "" {
		text += ": "
	}
	return text + r.Text
}

// outcome says in brackets how a command has ended, nothing before that.
func (c *Command) outcome(durationMS int64) []string {
	var parts []string
	switch {
	case c.Exit != nil && *c.Exit < 0:
		parts = append(parts, fmt.Sprintf("signal %d", -*c.Exit))
	case c.Exit != nil:
		parts = append(parts, fmt.Sprintf("exit %d", *c.Exit))
	case c.Ended != "":
		parts = append(parts, c.Ended)
	}
	if c.OutputBytes > 0 {
		parts = append(parts, fmt.Sprintf("%d bytes", c.OutputBytes))
	}
	if durationMS > 0 {
		parts = append(parts, (time.Duration(durationMS) * time.Millisecond).String())
	}
	if c.Found {
		parts = append(parts, "found by a later worker")
	}
	if len(parts) == 0 {
		return nil
	}
	return []string{"(" + strings.Join(parts, ", ") + ")"}
}

// String is the mode and the beginning of the checksum.
func (v *Version) String() string {
	if v == nil {
		return "none"
	}
	return strings.TrimSpace(v.Mode + " " + short(v.SHA256))
}

// short is the beginning of a digest or an id.
func short(digest string) string {
	algorithm, rest, found := strings.Cut(digest, ":")
	if !found {
		algorithm, rest = "", digest
	}
	if len(rest) > 12 {
		rest = rest[:12]
	}
	switch {
	case digest == "":
		return "none"
	case algorithm != "":
		return algorithm + ":" + rest
	}
	return rest
}
