// Package faultpoint names the moments at which a worker may crash, and lets
// the chaos harness (internal/chaos) choose one.
//
// Hit marks such a moment in the program. In an ordinary build it does nothing.
// In a build with the tag chaos it appends the moment to a trace file and checks
// whether the harness has set a trap for it. A trap either kills the process, as
// a power failure would, or pauses it until the harness has done something else,
// such as cutting a connection.
//
// A mark is one line. It belongs at every point where the state that a crash
// leaves behind changes. Its subject names what it is about: ids and step names,
// never secrets.
package faultpoint
