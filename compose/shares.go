package compose

import (
	"slices"
	"strings"

	"github.com/moby/moby/api/types/container"
)

// containerMode is how a namespace of another container is named.
const containerMode = "container:"

// sharedBy returns the containers whose namespaces a container uses, each once. The
// engine finds them by the id when the container starts: once such a container was
// replaced, the one that uses it has no network, and cannot be started any more.
func sharedBy(config *container.HostConfig) (ids []string) {
	for _, mode := range []string{string(config.NetworkMode), string(config.IpcMode), string(config.PidMode)} {
		if id, shares := strings.CutPrefix(mode, containerMode); shares && !slices.Contains(ids, id) {
			ids = append(ids, id)
		}
	}
	return ids
}

// volumesFrom returns the containers whose volumes a container has. The engine finds
// them by the id when the container is created.
func volumesFrom(config *container.HostConfig) (ids []string) {
	for _, from := range config.VolumesFrom {
		id, _, _ := strings.Cut(from, ":") // the rest says how they are mounted
		ids = append(ids, id)
	}
	return ids
}

// Sharing returns the inspection with other containers in place of those whose
// namespaces or volumes it uses: places has the new ids by the old ones.
func (i Inspection) Sharing(places map[string]string) Inspection {
	moved := func(mode string) string {
		if id, shares := strings.CutPrefix(mode, containerMode); shares && places[id] != "" {
			return containerMode + places[id]
		}
		return mode
	}
	i.hostConfig.NetworkMode = container.NetworkMode(moved(string(i.hostConfig.NetworkMode)))
	i.hostConfig.IpcMode = container.IpcMode(moved(string(i.hostConfig.IpcMode)))
	i.hostConfig.PidMode = container.PidMode(moved(string(i.hostConfig.PidMode)))
	i.hostConfig.VolumesFrom = slices.Clone(i.hostConfig.VolumesFrom)
	for n, from := range i.hostConfig.VolumesFrom {
		if id, mode, given := strings.Cut(from, ":"); places[id] != "" {
			i.hostConfig.VolumesFrom[n] = places[id]
			if given {
				i.hostConfig.VolumesFrom[n] += ":" + mode
			}
		}
	}
	return i
}
