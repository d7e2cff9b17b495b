package compose

import (
	"strconv"
	"strings"
)

// OldestTested is the oldest version of compose that this program is tested
// with.
const OldestTested = "2.26"

// A VersionFault is a known fault of a version of compose. The zero value means
// that none is known.
type VersionFault struct {
	// Unusable says that runs cannot work with the version.
	Unusable bool
	// Text says what goes wrong, or is "".
	Text string
}

// FaultOf returns the known fault of a version, in the form in which
// `docker compose version --short` prints it: 2.40.3, v2.40.3-desktop.1,
// 2.26.1-4. For a version that cannot be parsed no fault is known.
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
		return VersionFault{true, "it refuses a compose file with a name, lacks --wait, and names containers differently from version 2 and later"}
	case major == 2 && minor < 26:
		return VersionFault{false, "it is older than " + OldestTested + ", the oldest that this program is tested with"}
	case major == 2 && minor == 40 && patch == "3":
		return VersionFault{false, "its `up --wait` exits with code 0 when --wait-timeout is exceeded, so that only verify detects a failed restart; " +
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
