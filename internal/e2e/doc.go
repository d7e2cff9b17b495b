// Package e2e has the end-to-end tests: with an unmodified Python producer, a
// real broker, database and docker engine, and the worker program that operators
// start. Each test states an obligation and checks what a user of MoonMind can
// see: rows, results as AsyncResult reads them, files, containers, log lines.
package e2e
