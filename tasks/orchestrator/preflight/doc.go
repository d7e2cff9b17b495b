// Package preflight looks, before a run changes anything, whether all that the
// run needs is there: the workspace and its repository, the compose program and
// the docker engine, the compose file and the service in it, the artifact
// directory, disk space. The command doctor and the worker's start use the same
// looks.
//
// A look changes nothing. All looks that need nothing of each other run at the
// same time, and [Run] answers within its limit, whatever hangs.
//
// The package decides what is wrong and how to mend it. What follows from it, a
// failed step or a line of the doctor, is up to the caller.
package preflight
