//go:build !chaos

package faultpoint

// Hit marks a moment. It does nothing in this build, and its arguments are not
// even computed.
func Hit(point Point, subject ...string) {}

// Number is a subject that counts. In this build nobody reads it.
func Number(int) string { return "" }
