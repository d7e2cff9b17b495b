package compose

import (
	"context"
	"regexp"
	"slices"
	"strings"

	"github.com/moby/moby/client"
)

// buildsIn is the line with which the engine's classic builder, which compose uses where
// there is no buildx, names the container of a step.
var buildsIn = regexp.MustCompile(`(?m)^ ---> Running in ([0-9a-f]{12})[ \t\r]*$`)

// BuildContainers returns the ids of the containers that the output of a build names.
// The builder removes them, but not that of a step that has failed.
func BuildContainers(output []byte) []string {
	var ids []string
	for _, found := range buildsIn.FindAllSubmatch(output, -1) {
		if id := string(found[1]); !slices.Contains(ids, id) {
			ids = append(ids, id)
		}
	}
	return ids
}

// RemoveBuildContainer removes a container of BuildContainers with its volumes, and
// returns whether it has. It leaves alone what runs, and what is no container of a
// build: a step may print any id.
func (e *Engine) RemoveBuildContainer(ctx context.Context, id string) (bool, error) {
	inspection, found, err := e.InspectContainer(ctx, id)
	if isNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	labels := inspection.config.Labels
	ours := slices.ContainsFunc([]string{labelHash, labelHook, LabelPin, labelHelper, labelToEnd}, func(label string) bool { return labels[label] != "" })
	ended := found.State == "created" || found.State == "exited"
	if ours || !ended || !strings.HasPrefix(found.ID, id) || !strings.HasPrefix(found.Image, "sha256:") {
		return false, nil
	}
	return true, e.removeContainer(ctx, found.ID, client.ContainerRemoveOptions{RemoveVolumes: true})
}
