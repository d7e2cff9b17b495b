package compose

import (
	"encoding/json"
	"fmt"
	"regexp"
	"strconv"
	"strings"
)

// A Config is what compose makes of its files and environment.
type Config struct {
	// Name is the project's name.
	Name string
	// Images are the image names by service: that of the compose file, otherwise
	// the one that compose gives to the image that it builds.
	Images map[string]string
}

// ConfigCommand returns the command line that prints what [ParseConfig] reads.
// Naming a service enables it if a profile had disabled it.
func (t Target) ConfigCommand() []string {
	return append(t.with("config", "--format", "json"), t.Services...)
}

// ParseConfig parses the output of [Target.ConfigCommand].
func ParseConfig(output []byte) (Config, error) {
	var text struct {
		Name     string `json:"name"`
		Services map[string]struct {
			Image string `json:"image"`
		} `json:"services"`
	}
	if err := json.Unmarshal(output, &text); err != nil {
		return Config{}, fmt.Errorf("the output of compose config is not a configuration: %w", err)
	}
	if text.Name == "" {
		return Config{}, fmt.Errorf("the output of compose config has no project name")
	}
	config := Config{Name: text.Name, Images: map[string]string{}}
	for name, service := range text.Services {
		config.Images[name] = service.Image
		if service.Image == "" {
			config.Images[name] = text.Name + "-" + name
		}
	}
	return config, nil
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
	line := t.with("up", "--detach", "--no-deps", "--no-build", "--pull", "never", "--scale", service+"="+strconv.Itoa(count))
	if !start {
		// Compose refuses --detach beside --no-start.
		line = t.with("up", "--no-start", "--no-deps", "--no-build", "--pull", "never", "--scale", service+"="+strconv.Itoa(count))
	}
	return append(line, service)
}
