//go:build !linux

package main

// unmapProgram does nothing: it needs Linux's list of mappings.
func unmapProgram() {}
