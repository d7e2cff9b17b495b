package orchestrator

import (
	"context"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
)

// analyze writes the run's instruction to a log (docs/moonmind.md#analyze).
func (s *stepRun) analyze(context.Context) (success, *Failure) {
	name, failure := s.params.text("logArtifact", "analyze.log")
	if failure != nil {
		return success{}, failure
	}
	instruction, failure := s.params.text("instruction", "")
	if failure != nil {
		return success{}, failure
	}
	notes, failure := s.params.text("notes", "")
	if failure != nil {
		return success{}, failure
	}
	lines := []string{"Instruction: " + instructionLine(instruction), "Target service: " + s.profile.ComposeService}
	if notes != "" {
		lines = append(lines, notes)
	}
	faultpoint.Hit(faultpoint.ArtifactBefore, s.runID, string(s.step))
	file, err := s.dir.Write(name, strings.Join(lines, "\n"))
	if err != nil {
		return success{}, artifactError(err)
	}
	faultpoint.Hit(faultpoint.ArtifactWritten, s.runID, string(s.step))
	return success{message: "Analysis complete", files: []artifacts.File{file}, payload: logPayload{file.Path}}, nil
}
