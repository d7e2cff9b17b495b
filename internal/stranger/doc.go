// Package stranger tests the library from outside of its module, as its users see it:
// testdata/stranger is a program of somebody else, and docs/library.md is a tutorial
// whose programs are run as they are written.
package stranger
