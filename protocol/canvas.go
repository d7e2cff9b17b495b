package protocol

import (
	"errors"
	"slices"
	"time"
)

// ErrUnsupportedCanvas matches every [*CanvasError] in errors.Is.
var ErrUnsupportedCanvas = errors.New("unsupported canvas")

// CanvasError says that this package cannot start what a task's message asks
// to run after the task: a chord, or a signature from which no message can be
// made. The error is permanent: a retry fails in the same way.
type CanvasError struct {
	// TaskID is the id of the task whose message it is.
	TaskID string
	// Element is the task name of the signature that cannot be started.
	Element string
	// Why is the reason, one clause.
	Why string
}

// Error names the task, the signature and the reason.
func (e *CanvasError) Error() string {
	return "what follows task " + e.TaskID + " cannot be started by this worker: " + e.Element + ": " + e.Why
}

// Is reports whether target is ErrUnsupportedCanvas.
func (e *CanvasError) Is(target error) bool { return target == ErrUnsupportedCanvas }

// Exception returns the exception for the task's FAILURE row.
func (e *CanvasError) Exception() Exception {
	return NewException("builtins", "NotImplementedError", e.Error())
}

// maxNesting is how deeply chains and groups may be nested. Producers flatten
// nearly all nesting; each level costs another pass over the text.
const maxNesting = 16

const chordAdvice = "chords are not supported; run this task on a Python worker, or use a chain"

// CheckCanvas checks that everything that m asks to run after the task, on
// success or on failure, can be started. A worker calls it before it runs the
// task and, on an error, stores the error's Exception as the task's failure
// (docs/celery.md#groups-and-chords). The error is a [*CanvasError].
func CheckCanvas(m *Message) error {
	if err := CheckLaterSteps(m); err != nil {
		return err
	}
	trial := Sender{Now: time.Now(), NewID: func() string { return "" }}
	if _, err := AfterSuccess(m, nil, trial); err != nil {
		return err
	}
	_, err := AfterFailure(m, trial)
	return err
}

// CheckLaterSteps checks of all that [CheckCanvas] does only what neither
// [AfterSuccess] nor [AfterFailure] finds: that the task is not part of a chord, and
// that the later steps of its chain can be started. It is for a worker that makes both
// plans before the task runs, with its own [Sender]. The error is a [*CanvasError].
func CheckLaterSteps(m *Message) error {
	if m.Embed.Chord != nil {
		return &CanvasError{TaskID: m.ID, Element: m.Embed.Chord.Task, Why: "the task is part of a chord; " + chordAdvice}
	}
	// A chain that cannot be completed should fail before its first step has done
	// anything.
	p := planner{m: m}
	for i, s := range m.Embed.Chain {
		if err := p.checkElement(s, i > 0); err != nil {
			return err
		}
	}
	return nil
}

// checkElement checks that a chain element can be started. followed says
// whether other elements come after it.
func (p *planner) checkElement(s Signature, followed bool) error {
	steps, err := p.flatten(s)
	if err != nil {
		return err
	}
	for i, step := range steps {
		if step.Option("chord") != nil {
			return p.unsupported(step, "it is part of a chord; "+chordAdvice)
		}
		if step.Task == "celery.group" && (followed || i < len(steps)-1) {
			return p.unsupported(step, "a group followed by a task is a chord; "+chordAdvice)
		}
	}
	return nil
}

func (p *planner) unsupported(s Signature, why string) error {
	return &CanvasError{TaskID: p.m.ID, Element: s.Task, Why: why}
}

// flatten returns the steps of a signature in the order in which they run: the
// tasks of a celery.chain, nested chains included, or the signature itself.
func (p *planner) flatten(s Signature) ([]Signature, error) {
	switch s.Task {
	case "celery.chord":
		return nil, p.unsupported(s, chordAdvice)
	case "celery.chain":
	default:
		return []Signature{s}, nil
	}
	tasks, err := p.tasksOf(s)
	if err != nil {
		return nil, err
	}
	if p.nesting++; p.nesting > maxNesting {
		return nil, p.unsupported(s, "nested too deeply")
	}
	defer func() { p.nesting-- }()
	var steps []Signature
	for _, task := range tasks {
		inner, err := p.flatten(task)
		if err != nil {
			return nil, err
		}
		steps = append(steps, inner...)
	}
	if len(steps) == 0 {
		return nil, p.unsupported(s, "it is empty")
	}
	return p.inherit(s, steps)
}

// inherit copies a chain's own options to its steps, as Celery does: errbacks
// to each step, callbacks and id to the last.
func (p *planner) inherit(chain Signature, steps []Signature) ([]Signature, error) {
	steps = slices.Clone(steps)
	for i, step := range steps {
		var set []Member
		last := i == len(steps)-1
		id := step.TaskID()
		if own := chain.TaskID(); last && own != "" {
			id = own
		}
		if id == "" {
			id = p.newID()
		}
		if id != step.TaskID() {
			set = append(set, Member{"task_id", quoteJSON(id)})
		}
		for _, name := range []string{"link_error", "link"} {
			if more := chain.Option(name); more != nil && (name == "link_error" || last) {
				merged, err := mergeLists(step.Option(name), more)
				if err != nil {
					return nil, p.unsupported(step, name+": "+err.Error())
				}
				set = append(set, Member{name, merged})
			}
		}
		if len(set) == 0 {
			continue
		}
		var err error
		if steps[i], err = step.WithOptions(set...); err != nil {
			return nil, p.unsupported(step, detailOf(err))
		}
	}
	return steps, nil
}

// ofCanvas are the options of a chain or group that say what it is, and not how its tasks
// are sent.
var ofCanvas = []string{"task_id", "group_id", "group_index", "root_id", "parent_id", "chain"}

// optionsForTasks returns the options that a celery.chain has for its first task, or a
// celery.group for each of its tasks (docs/celery.md#applying-a-signature). The links of a
// chain are not among them: inherit has given them to its tasks.
func (p *planner) optionsForTasks(s Signature) (Object, error) {
	var options Object
	for _, o := range s.Options {
		switch {
		case isNull(o.Value) || slices.Contains(ofCanvas, o.Key):
		case o.Key == "chord":
			return nil, p.unsupported(s, "it is part of a chord; "+chordAdvice)
		case s.Task == "celery.chain" && (o.Key == "link" || o.Key == "link_error"):
		case o.Key == "priority" && p.outcome == outcomeSuccess:
			// Celery's worker gives one of its own here, or explicitly none.
		default:
			options = append(options, o)
		}
	}
	return options, nil
}

// handOver returns s with the options of the chain or group around it. They take
// precedence over its own, but links are added and stamps stay.
func (p *planner) handOver(options Object, s Signature) (Signature, error) {
	if len(options) == 0 {
		return s, nil
	}
	stamps, _ := plainValue(s.Options.Get("stamped_headers")).([]any)
	var set []Member
	for _, o := range options {
		switch {
		case s.Option(o.Key) != nil && (o.Key == "stamped_headers" || slices.Contains(stamps, any(o.Key))):
			continue
		case o.Key == "link" || o.Key == "link_error":
			merged, err := mergeLists(s.Option(o.Key), o.Value)
			if err != nil {
				return s, p.unsupported(s, o.Key+": "+detailOf(err))
			}
			o.Value = merged
		}
		set = append(set, o)
	}
	with, err := s.WithOptions(set...)
	if err != nil {
		return s, p.unsupported(s, detailOf(err))
	}
	return with, nil
}

// tasksOf lists the members of a celery.chain or celery.group.
func (p *planner) tasksOf(s Signature) ([]Signature, error) {
	text := s.Kwargs.Get("tasks")
	if text == nil || kindOf(text) != kindArray {
		return nil, p.unsupported(s, "its tasks are not an array")
	}
	tasks, err := parseSignatures(text)
	if err != nil {
		return nil, p.unsupported(s, detailOf(err))
	}
	return tasks, nil
}
