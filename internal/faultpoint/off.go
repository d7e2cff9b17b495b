//go:build !chaos

package faultpoint

// Hit marks a moment. In this build it does nothing; the compiler removes the
// call.
func Hit(point Point, subject ...string) {}

// Number formats a number for a subject. In this build subjects are not used.
func Number(int) string { return "" }
