package main

import (
	"errors"
	"syscall"

	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/worker"
)

// Exit codes. 69, 77 and 78 are those of sysexits.h, so that a supervisor can
// tell "try again later" from "somebody must change something".
const (
	exitOK = 0
	// exitFailure: it did not work, for a reason that the message gives.
	exitFailure = 1
	// exitUsage: the command line cannot be understood.
	exitUsage = 2
	// exitUnavailable: broker or database cannot be reached; trying again may
	// help.
	exitUnavailable = 69
	// exitRefused: broker or database refused user, password, virtual host
	// or a right.
	exitRefused = 77
	// exitConfig: the configuration cannot be worked with.
	exitConfig = 78
)

// exitCodes are explained in the help text.
var exitCodes = []struct {
	code    int
	meaning string
}{
	{exitOK, "success; for worker: stopped as asked by a signal"},
	{exitFailure, "failure, as the message says"},
	{exitUsage, "usage error: a flag, a word or a value on the command line is wrong"},
	{exitUnavailable, "broker or database cannot be reached: trying again may help"},
	{exitRefused, "broker or database refused the user, the password, the virtual host or a right"},
	{exitConfig, "the configuration cannot be worked with: a value, the workspace, missing tables, a queue declared otherwise"},
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
	// Refused comes first: of several brokers one may be away and the other
	// refuse, and only the latter needs somebody to act.
	case errors.Is(err, worker.ErrCredentials), errors.Is(err, worker.ErrVhost), errors.Is(err, worker.ErrPermission),
		errors.Is(err, store.ErrRefused):
		return exitRefused
	case errors.Is(err, worker.ErrUnreachable), errors.Is(err, store.ErrUnavailable):
		return exitUnavailable
	case errors.Is(err, worker.ErrMismatch), errors.Is(err, store.ErrSchema), errors.Is(err, store.ErrInvalid):
		return exitConfig
	case errors.Is(err, syscall.EADDRINUSE), errors.Is(err, syscall.EACCES):
		return exitConfig
	}
	return exitFailure
}
