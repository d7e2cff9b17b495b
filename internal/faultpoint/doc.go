// Package faultpoint names the moments at which a worker may die, and lets the
// chaos harness (internal/chaos) choose one.
//
// Hit marks such a moment in the program. In an ordinary build it is empty and
// costs nothing. Built with the tag chaos, it writes the moment to a trace and
// looks whether the harness has set a trap for it: a trap kills the process as
// a power cut would, or holds it until the harness has done something else,
// such as cutting a connection.
//
// A mark is one line, belongs where the program passes from one state that a
// crash leaves behind to another, and says with its subject what it is about:
// ids and step names, never secrets. It holds no domain: package worker uses
// it too.
package faultpoint
