package main

import (
	"cmp"
	"errors"
	"fmt"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/worker"
)

// curedError is an error with instructions for the operator.
type curedError struct {
	err  error
	cure string
}

func (e *curedError) Error() string { return e.err.Error() + ". " + e.cure }
func (e *curedError) Unwrap() error { return e.err }

// effective finds a setting by its preferred variable.
func (c *configuration) effective(variable string) (effective, bool) {
	for _, value := range c.values {
		if value.setting.name() == variable {
			return value, true
		}
	}
	return effective{}, false
}

// name returns the flag or variable that the setting's value came from, or the
// preferred variable: what an operator edits to change the setting.
func (c *configuration) name(variable string) string {
	value, _ := c.effective(variable)
	return cmp.Or(value.origin, variable)
}

// assign returns the assignment that an operator writes to set a setting, by
// the flag or variable that is in use.
func (c *configuration) assign(variable, value string) string {
	return c.name(variable) + "=" + value
}

// names lists where the settings' values come from. A default is marked as not
// set, because the default may be the problem.
func (c *configuration) names(variables ...string) string {
	var list []string
	for _, variable := range variables {
		value, found := c.effective(variable)
		name := c.name(variable)
		if found && value.source == fromDefault {
			name += " (not set)"
		}
		list = append(list, name)
	}
	if len(list) == 1 {
		return list[0]
	}
	return strings.Join(list[:len(list)-1], ", ") + " and " + list[len(list)-1]
}

// databaseRole says which of the two databases is meant, and which settings
// define its address.
type databaseRole struct {
	what string
	// address, login and name are the settings of the server's address, of user
	// and password, and of the database's name.
	address, login, name string
}

func (c *configuration) tablesDatabase() databaseRole {
	if !c.DatabaseURL.IsZero() {
		url := c.name("MM_ORCHESTRATOR_DATABASE_URL")
		return databaseRole{"database", url, url, url}
	}
	return databaseRole{
		what:    "database",
		address: c.names("POSTGRES_HOST", "POSTGRES_PORT"),
		login:   c.names("POSTGRES_USER", "POSTGRES_PASSWORD"),
		name:    c.names("POSTGRES_DB"),
	}
}

func (c *configuration) resultsDatabase() databaseRole {
	url := c.name("CELERY_RESULT_BACKEND")
	return databaseRole{"result backend", url, url, url}
}

// cureDatabase adds a cure to an error that package store returned when the
// database was opened.
func cureDatabase(role databaseRole, err error) error {
	var known *store.Error
	switch {
	case errors.As(err, &known) && known.Code == "53300": // too many connections
		return &curedError{err, "Close other connections, or raise the limit of the role, the database or the server: a worker needs one connection for each step that it runs at a time, and two more"}
	case errors.Is(err, store.ErrInvalid):
		return &curedError{err, "The address comes from " + role.address}
	case errors.Is(err, store.ErrUnavailable):
		return &curedError{err, fmt.Sprintf("Is PostgreSQL running there? The address comes from %s", role.address)}
	case errors.Is(err, store.ErrRefused):
		cure := "Check " + role.login
		if errors.As(err, &known) && known.Code == "3D000" { // no such database
			cure = "Create it, or change " + role.name
		}
		return &curedError{err, cure}
	}
	return err
}

// cureBroker replaces the cures of errors with which the engine fails to start:
// its own cures name fields of the library's configuration.
func (c *configuration) cureBroker(err error) error {
	var mismatch *worker.MismatchError
	if errors.As(err, &mismatch) {
		ours := *mismatch
		switch {
		case ours.What == "exchange":
			ours.Cure = fmt.Sprintf("Change %s, or delete the exchange.", c.name("ORCHESTRATOR_CELERY_EXCHANGE"))
		case ours.Argument == "x-queue-type":
			ours.Cure = fmt.Sprintf("Set %s, or delete the queue.", c.assign("MM_ORCHESTRATOR_QUEUE_TYPE", cmp.Or(ours.Current, "none")))
		case ours.Argument != "":
			ours.Cure = "Delete the queue, and make sure that every program declares it with the same arguments."
		}
		return &ours
	}
	refused := connectErrors(err)
	if len(refused) == 0 {
		return err
	}
	var problems, cures []string
	for _, e := range refused {
		problems = append(problems, e.Problem())
		cure := e.Cure
		if errors.Is(e.Kind, worker.ErrCredentials) {
			cure = "Check user and password"
		}
		if len(cures) == 0 || cures[len(cures)-1] != cure {
			cures = append(cures, cure)
		}
	}
	return &curedError{
		&reworded{strings.Join(problems, "; "), err},
		fmt.Sprintf("%s. The address comes from %s", strings.Join(cures, ". "), c.names("CELERY_BROKER_URL")),
	}
}

// connectErrors returns all connection errors in the tree: one for each broker.
func connectErrors(err error) []*worker.ConnectError {
	switch e := err.(type) {
	case *worker.ConnectError:
		return []*worker.ConnectError{e}
	case interface{ Unwrap() []error }:
		var found []*worker.ConnectError
		for _, part := range e.Unwrap() {
			found = append(found, connectErrors(part)...)
		}
		return found
	case interface{ Unwrap() error }:
		return connectErrors(e.Unwrap())
	}
	return nil
}

// reworded is an error with another text.
type reworded struct {
	text string
	err  error
}

func (e *reworded) Error() string { return e.text }
func (e *reworded) Unwrap() error { return e.err }
