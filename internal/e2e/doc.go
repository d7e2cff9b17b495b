// Package e2e holds the tests of the whole: an unmodified Python producer, a
// real broker, database and docker engine, and the worker as the program that
// operators start. Each test states an obligation and judges it by what a user
// of MoonMind can see: rows, results as AsyncResult reads them, files,
// containers, log lines.
package e2e
