// Package changetest checks from outside that a change can always be taken back.
//
// It drives the worker as a user does: the program, a real broker and database, a
// real git repository and a real compose project. A [State] is everything that a
// run could change: files, what git knows, images, containers, networks, volumes.
// The harness takes it before and after a run that fails, and prints each
// difference.
//
// A seed and a number alone define a [Case]: the step that fails and how, what the
// operator had in the work tree, and what else goes wrong before or during the
// rollback. So a case that fails can be repeated by itself. Lanes run cases at the
// same time. A lane has a virtual host, a database, a work tree and a compose
// project of its own, and keeps them from case to case: what a case leaves is what
// the next one begins with.
//
// The package knows nothing of the worker's own packages; it sees what a user sees.
package changetest
