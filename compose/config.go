package compose

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/goccy/go-yaml"
)

// A Config is what compose makes of its files and environment.
type Config struct {
	// Name is the project's name.
	Name string
	// Images are the image names by service: first that of the compose file, otherwise
	// the one that compose gives to the image that it builds, then the tags that the
	// file gives to the built image.
	Images map[string][]string
	// Contexts are, by service, the services from whose image its image is built
	// (additional_contexts). Compose builds them with it, whether it is told to or not.
	Contexts map[string][]string
	// Copied has, by service, the paths of the files that compose copies into its
	// containers, see [Engine.ReadFiles].
	Copied map[string][]string

	// unnamed are the services for which the file has no image name.
	unnamed []string
}

// ErrUnreadable says that compose cannot read its files.
var ErrUnreadable = errors.New("compose cannot read the configuration")

// ReadConfig asks compose for the target's services, for those that they depend on, and
// for those from which their images are built. query runs a command line and returns
// its output.
func ReadConfig(t Target, query func(command []string) (string, error)) (Config, error) {
	text, err := query(t.ConfigCommand())
	if err != nil {
		return Config{}, fmt.Errorf("%w: %w", ErrUnreadable, err)
	}
	config, err := ParseConfig([]byte(text))
	if err != nil {
		return Config{}, err
	}
	targets := t.Services
	isTarget := func(service string) bool { return len(targets) == 0 || slices.Contains(targets, service) }
	for missing := config.missing(); len(missing) > 0; missing = config.missing() {
		// Compose leaves out a service that only a build needs, unless it is named.
		all := Target{Prefix: t.Prefix, Services: slices.Sorted(slices.Values(slices.AppendSeq(missing, maps.Keys(config.Images))))}
		var more Config
		if text, err = query(all.ConfigCommand()); err == nil {
			more, err = ParseConfig([]byte(text))
		}
		if err != nil || len(more.Images) <= len(config.Images) {
			break // compose cannot build from it either
		}
		config, t = more, all
	}
	unnamed := func(service string) bool { return slices.Contains(config.unnamed, service) }
	if slices.ContainsFunc(config.built(isTarget), unnamed) {
		if text, err = query(t.imageNamesCommand()); err == nil {
			config.nameImages(text)
		}
	}
	return config, nil
}

// ConfigCommand returns the command line that prints what [ParseConfig] reads.
// Naming a service enables it if a profile had disabled it.
func (t Target) ConfigCommand() []string {
	return append(t.with("config", "--format", "json"), t.Services...)
}

// imageNamesCommand returns the command line that prints the image names of the
// target's services, and of those that they depend on, for nameImages.
func (t Target) imageNamesCommand() []string {
	return append(t.with("config", "--images"), t.Services...)
}

// ParseConfig parses the output of [Target.ConfigCommand], which compose 2.25.0 writes as
// YAML although it is asked for JSON. The names that compose gives
// to images are those of its usual mode: [ReadConfig] asks for the real ones.
func ParseConfig(output []byte) (Config, error) {
	var text struct {
		Name     string `json:"name"`
		Services map[string]struct {
			Image string `json:"image"`
			Build struct {
				Tags     []string          `json:"tags"`
				Contexts map[string]string `json:"additional_contexts"`
			} `json:"build"`
			Secrets []fileReference `json:"secrets"`
			Configs []fileReference `json:"configs"`
		} `json:"services"`
		Secrets map[string]fileObject `json:"secrets"`
		Configs map[string]fileObject `json:"configs"`
	}
	if err := json.Unmarshal(output, &text); err != nil && yaml.Unmarshal(output, &text) != nil {
		return Config{}, fmt.Errorf("the output of compose config is not a configuration: %w", err)
	}
	if text.Name == "" {
		return Config{}, fmt.Errorf("the output of compose config is not a configuration: it has no project name")
	}
	config := Config{Name: text.Name, Images: map[string][]string{}, Contexts: map[string][]string{}, Copied: map[string][]string{}}
	for name, service := range text.Services {
		image := service.Image
		if image == "" {
			image = text.Name + "-" + name
			config.unnamed = append(config.unnamed, name)
		}
		config.Images[name] = append([]string{image}, service.Build.Tags...)
		config.Copied[name] = copiedPaths(service.Secrets, service.Configs, text.Secrets, text.Configs)
		for _, context := range service.Build.Contexts {
			if other, found := strings.CutPrefix(context, "service:"); found {
				config.Contexts[name] = append(config.Contexts[name], other)
			}
		}
	}
	return config, nil
}

// missing lists the services of Contexts that compose has left out of its output,
// because nothing but a build needs them.
func (c Config) missing() []string {
	var missing []string
	for _, others := range c.Contexts {
		for _, other := range others {
			if c.Images[other] == nil && !slices.Contains(missing, other) {
				missing = append(missing, other)
			}
		}
	}
	return missing
}

// nameImages takes the names that compose gives to images from the output of
// imageNamesCommand. They are not always PROJECT-service: in its
// compatibility mode, which an option, the environment or .env chooses, compose
// writes PROJECT_service.
func (c Config) nameImages(output string) {
	printed := strings.Fields(output)
	for _, service := range c.unnamed {
		var names []string
		for _, name := range []string{c.Name + "-" + service, c.Name + "_" + service} {
			if slices.Contains(printed, name) {
				names = append(names, name)
			}
		}
		if len(names) > 0 {
			c.Images[service] = append(names, c.Images[service][1:]...)
		}
	}
}

// Built lists the image names that a build of the services may give to other images:
// those of the services, and of the services from which they are built.
func (c Config) Built(isTarget func(service string) bool) []string {
	var names []string
	for _, service := range c.built(isTarget) {
		names = append(names, c.Images[service]...)
	}
	return names
}

// built lists the services that a build of the services builds.
func (c Config) built(isTarget func(service string) bool) []string {
	var services []string
	for service := range c.Images {
		if isTarget(service) {
			services = append(services, service)
		}
	}
	for i := 0; i < len(services); i++ {
		for _, other := range c.Contexts[services[i]] {
			if !slices.Contains(services, other) {
				services = append(services, other)
			}
		}
	}
	return services
}

// ContainersCommand returns the command line that prints the ids of the project's
// containers, which [ParseIDs] reads.
func (t Target) ContainersCommand() []string { return t.with("ps", "--all", "--quiet", "--no-trunc") }

var fullID = regexp.MustCompile(`^[0-9a-f]{64}$`)

// ParseIDs parses the output of [Target.ContainersCommand]. It returns false if
// the output is something else.
func ParseIDs(output string) ([]string, bool) {
	ids := strings.Fields(output)
	for _, id := range ids {
		if !fullID.MatchString(id) {
			return nil, false
		}
	}
	return ids, true
}

// HashCommand returns the command line that prints compose's hash of a service's
// configuration, which [ParseHash] reads.
func (t Target) HashCommand(service string) []string { return t.with("config", "--hash", service) }

// ParseHash parses the output of [Target.HashCommand]; "" if it has no hash of the
// service.
func ParseHash(output, service string) string {
	for line := range strings.Lines(output) {
		if name, hash, found := strings.Cut(strings.TrimSpace(line), " "); found && name == service && fullID.MatchString(hash) {
			return hash
		}
	}
	return ""
}

// BackCommand returns the command line that replaces a service's containers by
// count new ones with the image that its name stands for: without building,
// pulling, or touching another service. Without start, they are only created.
func (t Target) BackCommand(service string, count int, start bool) []string {
	line := t.with("up", "--detach", "--no-deps", "--no-build", "--pull", "never", "--remove-orphans=false", "--scale", service+"="+strconv.Itoa(count))
	if !start {
		// Compose refuses --detach beside --no-start.
		line = t.with("up", "--no-start", "--no-deps", "--no-build", "--pull", "never", "--remove-orphans=false", "--scale", service+"="+strconv.Itoa(count))
	}
	return append(line, service)
}
