//go:build chaosbug

package planted

import "os"

// EnvBug names the one defect that is planted.
const EnvBug = "MM_CHAOS_BUG"

var bug = os.Getenv(EnvBug)

// Bug says whether the defect is planted.
func Bug(name string) bool { return name == bug }
