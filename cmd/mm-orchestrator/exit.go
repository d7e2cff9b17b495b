package main

import (
	"errors"

	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/worker"
)

// Exit codes. 69, 77 and 78 are those of sysexits.h, so that a supervisor can
// distinguish "try again later" from "an operator must act".
const (
	exitOK = 0
	// exitFailure: any other failure; the message says why.
	exitFailure = 1
	// exitUsage: usage error.
	exitUsage = 2
	// exitUnavailable: broker, database or docker engine is unreachable; trying again may
	// help.
	exitUnavailable = 69
	// exitRefused: broker or database refused user, password, virtual host or a
	// privilege.
	exitRefused = 77
	// exitConfig: configuration error.
	exitConfig = 78
)

// exitCodes are explained in the help text.
var exitCodes = []struct {
	code    int
	meaning string
}{
	{exitOK, "success; for worker: stopped by a signal"},
	{exitFailure, "any other failure; the message says why"},
	{exitUsage, "usage error: wrong command, argument or flag"},
	{exitUnavailable, "broker, database or docker engine unreachable: trying again may help"},
	{exitRefused, "broker or database refused the user, the password, the virtual host or a privilege"},
	{exitConfig, "configuration error: invalid value, unusable workspace, missing tables, or a queue declared differently"},
}

// usageError is a mistake on the command line.
type usageError struct{ Text string }

func (e *usageError) Error() string { return e.Text }

// exitCode is the one place where an error becomes an exit code.
func exitCode(err error) int {
	var (
		usage  *usageError
		config *configError
	)
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &usage):
		return exitUsage
	case errors.As(err, &config):
		return exitConfig
	// Refused comes first: of several brokers one may be unreachable and another
	// refuse, and only the refusal needs an operator to act.
	case errors.Is(err, worker.ErrCredentials), errors.Is(err, worker.ErrVhost), errors.Is(err, worker.ErrPermission),
		errors.Is(err, store.ErrRefused):
		return exitRefused
	case errors.Is(err, worker.ErrUnreachable), errors.Is(err, store.ErrUnavailable), errors.Is(err, compose.ErrUnreachable):
		return exitUnavailable
	case errors.Is(err, worker.ErrMismatch), errors.Is(err, store.ErrSchema), errors.Is(err, store.ErrInvalid):
		return exitConfig
	}
	return exitFailure
}
