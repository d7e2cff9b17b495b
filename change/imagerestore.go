package change

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// ImageNow is what a rollback sees of a project, each time before it acts.
type ImageNow struct {
	Project Project
	// Images has the ids of the recorded images that the engine has.
	Images map[string]bool
	// Names has which image each recorded name stands for; "" for none.
	Names map[string]string
	// Differing has, by the id of a container, what of its configuration differs from
	// that of the container of before in its place. It is empty for a container whose
	// configuration is equal, or cannot be compared.
	Differing map[string][]string
	// Hashes has compose's hash of the configuration that the files have now, by
	// service; "" if compose does not tell.
	Hashes map[string]string
	// Tried are the services for which this rollback has run compose, or cannot.
	Tried map[string]bool
	// Kept are ids of networks, image names and volumes that stay: the engine refuses to
	// remove them, because something that is not the run's uses them, or they have data.
	Kept map[string]bool
}

// The acts of a rollback. Each can be repeated after a kill at any point.
const (
	// LoadImage brings the pinned image back from its archive.
	LoadImage = "load image"
	// MendContainer does Repair.
	MendContainer = "mend container"
	// TagImage gives Name to the image ID, UntagImage takes Name away.
	TagImage   = "tag image"
	UntagImage = "untag image"
	// ComposeUp lets compose replace the containers of Service by Count new ones.
	ComposeUp = "compose up"
	// ReplaceContainer puts a container like Before in the place of Container, which
	// may be missing.
	ReplaceContainer = "replace container"
	// These act on Container.
	StartContainer  = "start container"
	StopContainer   = "stop container"
	PauseContainer  = "pause container"
	RemoveContainer = "remove container"
	// RemoveNetwork removes Network, RemoveVolume the volume Name.
	RemoveNetwork = "remove network"
	RemoveVolume  = "remove volume"
	// ReplaceNetwork puts a network like NetworkBefore in the place of Network, which
	// may be missing. Containers lose their place in it; the next look sees that.
	ReplaceNetwork = "replace network"
)

// An Act is one act of a rollback on images and containers.
type Act struct {
	Do string
	// Why is the reason, for the log.
	Why string

	Service   string
	Container Container
	Before    Container
	Repair    Repair
	Name, ID  string
	Network   Network
	// NetworkBefore is the network that ReplaceNetwork makes again.
	NetworkBefore Network
	Count         int
	// Start says that ComposeUp starts the containers.
	Start bool
}

// Restore returns what a rollback has to do next, in order; nothing when all of it
// is as before. After the acts, the caller looks again.
func (i *Image) Restore(now ImageNow) []Act {
	// Compose and the engine connect containers to the networks that are there.
	if acts := i.restoreNetworks(now); len(acts) > 0 {
		return acts
	}
	acts, complete := i.restoreContainers(now)
	if len(acts) > 0 || !complete {
		return acts
	}
	for _, name := range i.Names {
		switch {
		case name.ID == now.Names[name.Name], now.Kept[name.Name]:
		case name.ID == "":
			acts = append(acts, Act{Do: UntagImage, Name: name.Name, Why: "no image had that name before the run"})
		default:
			acts = append(acts, i.load(now, name.ID, "")...)
			acts = append(acts, Act{Do: TagImage, Name: name.Name, ID: name.ID, Why: "the name stood for that image before the run"})
		}
	}
	for _, network := range now.Project.Networks {
		known := slices.ContainsFunc(i.Before.Networks, func(before Network) bool { return before.Name == network.Name })
		if i.RestartBegun != nil && !known && !now.Kept[network.ID] {
			acts = append(acts, Act{Do: RemoveNetwork, Network: network, Why: "the network was not there before the run"})
		}
	}
	for _, name := range i.Anonymous {
		if !now.Kept[name] {
			acts = append(acts, Act{Do: RemoveVolume, Name: name, Why: "the engine had made it for a container of the run, which is gone"})
		}
	}
	return acts
}

// restoreNetworks returns the acts for networks that the run has changed. The engine
// cannot change a network: a restart that changes one has made another.
func (i *Image) restoreNetworks(now ImageNow) (acts []Act) {
	for _, before := range i.Before.Networks {
		network, differing := i.networkNow(before, now.Project)
		if len(differing) > 0 && (network.ID == "" || !now.Kept[network.ID]) {
			acts = append(acts, Act{Do: ReplaceNetwork, Network: network, NetworkBefore: before, Why: strings.Join(differing, ", ")})
		}
	}
	return acts
}

// networkNow returns the network that is now in the place of one of before, and what
// of it differs.
func (i *Image) networkNow(before Network, now Project) (Network, []string) {
	if before.Settings == nil || i.RestartBegun == nil {
		return before, nil
	}
	at := slices.IndexFunc(now.Networks, func(n Network) bool { return n.Name == before.Name })
	if at < 0 {
		return Network{}, []string{"it is missing"}
	}
	network := now.Networks[at]
	if network.ID == before.ID || network.Settings == nil {
		return network, nil
	}
	var differing []string
	for _, name := range before.Settings.Differences(*network.Settings) {
		differing = append(differing, "other "+name)
	}
	return network, differing
}

// Restores says that a rollback is responsible for a service.
func (i *Image) Restores(service string) bool {
	return i.IsTarget(service) || slices.Contains(i.Touched, service)
}

// restoreContainers returns the next acts for containers. complete says that none is
// left to do.
func (i *Image) restoreContainers(now ImageNow) (acts []Act, complete bool) {
	for _, repair := range now.Project.Repairs(i.Restores) {
		acts = append(acts, Act{Do: MendContainer, Repair: repair, Container: repair.Container, Service: repair.Container.Service, Why: "a restart was interrupted"})
	}
	if len(acts) > 0 {
		return acts, false
	}
	for _, id := range i.Appeared {
		if c, found := now.Project.ByID(id); found {
			acts = append(acts, Act{Do: RemoveContainer, Container: c, Why: "the run has created it"})
		}
	}
	for _, c := range now.Project.Hooks {
		before := slices.ContainsFunc(i.Before.Hooks, func(hook Container) bool { return hook.ID == c.ID })
		if i.RestartBegun != nil && !before && i.Restores(c.Service) {
			acts = append(acts, Act{Do: RemoveContainer, Container: c, Service: c.Service, Why: "compose has created it for a hook in the run"})
		}
	}
	services := slices.Compact(slices.Sorted(slices.Values(slices.Concat(i.Before.Services(), now.Project.Services()))))
	of := map[string][]Act{}
	for _, service := range services {
		if i.Restores(service) {
			of[service] = i.restoreService(now, service)
		}
	}
	for _, service := range services {
		if !slices.ContainsFunc(i.sharedBy(service), func(other string) bool { return len(of[other]) > 0 }) {
			acts = append(acts, of[service]...)
		}
	}
	return acts, true
}

// sharedBy returns the other services whose namespaces or volumes the containers of one
// use. A container is made for the one that it shares, and started after it.
func (i *Image) sharedBy(service string) (others []string) {
	for _, c := range i.Before.Of(service) {
		for _, id := range slices.Concat(c.Shares, c.VolumesFrom) {
			if owner, found := i.Before.ByID(id); found && owner.Service != service {
				others = append(others, owner.Service)
			}
		}
	}
	return others
}

// restoreService returns the next acts for a service.
func (i *Image) restoreService(now ImageNow, service string) []Act {
	want, have := i.Before.Of(service), now.Project.Of(service)
	var acts []Act
	unequal := false
	for _, before := range want {
		c, found := inPlaceOf(before, have)
		unequal = unequal || !found || len(now.Differences(before, c)) > 0
	}
	var surplus []Container
	for _, c := range have {
		if !slices.ContainsFunc(want, func(before Container) bool { place, found := inPlaceOf(before, have); return found && place.ID == c.ID }) {
			surplus = append(surplus, c)
		}
	}
	if !unequal {
		for _, c := range surplus {
			acts = append(acts, Act{Do: RemoveContainer, Container: c, Service: service, Why: "the run has created it"})
		}
		for _, before := range want {
			c, _ := inPlaceOf(before, have)
			acts = append(acts, restoreState(before, c)...)
		}
		return acts
	}
	for _, before := range want {
		acts = append(acts, i.load(now, before.ImageID, service)...)
	}
	if i.canUseCompose(now, service, want) {
		first := want[0]
		if now.Names[first.Image] != first.ImageID {
			acts = append(acts, Act{Do: TagImage, Name: first.Image, ID: first.ImageID, Service: service, Why: "compose finds the image by that name"})
		}
		return append(acts, Act{Do: ComposeUp, Service: service, Count: len(want), Start: isUp(first.State), Why: "its container is not that of before the run"})
	}
	for _, c := range surplus {
		acts = append(acts, Act{Do: RemoveContainer, Container: c, Service: service, Why: "the run has created it"})
	}
	for _, before := range want {
		c, found := inPlaceOf(before, have)
		if found && len(now.Differences(before, c)) == 0 {
			continue
		}
		if CanBeNamed(before.Image) && now.Names[before.Image] != before.ImageID {
			acts = append(acts, Act{Do: TagImage, Name: before.Image, ID: before.ImageID, Service: service, Why: "the container is created by that name"})
		}
		acts = append(acts, Act{Do: ReplaceContainer, Container: c, Before: before, Service: service, Why: strings.Join(now.Differences(before, c), ", ")})
	}
	return acts
}

// canUseCompose says that compose, with the files as they are now, can make the
// containers of before. It cannot if they name the services that they depend on: a
// rollback touches no other service, and told so, compose leaves the names out. Nor can
// it if some of them ran and some did not: it starts all or none.
func (i *Image) canUseCompose(now ImageNow, service string, want []Container) bool {
	if len(i.sharedBy(service)) > 0 {
		return false // compose's hash of the configuration has the other container's id
	}
	if len(i.Compose) == 0 || len(want) == 0 || now.Tried[service] {
		return false
	}
	hash := now.Hashes[service]
	for _, c := range want {
		if isUp(c.State) != isUp(want[0].State) {
			return false
		}
		if c.ConfigHash == "" || c.DependsOn != "" || hash != "" && hash != c.ConfigHash || !CanBeNamed(c.Image) || c.Image != want[0].Image || c.ImageID != want[0].ImageID {
			return false
		}
	}
	return true
}

// CanBeNamed says that an image name is one that can be given to an image: not an
// id, and no digest.
func CanBeNamed(name string) bool {
	return name != "" && !strings.HasPrefix(name, "sha256:") && !strings.Contains(name, "@")
}

// load returns the act that brings an image back, nothing if it is there.
func (i *Image) load(now ImageNow, id, service string) []Act {
	if now.Images[id] {
		return nil
	}
	now.Images[id] = true // one act is enough
	return []Act{{Do: LoadImage, ID: id, Service: service, Why: "the engine has the image no more"}}
}

// inPlaceOf finds the container that is now in the place of one of before: itself,
// otherwise the one of the same name.
func inPlaceOf(before Container, have []Container) (Container, bool) {
	for _, c := range have {
		if c.ID == before.ID {
			return c, true
		}
	}
	for _, c := range have {
		if c.Name == before.Name {
			return c, true
		}
	}
	return Container{}, false
}

// InPlaceOf finds the container that is now in the place of one of before.
func (i *Image) InPlaceOf(before Container, now Project) (Container, bool) {
	return inPlaceOf(before, now.Of(before.Service))
}

// Differences lists what differs between a container of before and the one that is
// in its place now. It is empty for the same container, and for one that was made
// like it.
func (n ImageNow) Differences(before, now Container) []string {
	if now.ID == "" {
		return []string{"it is missing"}
	}
	differing := n.cutOff(before, now)
	if now.ID == before.ID {
		return append(differing, n.Differing[now.ID]...)
	}
	if now.ImageID != before.ImageID {
		differing = append(differing, fmt.Sprintf("image %s instead of %s", now.ImageID, before.ImageID))
	}
	if now.ConfigHash != before.ConfigHash {
		differing = append(differing, fmt.Sprintf("configuration %s instead of %s", cmp.Or(now.ConfigHash, "unknown to compose"), cmp.Or(before.ConfigHash, "unknown to compose")))
	}
	if !maps.Equal(now.Volumes, before.Volumes) {
		differing = append(differing, "other volumes")
	}
	return append(differing, n.Differing[now.ID]...)
}

// cutOff lists the networks of before in which a container has no place now. A
// compose that fails to replace a network leaves the containers of before so.
func (n ImageNow) cutOff(before, now Container) (missing []string) {
	for _, name := range slices.Sorted(maps.Keys(before.Networks)) {
		id, connected := now.Networks[name]
		is := func(network Network) bool { return network.Name == name && network.ID == id }
		named := func(network Network) bool { return network.Name == name }
		switch {
		case !connected:
			missing = append(missing, "it is not connected to network "+name)
		case id != "" && slices.ContainsFunc(n.Project.Networks, named) && !slices.ContainsFunc(n.Project.Networks, is):
			missing = append(missing, "it is connected to a network "+name+" that was removed")
		}
	}
	return missing
}

// restoreState returns the acts after which a container runs, or does not, as one
// did before.
func restoreState(before, now Container) []Act {
	act := Act{Container: now, Service: now.Service, Why: "it was " + before.State + " before the run"}
	switch {
	case before.State == "paused" && now.State == "paused":
		return nil
	case before.State == "paused" && isUp(now.State):
		act.Do = PauseContainer
	case isUp(before.State) && !isUp(now.State):
		if before.State == "restarting" {
			return nil // it has ended by itself before, and does again
		}
		if now.ID != before.ID && now.hasEnded() {
			return nil // it was started and has ended by itself
		}
		act.Do = StartContainer
	case !isUp(before.State) && isUp(now.State):
		act.Do = StopContainer
	default:
		return nil
	}
	return []Act{act}
}

// hasEnded says that a container was started once and runs no more.
func (c Container) hasEnded() bool { return !c.StartedAt.IsZero() && !isUp(c.State) }

// String is the line about an act in a log.
func (a Act) String() string {
	switch a.Do {
	case LoadImage:
		return "Loading image " + a.ID + ": " + a.Why
	case MendContainer:
		return a.Repair.String()
	case TagImage:
		return "Naming image " + a.ID + " " + a.Name + ": " + a.Why
	case UntagImage:
		return "Removing the image name " + a.Name + ": " + a.Why
	case ComposeUp:
		return "Replacing the container of service " + a.Service + ": " + a.Why
	case ReplaceContainer:
		return "Creating container " + a.Before.Name + " again: " + a.Why
	case StartContainer:
		return "Starting container " + a.Container.Name + ": " + a.Why
	case StopContainer:
		return "Stopping container " + a.Container.Name + ": " + a.Why
	case PauseContainer:
		return "Pausing container " + a.Container.Name + ": " + a.Why
	case ReplaceNetwork:
		return "Creating network " + a.NetworkBefore.Name + " again: " + a.Why
	case RemoveContainer:
		return "Removing container " + a.Container.Name + ": " + a.Why
	case RemoveNetwork:
		return "Removing network " + a.Network.Name + ": " + a.Why
	case RemoveVolume:
		return "Removing volume " + a.Name + ": " + a.Why
	}
	return a.Do
}

// Equal returns what the target has and had before the run: the ids of the images
// and compose's hashes of the configurations, as one text each. With what has
// changed, it returns the differences.
func (i *Image) Equal(now ImageNow) (images, configurations string, differences []string) {
	var ids, hashes []string
	for _, before := range i.Before.Containers {
		if !i.Restores(before.Service) {
			continue
		}
		c, _ := inPlaceOf(before, now.Project.Of(before.Service))
		for _, difference := range now.Differences(before, c) {
			differences = append(differences, fmt.Sprintf("container %s: %s", before.Name, difference))
		}
		if isUp(before.State) && c.ID != "" && !isUp(c.State) && before.State != "restarting" {
			differences = append(differences, fmt.Sprintf("container %s: it was %s, is %s", before.Name, before.State, c.State))
		}
		if i.IsTarget(before.Service) {
			ids, hashes = append(ids, before.ImageID), append(hashes, cmp.Or(before.ConfigHash, "of no compose file"))
		}
	}
	for _, c := range now.Project.Containers {
		if i.IsTarget(c.Service) && len(i.Before.Of(c.Service)) == 0 {
			differences = append(differences, fmt.Sprintf("container %s: it was not there", c.Name))
		}
	}
	for _, before := range i.Before.Networks {
		_, differing := i.networkNow(before, now.Project)
		for _, difference := range differing {
			differences = append(differences, fmt.Sprintf("network %s: %s", before.Name, difference))
		}
	}
	for _, name := range i.Names {
		if now.Names[name.Name] != name.ID && !now.Kept[name.Name] {
			differences = append(differences, fmt.Sprintf("image name %s: it stands for %s instead of %s", name.Name, cmp.Or(now.Names[name.Name], "no image"), cmp.Or(name.ID, "no image")))
		}
	}
	return joined(ids), joined(hashes), differences
}

// joined writes different texts, "none" for none.
func joined(texts []string) string {
	slices.Sort(texts)
	return cmp.Or(strings.Join(slices.Compact(texts), ", "), "none")
}
