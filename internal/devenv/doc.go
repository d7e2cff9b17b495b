// Package devenv provides what tests and the demo need: RabbitMQ, PostgreSQL, a
// docker engine, the compose program, Python environments with real Celery, and the
// codex program.
// It uses what is already running or named by environment variables, installs
// and starts the rest, and ends only what it has started.
//
// [Up] starts all parts in parallel and prints a progress line for each. It
// takes a part from the first of these sources that has it:
//
//   - the environment variables of this package (EnvBroker and the others);
//   - services that `make services-up` has left running;
//   - installed programs, run as unprivileged child processes;
//   - the distribution's packages, if the user is root on Debian or a
//     derivative; no package may start its servers by itself;
//   - docker: the official images, or, where no registry is reachable, images
//     made from Debian's packages.
//
// What takes long to build or to load (compose, Python environments, codex) is stored in the
// user's cache folder and shared by all clones.
//
// A second process, the guard, ends everything that was started as soon as its
// standard input closes. Nothing therefore outlives a run that is killed.
//
// The functions that take a testing.TB ([Broker], [Database], [Pooler],
// [Celery], [Compose]) are for tests.
package devenv
