package orchestrator

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/policy"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

// plan is what [store.ParsePlan] returns.
type plan []any

// parameters are those of one step. Numbers are of type json.Number.
type parameters map[string]any

func parsePlan(steps json.RawMessage) (plan, *Failure) {
	entries, err := store.ParsePlan(steps)
	switch {
	case errors.Is(err, store.ErrPlanNotAList):
		return nil, typeError("Action plan must be a list of steps")
	case err != nil:
		return nil, valueError("Action plan is not JSON: " + err.Error())
	}
	return entries, nil
}

// find returns the parameters of the first entry with the step's name.
func (p plan) find(step store.Step) (parameters, *Failure) {
	for _, entry := range p {
		object, isObject := entry.(map[string]any)
		if !isObject || store.StepName(entry) != string(step) {
			continue
		}
		switch value := object["parameters"].(type) {
		case nil:
			return parameters{}, nil
		case map[string]any:
			return value, nil
		default:
			return nil, typeError("Plan step parameters must be a mapping")
		}
	}
	return nil, valueError("Action plan missing step '" + string(step) + "'")
}

// patches says that the plan has a step patch, whose allow-list says which files the
// run may alter.
func (p plan) patches() bool {
	return slices.ContainsFunc(p, func(entry any) bool { return store.StepName(entry) == string(store.StepPatch) })
}

// target returns the compose project and service that a plan is about: what its
// commands name, else its parameters, else the profile.
func (p plan) target(known policy.Service) (project, service string) {
	project, service = known.ComposeProject, known.ComposeService
	for _, step := range []store.Step{store.StepRestart, store.StepBuild, store.StepVerify} {
		found, failure := p.find(step)
		if failure != nil {
			continue
		}
		if text, _ := found["composeProject"].(string); text != "" {
			project = text
		}
		if text, _ := found["service"].(string); text != "" {
			service = text
		}
		command, failure := parseCommand(found["command"])
		if failure != nil {
			continue
		}
		if line, isCompose := compose.ParseTarget(command); isCompose {
			if line.Project != "" {
				project = line.Project
			}
			if line.Service() != "" {
				service = line.Service()
			}
			break
		}
	}
	return project, service
}

// falsy says that Python's "not value" is true.
func falsy(value any) bool {
	switch v := value.(type) {
	case nil:
		return true
	case bool:
		return !v
	case string:
		return v == ""
	case json.Number:
		number, err := v.Float64()
		return err == nil && number == 0
	case []any:
		return len(v) == 0
	case map[string]any:
		return len(v) == 0
	}
	return false
}

// text reads a text parameter; a number counts as its text. Every value that is
// falsy, zero aside, means missing.
func (p parameters) text(name, missing string) (string, *Failure) {
	switch value := p[name].(type) {
	case string:
		if value != "" {
			return value, nil
		}
	case json.Number:
		return value.String(), nil
	default:
		if !falsy(value) {
			return "", typeError(fmt.Sprintf("Plan parameter %s must be a text", name))
		}
	}
	return missing, nil
}

// list reads a list parameter; every falsy value counts as an empty list.
func (p parameters) list(name string) ([]any, *Failure) {
	value := p[name]
	if falsy(value) {
		return nil, nil
	}
	list, isList := value.([]any)
	if !isList {
		return nil, typeError(fmt.Sprintf("Plan parameter %s must be a list", name))
	}
	return list, nil
}

// number reads a number as Python's float() does.
func (p parameters) number(name string, missing float64) (float64, *Failure) {
	value, given := p[name]
	if !given {
		return missing, nil
	}
	var text string
	switch v := value.(type) {
	case json.Number:
		text = v.String()
	case string:
		text = strings.TrimSpace(v)
	case bool:
		if v {
			return 1, nil
		}
		return 0, nil
	default:
		return 0, typeError(fmt.Sprintf("Plan parameter %s must be a number", name))
	}
	number, err := strconv.ParseFloat(text, 64)
	if err != nil || math.IsNaN(number) || math.IsInf(number, 0) {
		return 0, valueError(fmt.Sprintf("Plan parameter %s must be a number, not %q", name, text))
	}
	return number, nil
}

// timeLimit reads the step's own time limit, 0 for none.
func (p parameters) timeLimit() (time.Duration, *Failure) {
	seconds, failure := p.number("timeoutSeconds", 0)
	if failure != nil {
		return 0, failure
	}
	if seconds < 0 || seconds > largest {
		return 0, valueError("Plan parameter timeoutSeconds must be a number of seconds")
	}
	return time.Duration(seconds * float64(time.Second)), nil
}

// largest is the largest number of a plan's parameters. The limit keeps durations
// from overflowing.
const largest = 1 << 31

// whole reads a number as Python's int() does: it drops the fraction.
func (p parameters) whole(name string, missing int) (int, *Failure) {
	number, failure := p.number(name, float64(missing))
	if failure != nil {
		return 0, failure
	}
	if math.Abs(number) > largest {
		return 0, valueError(fmt.Sprintf("Plan parameter %s is too large", name))
	}
	return int(number), nil
}

// parseCommand reads a command of a plan. The result may be empty.
func parseCommand(value any) ([]string, *Failure) {
	switch list := value.(type) {
	case string:
		return nil, commandError("Command strings are not supported; provide a sequence of arguments")
	case []any:
		command := make([]string, 0, len(list))
		for _, element := range list {
			word, isText := element.(string)
			if !isText {
				return nil, commandError("Command sequences must contain only strings")
			}
			if strings.ContainsRune(word, 0) {
				return nil, commandError("Command arguments must not contain NUL")
			}
			command = append(command, word)
		}
		return command, nil
	}
	return nil, commandError("Command must be a sequence of strings")
}

// formatCommand writes a command as logs show it.
func formatCommand(command []string) string { return strings.Join(command, " ") }

// instructionLine writes a text on one line.
func instructionLine(text string) string {
	return artifacts.Trim(strings.NewReplacer("\r", " ", "\n", " ").Replace(text))
}
