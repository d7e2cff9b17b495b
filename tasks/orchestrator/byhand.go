package orchestrator

import (
	"slices"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/change"
	"github.com/moonladderstudios/mm-orchestrator/compose"
)

// A HandStep is something that an operator can do by hand with what is kept of a
// run.
type HandStep struct {
	// What it does, in words.
	What string `json:"what"`
	// Commands are lines for a shell, to be run one after the other in Directory. FILE
	// stands for the path of a file, relative to the top of the work tree.
	Directory string   `json:"directory"`
	Commands  []string `json:"commands"`
}

// ByHand returns how the change of a run is taken back by hand.
func ByHand(runID string, record change.Record) []HandStep {
	var steps []HandStep
	if files := record.Files; files != nil && files.Baseline != "" {
		baseline, aside := change.Ref(runID, baselineRef), change.Ref(runID, asideRef)
		steps = append(steps,
			HandStep{"show a file as it was before the run", files.Top, []string{"git show " + baseline + ":FILE"}},
			HandStep{"bring a file back to what it was before the run", files.Top, []string{"git restore --source=" + baseline + " --worktree -- FILE"}},
			HandStep{"list what a rollback has set aside", files.Top, []string{"git ls-tree -r --name-only " + aside}},
			HandStep{"bring back a file that was set aside", files.Top, []string{"git restore --source=" + aside + " --worktree -- FILE"}},
		)
	}
	if commands := imageByHand(record.Image); len(commands) > 0 {
		steps = append(steps, HandStep{"bring back the image and the container of before the run", record.Image.Workspace, commands})
	}
	if image := record.Image; image != nil && len(image.Volumes) > 0 {
		step := HandStep{What: "remove the volumes, with their data, that were not there before the run", Directory: image.Workspace}
		for _, name := range image.Volumes {
			step.Commands = append(step.Commands, pasted(removeVolume(name)))
		}
		steps = append(steps, step)
	}
	return steps
}

// pasted writes a command line for a shell.
func pasted(command []string) string {
	words := make([]string, len(command))
	for i, word := range command {
		words[i] = change.ShellQuote(word)
	}
	return strings.Join(words, " ")
}

func removeVolume(name string) []string { return []string{"docker", "volume", "rm", name} }

// imageByHand returns the commands that bring back image and containers. There are
// none if the run's target had no container.
func imageByHand(image *change.Image) []string {
	if image == nil {
		return nil
	}
	var lines []string
	target := compose.Target{Prefix: image.Compose}
	for _, before := range image.Before.Containers {
		if !image.IsTarget(before.Service) {
			continue
		}
		if change.CanBeNamed(before.Image) {
			lines = append(lines, "docker tag "+before.ImageID+" "+before.Image)
		}
		lines = append(lines, pasted(append(target.BackCommand(before.Service, len(image.Before.Of(before.Service)), true), "--force-recreate")))
	}
	return slices.Compact(lines)
}

// byHand says how to bring back image and containers by hand.
func (r *imageRestore) byHand() string {
	lines := imageByHand(r.record.Image)
	if len(lines) == 0 {
		return "See the log for what was done"
	}
	return "By hand, in " + r.record.Image.Workspace + ": " + strings.Join(lines, " && ")
}
