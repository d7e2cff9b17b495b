//go:build !chaosbug

package planted

// Bug says whether the defect is planted: never, in this build.
func Bug(string) bool { return false }
