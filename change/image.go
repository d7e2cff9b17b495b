package change

import (
	"cmp"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/compose"
)

// Image is the change of a run to the images and containers of a compose project:
// what was there before, and what keeps it. It has ids, names and settings of networks; the configuration
// of containers, which contains secrets, is in the pins.
type Image struct {
	// EngineSeen says that the engine that compose uses has answered this worker.
	// Without it, nothing else is known, and nothing can be brought back.
	EngineSeen bool `json:"engineSeen"`
	// At is the time of the record.
	At time.Time `json:"at"`
	// Again says that an earlier attempt of the run was rolled back.
	Again bool `json:"again,omitempty"`
	// Project is the compose project. Services are those that the plan's commands
	// act on, nil for all of it.
	Project  string   `json:"project,omitempty"`
	Services []string `json:"services,omitempty"`
	// Compose is the program and its global options with which the plan calls
	// compose, in the directory Workspace.
	Compose   []string `json:"compose,omitempty"`
	Workspace string   `json:"workspace,omitempty"`
	// Before is the project before the run.
	Before Project `json:"before"`
	// Answered says that the plan's health check had the expected answer before the
	// run.
	Answered bool `json:"answered,omitempty"`
	// Names are the image names that the run may give to other images.
	Names []ImageName `json:"names,omitempty"`
	// Pins keep the images of before.
	Pins []Pin `json:"pins,omitempty"`
	// Ready says that all pins were made and checked. Before that, the run has
	// changed nothing of the project.
	Ready bool `json:"ready,omitempty"`

	// RestartBegun is the time from which on the run may have replaced containers.
	RestartBegun *time.Time `json:"restartBegun,omitempty"`
	// LastRestart is the time from which on the run may have created containers that no
	// proof of a restart has seen: that of the first command since the last proof.
	LastRestart *time.Time `json:"lastRestart,omitempty"`
	// Compared says that the other services were compared with Before after the
	// last restart command. Until then, Touched and Appeared may lack something: the
	// command has failed, or its worker was killed.
	Compared bool `json:"compared,omitempty"`
	// Touched are other services that the restart has changed although it must not.
	// Appeared are containers of other services that it has created.
	Touched  []string `json:"touched,omitempty"`
	Appeared []string `json:"appeared,omitempty"`
	// Volumes are volumes that a rollback has found and that were not there before the
	// run. It keeps them: they may have data.
	Volumes []string `json:"volumes,omitempty"`
	// Anonymous are volumes that the engine has made for containers of the run, and
	// which a rollback has not removed yet.
	Anonymous []string `json:"anonymous,omitempty"`
	// Restored says that a rollback has brought all of it back. The next step that
	// changes something again makes a new record.
	Restored bool `json:"restored,omitempty"`
}

// A Project is what the engine had of a compose project at one moment.
type Project struct {
	Containers []Container `json:"containers,omitempty"`
	// Hooks are containers in which compose has run pre_start hooks.
	Hooks    []Container `json:"hooks,omitempty"`
	Networks []Network   `json:"networks,omitempty"`
	Volumes  []Volume    `json:"volumes,omitempty"`
}

// A Container is what is compared of a container.
type Container struct {
	ID      string `json:"id"`
	Name    string `json:"name"`
	Service string `json:"service"`
	Number  int    `json:"number,omitempty"`
	ImageID string `json:"imageId"`
	// Image is the name with which the container was created.
	Image      string    `json:"image"`
	ConfigHash string    `json:"configHash,omitempty"`
	State      string    `json:"state"`
	Health     string    `json:"health,omitempty"`
	ExitCode   int       `json:"exitCode,omitempty"`
	StartedAt  time.Time `json:"startedAt"`
	Restarts   int       `json:"restarts,omitempty"`
	// RestartPolicy is no, always, unless-stopped or on-failure.
	RestartPolicy string `json:"restartPolicy,omitempty"`
	// DependsOn is [compose.Container].DependsOn.
	DependsOn string `json:"dependsOn,omitempty"`
	// Volumes are names of volumes, also of anonymous ones, by path.
	Volumes map[string]string `json:"volumes,omitempty"`
	// Shares are the ids of the containers whose namespaces it uses.
	Shares []string `json:"shares,omitempty"`
	// VolumesFrom are the ids of the containers whose volumes it has.
	VolumesFrom []string `json:"volumesFrom,omitempty"`
	// Networks has the ids of its networks by name, "" for one in which the engine has
	// given it no place yet. A record of an older version has none.
	Networks map[string]string `json:"networks,omitempty"`
	// replaces, created and ownVolumes are [compose.Container].Replaces, Created and
	// OwnVolumes.
	replaces   bool
	created    time.Time
	ownVolumes []string
}

// A Network is a network of a project.
type Network struct {
	Name string `json:"name"`
	ID   string `json:"id"`
	// Settings are nil in a record of an older version.
	Settings *compose.NetworkSettings `json:"settings,omitempty"`
}

// A Volume is a named volume of a project.
type Volume struct {
	Name string `json:"name"`
}

// An ImageName is which image a name stood for.
type ImageName struct {
	Name string `json:"name"`
	// ID is "" if there was no image of that name.
	ID string `json:"id,omitempty"`
}

// A Pin keeps an image, and the configuration of a container that ran it.
type Pin struct {
	// Name is the name of the pin's container.
	Name string `json:"name"`
	// ImageID is the image; RepoDigests are under which digests registries have it.
	ImageID     string   `json:"imageId"`
	RepoDigests []string `json:"repoDigests,omitempty"`
	// Service is whose image it is. Container is the id of the container whose
	// configuration the pin has, "" for none.
	Service   string `json:"service,omitempty"`
	Container string `json:"container,omitempty"`
	// Files are the paths of the files that the pin has of that container, see
	// [compose.Engine.ReadFiles].
	Files []string `json:"files,omitempty"`
	// Archive is the file with the saved image, "" if none is kept.
	Archive string `json:"archive,omitempty"`
}

// ProjectOf returns what is compared of a project.
func ProjectOf(project compose.Project) Project {
	p := Project{Containers: containersOf(project.Containers), Hooks: containersOf(project.Hooks)}
	for _, network := range project.Networks {
		p.Networks = append(p.Networks, Network{network.Name, network.ID, &network.Settings})
	}
	for _, volume := range project.Volumes {
		p.Volumes = append(p.Volumes, Volume{volume.Name})
	}
	return p
}

func containersOf(list []compose.Container) (all []Container) {
	for _, c := range list {
		all = append(all, Container{
			ID: c.ID, Name: c.Name, Service: c.Service, Number: c.Number, ImageID: c.ImageID, Image: c.Image, ConfigHash: c.ConfigHash,
			State: c.State, Health: c.Health, ExitCode: c.ExitCode, StartedAt: c.StartedAt, Restarts: c.Restarts, RestartPolicy: c.RestartPolicy, DependsOn: c.DependsOn, Volumes: c.Volumes, Networks: c.NetworkIDs, Shares: c.Shares, VolumesFrom: c.VolumesFrom, replaces: c.Replaces, created: c.Created, ownVolumes: c.OwnVolumes,
		})
	}
	return all
}

// Of returns the containers of a service, by number.
func (p Project) Of(service string) []Container {
	var found []Container
	for _, c := range p.Containers {
		if c.Service == service {
			found = append(found, c)
		}
	}
	slices.SortStableFunc(found, func(a, b Container) int { return cmp.Compare(a.Number, b.Number) })
	return found
}

// ByID finds a container, false if it is not there.
func (p Project) ByID(id string) (Container, bool) {
	for _, c := range p.Containers {
		if c.ID == id {
			return c, true
		}
	}
	return Container{}, false
}

// Services lists the services that have containers, sorted.
func (p Project) Services() []string {
	var services []string
	for _, c := range p.Containers {
		services = append(services, c.Service)
	}
	slices.Sort(services)
	return slices.Compact(services)
}

// IsTarget says that the plan's commands act on a service.
func (i *Image) IsTarget(service string) bool {
	return len(i.Services) == 0 || slices.Contains(i.Services, service)
}

// Describe names the services that the plan's commands act on.
func (i *Image) Describe() string {
	switch len(i.Services) {
	case 0:
		return "all services"
	case 1:
		return "service " + i.Services[0]
	}
	return "services " + strings.Join(i.Services, ", ")
}

// NameBefore returns which image a name stood for, "" for none. It returns false
// for a name that is not recorded.
func (i *Image) NameBefore(name string) (string, bool) {
	for _, known := range i.Names {
		if known.Name == name {
			return known.ID, true
		}
	}
	return "", false
}

// temporaryName is the name under which compose creates a container that is to
// replace another one: that one's id, and its name.
var temporaryName = regexp.MustCompile(`^[0-9a-f]{12}_(.+)$`)

// FinalName returns the name that a container has once it has replaced the one
// before it. It returns false if the container has that name already.
func FinalName(name string) (string, bool) {
	found := temporaryName.FindStringSubmatch(name)
	if found == nil {
		return name, false
	}
	return found[1], true
}

// TemporaryName is the name for a container that is to replace another one.
func TemporaryName(id, name string) string { return shortID(id) + "_" + name }

// A Repair is what mends an interrupted `docker compose up`: it leaves the new
// container under a temporary name, beside the old one or alone. Compose would
// refuse the next `up` because the name is taken, or run the service under that
// name.
type Repair struct {
	Container Container
	// Name is the name to give to the container. "" means that the container was
	// never started and has to be removed: the one that it was to replace is there.
	Name string
}

// Repairs returns what to do about the temporary containers of the services that
// act accepts, in the order in which it must be done. It is empty when there is
// nothing to mend.
func (p Project) Repairs(act func(service string) bool) []Repair {
	var repairs []Repair
	taken := map[string]bool{}
	for _, c := range p.Containers {
		if _, temporary := FinalName(c.Name); !temporary || !c.replaces {
			taken[c.Name] = true
		}
	}
	// The youngest is the one that compose would have kept. A container that was
	// removed in the meantime frees no name.
	candidates := slices.Clone(p.Containers)
	slices.SortStableFunc(candidates, func(a, b Container) int { return b.StartedAt.Compare(a.StartedAt) })
	for _, c := range candidates {
		name, temporary := FinalName(c.Name)
		if !temporary || !c.replaces || !act(c.Service) {
			continue
		}
		if taken[name] {
			repairs = append(repairs, Repair{Container: c})
			continue
		}
		taken[name] = true
		repairs = append(repairs, Repair{Container: c, Name: name})
	}
	// Removals first: they free what a started container would need.
	slices.SortStableFunc(repairs, func(a, b Repair) int { return cmp.Compare(len(a.Name), len(b.Name)) })
	return repairs
}

// Mended returns the project as it is once its repairs are done for the services that
// act accepts. A run records that as the state before it: what an interrupted `up` had
// left even then is nothing to bring back.
func (p Project) Mended(act func(service string) bool) Project {
	p.Containers = slices.Clone(p.Containers)
	for _, repair := range p.Repairs(act) {
		i := slices.IndexFunc(p.Containers, func(c Container) bool { return c.ID == repair.Container.ID })
		if repair.Name == "" {
			p.Containers = slices.Delete(p.Containers, i, i+1)
		} else {
			p.Containers[i].Name = repair.Name
		}
	}
	return p
}

// String is the note about a repair in a log.
func (r Repair) String() string {
	if r.Name == "" {
		return fmt.Sprintf("Removed container %s: an interrupted `docker compose up` had left it beside the one that it was to replace", r.Container.Name)
	}
	return fmt.Sprintf("Renamed container %s to %s: a `docker compose up` was interrupted before it did that", r.Container.Name, r.Name)
}

// shortID is an id as docker shows it.
func shortID(id string) string { return id[:min(12, len(id))] }

// OtherChanges compares the containers of the services that are not the run's
// target, and says of each change what it is. A container that the engine's own
// restart policy has started again is not changed: it ended by itself. health says
// that it also reports a container that was healthy and is not. appeared are the ids
// of new containers, touched the services whose containers were changed.
func (i *Image) OtherChanges(now Project, health bool) (changes, touched, appeared []string) {
	for _, before := range i.Before.Containers {
		if i.IsTarget(before.Service) {
			continue
		}
		after, found := now.ByID(before.ID)
		text := ""
		switch {
		case !found:
			text = "was removed"
		case isUp(before.State) && !isUp(after.State) && after.wasStopped():
			text = "was " + before.State + ", is " + after.State
		case !isUp(before.State) && isUp(after.State):
			text = "was " + before.State + " and was started"
		case !after.StartedAt.Equal(before.StartedAt) && after.Restarts <= before.Restarts:
			text = "was started again"
		case health && before.Health == "healthy" && after.Health != "healthy":
			text = "was healthy, is " + cmp.Or(after.Health, after.State)
		case isUp(after.State) && i.CutOff(after, now) != "":
			text = "uses the network or processes of " + i.CutOff(after, now) + ", which was removed: name both services in the plan's restart"
		default:
			continue
		}
		touched = append(touched, before.Service)
		changes = append(changes, fmt.Sprintf("%s (container %s %s)", before.Service, shortID(before.ID), text))
	}
	for _, after := range now.Containers {
		if i.IsTarget(after.Service) {
			continue
		}
		if _, found := i.Before.ByID(after.ID); !found {
			appeared = append(appeared, after.ID)
			changes = append(changes, fmt.Sprintf("%s (container %s is new)", after.Service, shortID(after.ID)))
		}
	}
	slices.Sort(changes)
	return changes, touched, appeared
}

// CutOff returns the name of the container of before whose namespace a container
// uses although it was removed, "" for none.
func (i *Image) CutOff(c Container, now Project) string {
	for _, id := range c.Shares {
		before, known := i.Before.ByID(id)
		if _, found := now.ByID(id); known && !found {
			return before.Name
		}
	}
	return ""
}

// Places has, by the ids of the containers of before, which ones are in their places.
func (i *Image) Places(now Project) map[string]string {
	places := map[string]string{}
	for _, before := range i.Before.Containers {
		if c, found := i.InPlaceOf(before, now); found {
			places[before.ID] = c.ID
		}
	}
	return places
}

// AddOthers adds to the record what OtherChanges has found.
func (i *Image) AddOthers(touched, appeared []string) {
	i.Touched = slices.Compact(slices.Sorted(slices.Values(append(i.Touched, touched...))))
	i.Appeared = slices.Compact(slices.Sorted(slices.Values(append(i.Appeared, appeared...))))
}

// NewVolumes are the named volumes that the project had not before the restart.
func (i *Image) NewVolumes(now Project) []string {
	var added []string
	for _, volume := range now.Volumes {
		if i.RestartBegun != nil && !slices.Contains(i.Before.Volumes, volume) {
			added = append(added, volume.Name)
		}
	}
	return added
}

// AddAnonymous adds to the record the volumes that the engine has made for containers of
// the run. Nothing else names them: they would stay, one more with each run that fails.
// A container that was there when the run's restart began is somebody else's. It returns
// whether there are any that were not recorded.
func (i *Image) AddAnonymous(now Project) bool {
	if i.LastRestart == nil {
		return false
	}
	known := slices.Clone(i.Anonymous)
	for _, before := range i.Before.Containers {
		known = slices.AppendSeq(known, maps.Values(before.Volumes))
	}
	added := false
	for _, c := range now.Containers {
		if _, found := i.Before.ByID(c.ID); found || c.created.Before(*i.LastRestart) || !i.Restores(c.Service) && !slices.Contains(i.Appeared, c.ID) {
			continue
		}
		for _, name := range c.ownVolumes {
			if !slices.Contains(known, name) {
				i.Anonymous, known, added = append(i.Anonymous, name), append(known, name), true
			}
		}
	}
	return added
}

// wasStopped says that a container that does not run has not just ended by itself:
// the engine would have started it again, or a signal of the engine has ended it.
func (c Container) wasStopped() bool {
	return c.RestartPolicy == "always" || c.RestartPolicy == "unless-stopped" || c.ExitCode == 128+15 || c.ExitCode == 128+9
}

// isUp says that a container runs, or will again by itself.
func isUp(state string) bool { return state == "running" || state == "restarting" || state == "paused" }

// A Replacement is what a restart has done to the target's containers.
type Replacement struct {
	// Same are containers that the project had before the run.
	Same []Container
	// Stale are containers that do not run the image that their name stands for.
	Stale []Container
	// Missing are services of the target that had a container and have none.
	Missing []string
	// New is how many containers the run has created.
	New int
}

// Replaced compares the target's containers with those of before. wanted has the
// image that each image name stands for now; a name that is missing is not
// compared.
func (i *Image) Replaced(now Project, wanted map[string]string) Replacement {
	var r Replacement
	for _, c := range now.Containers {
		if !i.IsTarget(c.Service) {
			continue
		}
		if id := wanted[c.Image]; id != "" && id != c.ImageID {
			r.Stale = append(r.Stale, c)
		}
		if _, found := i.Before.ByID(c.ID); found {
			r.Same = append(r.Same, c)
		} else {
			r.New++
		}
	}
	for _, service := range i.Before.Services() {
		if i.IsTarget(service) && len(now.Of(service)) == 0 {
			r.Missing = append(r.Missing, service)
		}
	}
	return r
}
