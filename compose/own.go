package compose

import (
	"context"
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// An OwnContainer is the container that this process runs in.
type OwnContainer struct {
	ID, Name string
	// Project and Service are compose's names for it, or "" if compose has not
	// created it.
	Project, Service string
	// ImageID is the id of its image.
	ImageID string

	inspection Inspection
}

var (
	containerID = regexp.MustCompile(`[0-9a-f]{64}`)
	// ownHostname is the engine's default host name of a container.
	ownHostname = regexp.MustCompile(`^[0-9a-f]{12}$`)
	// ownFiles are mounted into every container by the engine, from a folder that
	// has the container's id as its name.
	ownFiles = []string{"/etc/hostname", "/etc/hosts", "/etc/resolv.conf"}
)

// OwnCandidates returns the ids of containers that a process may be running in,
// likeliest first. mountinfo and cgroup are the contents of /proc/self/mountinfo
// and /proc/self/cgroup. Only the engine knows which of them it has, see
// [Engine.Own].
//
// On a host, mountinfo also names the containers that run there, at other mount
// points. The ids there are not the process's.
func OwnCandidates(mountinfo, cgroup, hostname string) []string {
	var ids []string
	add := func(id string) {
		if id != "" && !slices.Contains(ids, id) {
			ids = append(ids, id)
		}
	}
	for line := range strings.Lines(mountinfo) {
		fields := strings.Fields(line) // id, parent, device, root, mount point, …
		if len(fields) > 4 && slices.Contains(ownFiles, fields[4]) {
			add(containerID.FindString(fields[3]))
		}
	}
	for line := range strings.Lines(cgroup) {
		if path := strings.SplitN(strings.TrimSpace(line), ":", 3); len(path) == 3 {
			add(containerID.FindString(path[2][strings.LastIndexByte(path[2], '/')+1:]))
		}
	}
	if ownHostname.MatchString(hostname) {
		add(hostname)
	}
	return ids
}

// Own returns the container among the candidates that this engine runs. It
// returns nil if there is none: then the process runs outside of containers, or
// in one of another engine, and nothing that this engine does stops it.
func (e *Engine) Own(ctx context.Context, candidates []string) (*OwnContainer, error) {
	for _, id := range candidates {
		inspection, c, err := e.InspectContainer(ctx, id)
		if isNotFound(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if !strings.HasPrefix(c.ID, id) || c.State != "running" {
			continue // another container that has this id as its name
		}
		return &OwnContainer{
			ID: c.ID, Name: c.Name, ImageID: c.ImageID, inspection: inspection,
			Project: inspection.config.Labels[labelProject], Service: inspection.config.Labels[labelService],
		}, nil
	}
	return nil, nil
}

func (o OwnContainer) String() string { return fmt.Sprintf("%s (%.12s)", o.Name, o.ID) }

// A Model is what matters here of a project as compose reads it from its files.
type Model struct {
	// Name is the project's name.
	Name     string                  `json:"name"`
	Services map[string]ModelService `json:"services"`
}

// A ModelService is a service of a [Model].
type ModelService struct {
	// DependsOn has the services that this one needs, by name.
	DependsOn map[string]struct {
		// Restart says that compose restarts this service with the other.
		Restart bool `json:"restart"`
		// Condition is what this one waits for, such as service_started.
		Condition string `json:"condition"`
	} `json:"depends_on"`
	// NetworkMode, IPC and PID are "service:NAME" for a service whose namespace
	// this one shares. VolumesFrom names services in the same way as compose files
	// do: NAME or NAME:ro.
	NetworkMode string   `json:"network_mode"`
	IPC         string   `json:"ipc"`
	PID         string   `json:"pid"`
	VolumesFrom []string `json:"volumes_from"`
}

// follows says that compose replaces or restarts the service when it replaces the
// other one.
func (s ModelService) follows(other string) bool {
	shares := "service:" + other
	return s.DependsOn[other].Restart || s.NetworkMode == shares || s.IPC == shares || s.PID == shares ||
		slices.ContainsFunc(s.VolumesFrom, func(from string) bool { return from == other || strings.HasPrefix(from, other+":") })
}

// ModelCommand returns the command line that prints the [Model] of the project
// which a compose command line acts on. It returns false for other programs.
func ModelCommand(argv []string) ([]string, bool) {
	target, isCompose := ParseTarget(argv)
	if !isCompose {
		return nil, false
	}
	return target.with("config", "--format", "json"), true
}

// ParseModel parses the output of [ModelCommand].
func ParseModel(output []byte) (Model, error) {
	var m Model
	if err := json.Unmarshal(output, &m); err != nil {
		return Model{}, fmt.Errorf("compose's project: %w", err)
	}
	return m, nil
}

// stopping are the compose subcommands that stop, replace or suspend containers.
var stopping = []string{"up", "create", "restart", "stop", "kill", "down", "rm", "pause", "scale"}

// MayStop says that a command line is one that StoppedBy has to judge.
func MayStop(argv []string) bool {
	if target, isCompose := ParseTarget(argv); isCompose {
		return slices.Contains(stopping, target.Subcommand) && !target.DryRun
	}
	return dockerStops(argv) >= 0
}

// MayChange says whether a command line may create, replace, start or stop containers,
// and whether it may give image names to other images.
func MayChange(argv []string) (containers, images bool) {
	if target, isCompose := ParseTarget(argv); isCompose {
		if target.DryRun {
			return false, false
		}
		containers = MayStop(argv) || slices.Contains([]string{"start", "unpause", "run"}, target.Subcommand)
		return containers, containers || target.Subcommand == "build" || target.Subcommand == "pull"
	}
	if len(argv) == 0 || argv[0] != "docker" {
		return false, false
	}
	has := func(words ...string) bool {
		return slices.ContainsFunc(argv[1:], func(word string) bool { return slices.Contains(words, word) })
	}
	return MayStop(argv) || has("start", "unpause", "run", "create"), has("build", "pull", "tag", "rmi", "load", "import", "commit")
}

// StoppedBy says why a command line may stop the container, or returns "" if it
// does not. It is told the project that the command line acts on; the model
// counts only for compose's command lines.
//
// A service that only shares the image with the container's is not among the
// reasons: a build for one gives both a new image, and compose replaces the other
// only if the command covers it.
func (o OwnContainer) StoppedBy(argv []string, model Model) string {
	target, isCompose := ParseTarget(argv)
	if !isCompose {
		return o.stoppedByDocker(argv)
	}
	if !slices.Contains(stopping, target.Subcommand) || target.DryRun || o.Service == "" || o.Project != model.Name {
		return ""
	}
	services := target.Services
	if len(services) == 0 {
		return "the command covers all services of project " + model.Name + ", also " + o.Service
	}
	if slices.Contains(services, o.Service) {
		return "service " + o.Service + " is the one that this worker runs in"
	}
	if target.Subcommand != "up" && target.Subcommand != "create" {
		return ""
	}
	covered := slices.Clone(services)
	for i := 0; !noDeps(argv) && i < len(covered); i++ {
		for needed := range model.Services[covered[i]].DependsOn {
			if needed == o.Service {
				return "service " + covered[i] + " depends on " + o.Service + ", in which this worker runs, and the command has no --no-deps"
			}
			if !slices.Contains(covered, needed) {
				covered = append(covered, needed)
			}
		}
	}
	if i := slices.IndexFunc(covered, model.Services[o.Service].follows); i >= 0 {
		return "compose replaces " + o.Service + ", in which this worker runs, together with " + covered[i]
	}
	return ""
}

// dockerStops returns where the subcommand of the docker program is that stops
// containers, -1 for other command lines.
func dockerStops(argv []string) int {
	if len(argv) == 0 || argv[0] != "docker" {
		return -1
	}
	return slices.IndexFunc(argv, func(word string) bool {
		return slices.Contains([]string{"restart", "stop", "kill", "rm", "pause"}, word)
	})
}

// stoppedByDocker is StoppedBy for the docker program.
func (o OwnContainer) stoppedByDocker(argv []string) string {
	i := dockerStops(argv)
	if i < 0 {
		return ""
	}
	for _, word := range argv[i+1:] {
		if word == o.Name || len(word) >= 4 && strings.HasPrefix(o.ID, word) {
			return "container " + o.Name + " is the one that this worker runs in"
		}
	}
	return ""
}
