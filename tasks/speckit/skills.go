package speckit

import (
	"crypto/sha256"
	"encoding/binary"
	"slices"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/store"
)

// SkillsPolicy is MoonMind's policy of which skill carries out a task of the chain
// (docs/spec-workflow.md#skills). This program carries out every task itself, as
// MoonMind does for its skill speckit: the policy is recorded for the reader.
type SkillsPolicy struct {
	// Disabled makes every task direct_only.
	Disabled bool
	// Canary is the percentage of runs and tasks that use skills, 0 to 100.
	Canary int
	// Shadow is recorded as shadowModeRequested.
	Shadow bool
	// Default is the skill of tasks for which Stages names none. Defaults to speckit.
	Default string
	// Stages are the skills by task.
	Stages map[store.SpecTask]string
	// Allowed, unless empty, are the skills that may be selected. Any other is
	// replaced by Default.
	Allowed []string
}

// decision is what the policy says about one task of a run.
type decision struct {
	skill     string
	useSkills bool
	shadow    bool
}

func (p SkillsPolicy) decide(runID string, task store.SpecTask, context *object) decision {
	skill := p.Stages[task]
	if overrides := context.inner("skill_overrides"); overrides != nil {
		if own := strings.TrimSpace(overrides.text(string(task))); own != "" {
			skill = own
		}
	}
	if skill == "" || len(p.Allowed) > 0 && !slices.Contains(p.Allowed, skill) {
		skill = p.Default
	}
	sum := sha256.Sum256([]byte(runID + ":" + string(task)))
	bucket := int(binary.BigEndian.Uint32(sum[:4]) % 100)
	return decision{skill: skill, useSkills: !p.Disabled && bucket < p.Canary, shadow: p.Shadow}
}

// addTo adds the fields to a payload. No task of ours fails in a way that makes
// MoonMind fall back from the skill to its direct path, so usedFallback is false.
func (d decision) addTo(o *object) {
	path := "direct_only"
	if d.useSkills {
		path = "skill"
	}
	o.set("selectedSkill", d.skill)
	o.set("executionPath", path)
	o.set("usedSkills", d.useSkills)
	o.set("usedFallback", false)
	o.set("shadowModeRequested", d.shadow)
}

// record sets the fields of one task in the context.
func (d decision) record(context *object, task store.SpecTask) {
	execution := context.inner("skill_execution")
	if execution == nil {
		execution = newObject()
	}
	fields := newObject()
	d.addTo(fields)
	execution.set(string(task), fields)
	context.set("skill_execution", execution)
}
