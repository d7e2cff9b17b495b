package compose

import (
	"strconv"
	"strings"
)

// OldestTested is the oldest version of compose that this program is tested
// with.
const OldestTested = "2.26"

// A VersionFault is what is known to go wrong with a version of compose.
type VersionFault struct {
	// Unusable: runs cannot work with it.
	Unusable bool
	// Text says what goes wrong, "" for nothing that is known.
	Text string
}

// FaultOf says what is known of a version as `docker compose version --short`
// prints it: 2.40.3, v2.40.3-desktop.1, 2.26.1-4. Of one that cannot be read
// nothing is known.
func FaultOf(version string) VersionFault {
	parts := strings.SplitN(strings.TrimPrefix(version, "v"), ".", 3)
	if len(parts) < 2 {
		return VersionFault{}
	}
	major, err := strconv.Atoi(parts[0])
	if err != nil {
		return VersionFault{}
	}
	minor, err := strconv.Atoi(leadingDigits(parts[1]))
	if err != nil {
		return VersionFault{}
	}
	patch := ""
	if len(parts) == 3 {
		patch = leadingDigits(parts[2])
	}
	switch {
	case major < 2:
		return VersionFault{true, "it refuses a compose file with a name, does not know --wait, and names containers in another way than the versions since 2"}
	case major == 2 && minor < 26:
		return VersionFault{false, "it is older than " + OldestTested + ", the oldest that this program is tested with"}
	case major == 2 && minor == 40 && patch == "3":
		return VersionFault{false, "its `up --wait` ends with 0 when the time of --wait-timeout is over, as if the service were well, so that only verify finds a restart failed; " +
			"and it refuses healthcheck.start_interval with an engine older than 25"}
	}
	return VersionFault{}
}

func leadingDigits(text string) string {
	end := strings.IndexFunc(text, func(r rune) bool { return r < '0' || r > '9' })
	if end < 0 {
		return text
	}
	return text[:end]
}
