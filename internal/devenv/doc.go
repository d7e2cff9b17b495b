// Package devenv brings up what tests and the demo need: RabbitMQ,
// PostgreSQL, a docker engine, the compose program, and Python environments
// with real Celery. It finds what runs or is given by environment variables,
// installs and starts the rest, and ends only what it started.
package devenv
