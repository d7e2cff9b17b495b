package store

import (
	"bytes"
	"encoding/json"
	"errors"
	"slices"
)

// ErrPlanNotAList is what ParsePlan returns for a plan that is another JSON value.
var ErrPlanNotAList = errors.New("a plan must be a list of steps")

// ParsePlan decodes orchestrator_action_plans.steps, which anybody with access to
// the table may have written: an entry may be of any type. Numbers are of type
// json.Number. NULL and JSON's null are an empty plan.
func ParsePlan(column json.RawMessage) ([]any, error) {
	if len(column) == 0 {
		return nil, nil
	}
	decoder := json.NewDecoder(bytes.NewReader(column))
	decoder.UseNumber()
	var value any
	if err := decoder.Decode(&value); err != nil {
		return nil, err
	}
	plan, isList := value.([]any)
	if value != nil && !isList {
		return nil, ErrPlanNotAList
	}
	return plan, nil
}

// StepName returns the name of a plan's entry, which is an object or a bare string
// (docs/moonmind.md#the-plan), or "".
func StepName(entry any) string {
	if object, isObject := entry.(map[string]any); isObject {
		entry = object["name"]
	}
	name, _ := entry.(string)
	return name
}

// stepsIn are the known steps of a plan in its order. A plan that cannot be parsed
// has none.
func stepsIn(plan json.RawMessage) []Step {
	entries, _ := ParsePlan(plan)
	var steps []Step
	for _, entry := range entries {
		if step := Step(StepName(entry)); step.Known() {
			steps = append(steps, step)
		}
	}
	return steps
}

// hasRollback says whether a plan has a rollback step.
func hasRollback(plan json.RawMessage) bool { return slices.Contains(stepsIn(plan), StepRollback) }

// planSteps are the steps of a plan in its order, without the rollback and
// without unknown names.
func planSteps(plan json.RawMessage) []Step {
	return slices.DeleteFunc(stepsIn(plan), func(step Step) bool { return step == StepRollback })
}

// lastStep is the last step of a plan, the rollback not counted, or "".
func lastStep(plan json.RawMessage) Step {
	steps := planSteps(plan)
	if len(steps) == 0 {
		return ""
	}
	return steps[len(steps)-1]
}

// nextStep is the first step of a plan that has not succeeded, or "".
func nextStep(plan json.RawMessage, done map[Step]bool) Step {
	for _, step := range planSteps(plan) {
		if !done[step] {
			return step
		}
	}
	return ""
}
