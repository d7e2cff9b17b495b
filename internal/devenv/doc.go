// Package devenv brings up what tests and the demo need: RabbitMQ,
// PostgreSQL, a docker engine, the compose program, and Python environments
// with real Celery. It finds what runs or is given by environment variables,
// installs and starts the rest, and ends only what it started.
//
// [Up] is the bring-up, in parallel, with a progress line for each part. Where
// a part comes from, first match wins:
//
//   - the environment variables of this package (EnvBroker and its kin);
//   - services that `make services-up` has left running;
//   - programs that are installed, run as unprivileged child processes;
//   - the distribution's packages, as root on Debian and its kin, installed so
//     that nothing starts by itself;
//   - docker: the official images, or, where no registry is reachable, images
//     made from Debian's packages.
//
// What is slow to make (compose, Python environments) is kept in the user's
// cache folder and shared by all clones.
//
// A second process, the guard, ends what was started as soon as its standard
// input closes, so nothing outlives a run that is killed.
//
// The functions that take a testing.TB ([Broker], [Database], [Pooler], [Celery],
// [Compose]) hand the result to tests.
package devenv
