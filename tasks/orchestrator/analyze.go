package orchestrator

import (
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
)

// analyze writes down what is to be done (docs/moonmind.md#analyze).
func (s *stepRun) analyze() (done, *Failure) {
	name, failure := s.params.text("logArtifact", "analyze.log")
	if failure != nil {
		return done{}, failure
	}
	instruction, failure := s.params.text("instruction", "")
	if failure != nil {
		return done{}, failure
	}
	notes, failure := s.params.text("notes", "")
	if failure != nil {
		return done{}, failure
	}
	lines := []string{"Instruction: " + instructionLine(instruction), "Target service: " + s.profile.service}
	if notes != "" {
		lines = append(lines, notes)
	}
	faultpoint.Hit(faultpoint.ArtifactBefore, s.runID, string(s.step))
	file, err := s.dir.Write(name, strings.Join(lines, "\n"))
	if err != nil {
		return done{}, artifactError(err)
	}
	faultpoint.Hit(faultpoint.ArtifactWritten, s.runID, string(s.step))
	return done{message: "Analysis complete", files: []artifacts.File{file}, payload: logPayload{file.Path}}, nil
}
