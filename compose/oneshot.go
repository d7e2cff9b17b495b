package compose

import (
	"maps"
	"slices"
	"strings"
)

// completed is compose's condition for a dependency that has to end by itself with
// exit code 0.
const completed = "service_completed_successfully"

// AwaitsCompletion returns a service of the project that waits until the other one has
// completed, "" for none. Then the other one is a one-shot service.
func (m Model) AwaitsCompletion(other string) string {
	for _, name := range slices.Sorted(maps.Keys(m.Services)) {
		if m.Services[name].DependsOn[other].Condition == completed {
			return name
		}
	}
	return ""
}

// AwaitsCompletion says that [Container].DependsOn, as compose has labelled a container,
// waits until a service has completed.
func AwaitsCompletion(dependsOn, service string) bool {
	for item := range strings.SplitSeq(dependsOn, ",") {
		if name, rest, _ := strings.Cut(item, ":"); name == service && strings.HasPrefix(rest, completed) {
			return true
		}
	}
	return false
}
