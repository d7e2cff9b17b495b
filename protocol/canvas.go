package protocol

import (
	"errors"
	"slices"
	"time"
)

// ErrUnsupportedCanvas is what a *CanvasError is, for errors.Is.
var ErrUnsupportedCanvas = errors.New("unsupported canvas")

// CanvasError says that what follows a task cannot be started by this worker:
// a chord, or a signature that makes no message. It is permanent.
type CanvasError struct {
	// TaskID is the task that cannot be followed.
	TaskID string
	// Element is the name of the offending signature.
	Element string
	// Why is one clause.
	Why string
}

// Error says what cannot be followed and what to do.
func (e *CanvasError) Error() string {
	return "what follows task " + e.TaskID + " cannot be started by this worker: " + e.Element + ": " + e.Why
}

// Is reports whether target is ErrUnsupportedCanvas.
func (e *CanvasError) Is(target error) bool { return target == ErrUnsupportedCanvas }

// Exception is what the FAILURE row says.
func (e *CanvasError) Exception() Exception {
	return NewException("builtins", "NotImplementedError", e.Error())
}

// maxNesting is how deep chains and groups may stand in each other. Producers
// flatten nearly all of it; every level costs another look at the text.
const maxNesting = 16

const chordAdvice = "chords are not supported; run this task on a Python worker, or use a chain"

// CheckCanvas says whether everything that follows m, after success or
// failure, can be started. A worker asks before it runs the task's body, and
// fails the task with the error's Exception otherwise
// (docs/celery.md#groups-and-chords). The error is a *CanvasError.
func CheckCanvas(m *Message) error {
	if m.Embed.Chord != nil {
		return &CanvasError{TaskID: m.ID, Element: m.Embed.Chord.Task, Why: "the task is part of a chord; " + chordAdvice}
	}
	trial := Sender{Now: time.Now(), NewID: func() string { return "" }}
	if _, err := AfterSuccess(m, nil, trial); err != nil {
		return err
	}
	if _, err := AfterFailure(m, trial); err != nil {
		return err
	}
	// What stands further behind is tried too: a chain that must stop should
	// stop before its first step has done anything.
	p := planner{m: m, sender: trial}
	for i, s := range m.Embed.Chain {
		if err := p.checkElement(s, i > 0); err != nil {
			return err
		}
	}
	return nil
}

// checkElement says whether a chain element can be started; followed tells
// whether others stand behind it.
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
			return p.unsupported(step, "a group with a task behind it is a chord; "+chordAdvice)
		}
	}
	return nil
}

func (p *planner) unsupported(s Signature, why string) error {
	return &CanvasError{TaskID: p.m.ID, Element: s.Task, Why: why}
}

// flatten gives the steps of a signature in the order of running: the tasks
// of a celery.chain, at any depth, or the signature itself.
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

// inherit gives a chain's own options to its steps, as Celery does: errbacks
// to each, callbacks and id to the last.
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

// tasksOf lists the members of a celery.chain or celery.group.
func (p *planner) tasksOf(s Signature) ([]Signature, error) {
	text := s.Kwargs.Get("tasks")
	if text == nil || kindOf(text) != kindArray {
		return nil, p.unsupported(s, "its tasks are no array")
	}
	tasks, err := parseSignatures(text)
	if err != nil {
		return nil, p.unsupported(s, detailOf(err))
	}
	return tasks, nil
}
