package compose

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/client"
	"github.com/moby/moby/client/pkg/versions"
)

// An Inspection is all that is needed to create a container again: configuration,
// mounts, networks, and the files of [Engine.ReadFiles]. It contains the container's environment, and so its secrets:
// it belongs where only those can read it who may inspect the container itself.
type Inspection struct {
	id         string
	mounts     []container.MountPoint
	config     container.Config
	hostConfig container.HostConfig
	networks   map[string]*network.EndpointSettings
	files      []copiedFile
}

// inspectionText is the JSON form of an Inspection, in the engine's own words.
type inspectionText struct {
	ID         string                               `json:"Id"`
	Mounts     []container.MountPoint               `json:"Mounts"`
	Config     container.Config                     `json:"Config"`
	HostConfig container.HostConfig                 `json:"HostConfig"`
	Networks   map[string]*network.EndpointSettings `json:"Networks"`
	Files      []copiedFile                         `json:"Files,omitempty"` // not the engine's
}

// MarshalJSON writes what UnmarshalJSON reads.
func (i Inspection) MarshalJSON() ([]byte, error) {
	return json.Marshal(inspectionText{i.id, i.mounts, i.config, i.hostConfig, i.networks, i.files})
}

// UnmarshalJSON reads what MarshalJSON has written.
func (i *Inspection) UnmarshalJSON(data []byte) error {
	var text inspectionText
	if err := json.Unmarshal(data, &text); err != nil {
		return err
	}
	*i = Inspection{text.ID, text.Mounts, text.Config, text.HostConfig, text.Networks, text.Files}
	return nil
}

// InspectContainer returns what is needed to create the container again, and its
// state. It returns [ErrNotFound] if there is none with this id or name.
func (e *Engine) InspectContainer(ctx context.Context, id string) (Inspection, Container, error) {
	ctx, cancel := context.WithTimeout(ctx, e.timeout)
	defer cancel()
	result, err := e.client.ContainerInspect(ctx, id, client.ContainerInspectOptions{})
	if err != nil {
		return Inspection{}, Container{}, e.failed("inspect container "+id, err)
	}
	found := result.Container
	if found.Config == nil || found.HostConfig == nil {
		return Inspection{}, Container{}, fmt.Errorf("cannot inspect container %s at docker engine %s: the answer lacks its configuration", id, e.host)
	}
	inspection := Inspection{id: found.ID, mounts: found.Mounts, config: *found.Config, hostConfig: *found.HostConfig}
	if found.NetworkSettings != nil {
		inspection.networks = found.NetworkSettings.Networks
	}
	return inspection, containerOf(found, found.Config.Labels), nil
}

// CreateContainer creates a container as the inspection has it, under this name,
// from the image that the inspection names. It returns the new container's id, and
// does not start it. Compose's label for a container that replaces another one is
// set, so that an interruption is seen. Volumes are mounted by the names that they had, anonymous ones
// too. It returns [ErrNameTaken] if another container has the name.
func (e *Engine) CreateContainer(ctx context.Context, name string, from Inspection) (string, error) {
	config, hostConfig := from.again()
	if service := config.Labels[labelService]; service != "" {
		config.Labels = maps.Clone(config.Labels)
		config.Labels[labelReplace] = service + "-" + config.Labels[labelNumber]
	}
	options := client.ContainerCreateOptions{Name: name, Config: &config, HostConfig: &hostConfig}
	endpoints := from.endpoints()
	var names []string
	if hostConfig.NetworkMode.IsUserDefined() || hostConfig.NetworkMode.IsDefault() || hostConfig.NetworkMode.IsBridge() {
		names = slices.Sorted(maps.Keys(endpoints))
	}
	first := string(hostConfig.NetworkMode)
	if _, found := endpoints[first]; !found && len(names) > 0 {
		first = names[0]
	}
	if len(names) > 0 {
		options.NetworkingConfig = &network.NetworkingConfig{EndpointsConfig: map[string]*network.EndpointSettings{first: endpoints[first]}}
	}
	if len(names) > 1 {
		// The version that both know is certain only after an answer.
		if _, err := e.client.Ping(ctx, client.PingOptions{NegotiateAPIVersion: true}); err != nil {
			return "", e.failed("create container "+name, err)
		}
		// Older engines accept one network here. Newer ones forget the MAC address for a
		// network to which a container is connected before it runs.
		if versions.GreaterThanOrEqualTo(e.client.ClientVersion(), "1.44") {
			options.NetworkingConfig.EndpointsConfig = endpoints
			names = nil
		}
	}
	created, err := e.client.ContainerCreate(ctx, options)
	if err != nil {
		return "", e.failed("create container "+name, err)
	}
	half := func(doing string, err error) (string, error) {
		// Half a container must not be taken for the whole one later.
		_, _ = e.client.ContainerRemove(context.WithoutCancel(ctx), created.ID, client.ContainerRemoveOptions{Force: true})
		return "", e.failed(doing, err)
	}
	for _, other := range names {
		if other == first {
			continue
		}
		if _, err := e.client.NetworkConnect(ctx, other, client.NetworkConnectOptions{Container: created.ID, EndpointConfig: endpoints[other]}); err != nil {
			return half("connect container "+name+" to network "+other, err)
		}
	}
	for _, file := range from.files {
		if err := e.writeFile(ctx, created.ID, file); err != nil {
			return half("copy "+file.Path+" to container "+name, err)
		}
	}
	return created.ID, nil
}

// again returns the configuration for a container in place of the inspected one.
func (i Inspection) again() (container.Config, container.HostConfig) {
	config, hostConfig := i.config, i.hostConfig
	if config.Hostname == shortID(i.id) || hostConfig.NetworkMode.IsContainer() || hostConfig.UTSMode.IsHost() {
		// The engine's default is the container's own id. With the network of another
		// container it is that one's, with the name and the network of the machine it is
		// the machine's, and the engine refuses any, even that.
		config.Hostname = ""
	}
	if hostConfig.NetworkMode.IsContainer() {
		config.ExposedPorts = nil
	}
	covered := map[string]bool{}
	for _, bind := range hostConfig.Binds {
		if parts := strings.Split(bind, ":"); len(parts) > 1 {
			covered[parts[1]] = true
		}
	}
	hostConfig.Mounts = slices.Clone(hostConfig.Mounts)
	for n, mounted := range hostConfig.Mounts {
		covered[mounted.Target] = mounted.Type != mount.TypeVolume || mounted.Source != ""
		if !covered[mounted.Target] { // an anonymous volume, which the loop below adds by its name
			hostConfig.Mounts[n].Type = ""
		}
	}
	hostConfig.Mounts = slices.DeleteFunc(hostConfig.Mounts, func(mounted mount.Mount) bool { return mounted.Type == "" })
	for _, mounted := range i.mounts {
		if mounted.Type == mount.TypeVolume && !covered[mounted.Destination] {
			hostConfig.Mounts = append(hostConfig.Mounts, mount.Mount{
				Type: mount.TypeVolume, Source: mounted.Name, Target: mounted.Destination, ReadOnly: !mounted.RW,
			})
		}
	}
	return config, hostConfig
}

// endpoints returns the configuration of the networks, without what the engine
// found out itself when the container ran.
func (i Inspection) endpoints() map[string]*network.EndpointSettings {
	endpoints := map[string]*network.EndpointSettings{}
	for name, endpoint := range i.networks {
		if endpoint == nil {
			continue
		}
		aliases := slices.DeleteFunc(slices.Clone(endpoint.Aliases), func(alias string) bool { return alias == shortID(i.id) })
		endpoints[name] = &network.EndpointSettings{
			IPAMConfig: endpoint.IPAMConfig, Links: endpoint.Links, Aliases: aliases, DriverOpts: endpoint.DriverOpts, GwPriority: endpoint.GwPriority,
		}
		// The engine does not tell whether a MAC address was asked for. One that it has made
		// from the IP address is left to it: another container may get that IP address.
		if ip := endpoint.IPAddress.Unmap(); !ip.Is4() || !bytes.Equal(endpoint.MacAddress, append([]byte{0x02, 0x42}, ip.AsSlice()...)) {
			endpoints[name].MacAddress = endpoint.MacAddress
		}
	}
	return endpoints
}

func shortID(id string) string { return id[:min(12, len(id))] }

// volatileLabels are labels that differ between two containers of the same
// configuration: where compose was run, its version, and what a container
// replaces.
var volatileLabels = []string{
	labelReplace,
	"com.docker.compose.project.working_dir", "com.docker.compose.project.config_files", "com.docker.compose.project.environment_file",
	"com.docker.compose.version", "com.docker.compose.engine",
}

// Differences lists what differs between the configuration of two containers, by
// the names that the engine's inspection has for it. It does not compare what the
// engine chooses anew for each container.
func (i Inspection) Differences(other Inspection) []string {
	a, b := i.comparable(), other.comparable()
	var differing []string
	for _, name := range slices.Sorted(maps.Keys(a)) {
		if a[name] != b[name] {
			differing = append(differing, name)
		}
	}
	return differing
}

// comparable returns the parts of the configuration as texts, by their names.
func (i Inspection) comparable() map[string]string {
	config, hostConfig := i.again()
	config.Env = slices.Sorted(slices.Values(config.Env))
	config.Labels = maps.Clone(config.Labels)
	for _, label := range volatileLabels {
		delete(config.Labels, label)
	}
	config.Volumes = nil // Mounts has them
	config.Image = ""    // the image's id is compared, not what the creator called it
	hostConfig.Mounts, hostConfig.Binds = nil, nil
	hostConfig.CapAdd, hostConfig.CapDrop = capabilities(hostConfig.CapAdd), capabilities(hostConfig.CapDrop)
	mounts := map[string]string{}
	for _, mounted := range i.mounts {
		source := mounted.Name
		if mounted.Type != mount.TypeVolume {
			source = mounted.Source
		}
		mounts[mounted.Destination] = fmt.Sprintf("%s %s %t", mounted.Type, source, mounted.RW)
	}
	for _, mounted := range i.hostConfig.Mounts { // tmpfs mounts are only here
		if mounted.Type == mount.TypeTmpfs {
			mounts[mounted.Target] = "tmpfs"
		}
	}
	networks := map[string]network.EndpointSettings{}
	for name, endpoint := range i.endpoints() {
		endpoint.Aliases = slices.Compact(slices.Sorted(slices.Values(endpoint.Aliases)))
		endpoint.MacAddress = nil // of a container that does not run, the engine tells none
		networks[name] = *endpoint
	}
	parts := map[string]string{}
	flatten(parts, "Config", config)
	flatten(parts, "HostConfig", hostConfig)
	flatten(parts, "Mounts", mounts)
	flatten(parts, "Networks", networks)
	return parts
}

// capabilities returns their full names, sorted. Older composes write names without
// CAP_, and the engine keeps what it is told; newer clients add that by themselves.
func capabilities(names []string) []string {
	full := make([]string, 0, len(names))
	for _, name := range names {
		if name = strings.ToUpper(name); name != "ALL" && !strings.HasPrefix(name, "CAP_") {
			name = "CAP_" + name
		}
		full = append(full, name)
	}
	slices.Sort(full)
	return full
}

// flatten writes the fields of a struct or map as JSON, by prefix and name. All
// fields of the engine's types that are used here can be encoded.
func flatten(parts map[string]string, prefix string, value any) {
	text, err := json.Marshal(value)
	var fields map[string]json.RawMessage
	if err == nil {
		err = json.Unmarshal(text, &fields)
	}
	if err != nil {
		parts[prefix] = err.Error()
		return
	}
	for name, field := range fields {
		switch string(field) {
		case "null", "[]", "{}", `""`, "0", "false":
			field = nil // older and newer engines write an empty value differently
		}
		if field != nil {
			parts[prefix+"."+name] = string(field)
		}
	}
}

// StartContainer starts a container. It is no error if it runs already.
func (e *Engine) StartContainer(ctx context.Context, id string) error {
	_, err := e.client.ContainerStart(ctx, id, client.ContainerStartOptions{})
	return e.failed("start container "+id, err)
}

// StopContainer stops a container and waits for its end, as long as its own
// configuration says. It is no error if it does not run.
func (e *Engine) StopContainer(ctx context.Context, id string) error {
	_, err := e.client.ContainerStop(ctx, id, client.ContainerStopOptions{})
	return e.failed("stop container "+id, err)
}

// PauseContainer pauses a running container.
func (e *Engine) PauseContainer(ctx context.Context, id string) error {
	_, err := e.client.ContainerPause(ctx, id, client.ContainerPauseOptions{})
	return e.failed("pause container "+id, err)
}

// RenameContainer gives a container a new name. It returns [ErrNameTaken] if
// another container has it.
func (e *Engine) RenameContainer(ctx context.Context, id, name string) error {
	_, err := e.client.ContainerRename(ctx, id, client.ContainerRenameOptions{NewName: name})
	return e.failed("rename container "+id+" to "+name, err)
}

// RemoveContainer removes a container; a running one is killed. Its volumes remain.
// It is no error if there is none. A removal that goes on already is waited for: its
// answer may have been lost.
func (e *Engine) RemoveContainer(ctx context.Context, id string) error {
	return e.removeContainer(ctx, id, client.ContainerRemoveOptions{Force: true})
}

func (e *Engine) removeContainer(ctx context.Context, id string, options client.ContainerRemoveOptions) error {
	for {
		_, err := e.client.ContainerRemove(ctx, id, options)
		inProgress := errdefs.IsConflict(err) && strings.Contains(err.Error(), "is already in progress") // the engine has one code for all conflicts
		switch err = e.failed("remove container "+id, err); {
		case isNotFound(err):
			return nil
		case !inProgress:
			return err
		}
		if pause(ctx, helperInterval) != nil {
			return err
		}
	}
}

// ID is the id of the inspected container.
func (i Inspection) ID() string { return i.id }
