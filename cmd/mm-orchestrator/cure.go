package main

import (
	"cmp"
	"errors"
	"fmt"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/worker"
)

// curedError adds to an error what its reader can do.
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

// name is what an operator changes to change a setting: the flag or the
// variable that was used, or the preferred variable.
func (c *configuration) name(variable string) string {
	value, _ := c.effective(variable)
	return cmp.Or(value.origin, variable)
}

// assign is how an operator sets a setting, in the way that was used before.
func (c *configuration) assign(variable, value string) string {
	return c.name(variable) + "=" + value
}

// names lists where settings come from. One that nobody has set is told as
// such: its default may be what is wrong.
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

// databaseRole says which of the two databases an address is of, and which
// settings make it up.
type databaseRole struct {
	what string
	// address, login and name are of server, role and database.
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

// cureDatabase completes an error of package store that came up when the
// database was opened.
func cureDatabase(role databaseRole, err error) error {
	var known *store.Error
	switch {
	case errors.As(err, &known) && known.Code == "53300": // too many connections
		return &curedError{err, "End what uses them, or raise the limit of the role, the database or the server: a worker needs one connection for each step that it runs at a time, and two more"}
	case errors.Is(err, store.ErrInvalid):
		return &curedError{err, "The address comes from " + role.address}
	case errors.Is(err, store.ErrUnavailable):
		return &curedError{err, fmt.Sprintf("Is PostgreSQL running there? The address comes from %s", role.address)}
	case errors.Is(err, store.ErrRefused):
		cure := "Check " + role.login
		var refused *store.Error
		if errors.As(err, &refused) && refused.Code == "3D000" { // no such database
			cure = "Create it, or name another by " + role.name
		}
		return &curedError{err, cure}
	}
	return err
}

// cureBroker completes an error with which the engine could not start. The
// engine's own cures speak of its configuration as a library; they are
// replaced.
func (c *configuration) cureBroker(err error) error {
	var mismatch *worker.MismatchError
	if errors.As(err, &mismatch) {
		ours := *mismatch
		switch {
		case ours.What == "exchange":
			ours.Cure = fmt.Sprintf("Name another by %s, or delete the exchange.", c.name("ORCHESTRATOR_CELERY_EXCHANGE"))
		case ours.Argument == "x-queue-type":
			ours.Cure = fmt.Sprintf("Set %s, or delete the queue.", c.assign("MM_ORCHESTRATOR_QUEUE_TYPE", cmp.Or(ours.Current, "none")))
		case ours.Argument != "":
			ours.Cure = "Delete the queue, and see that every program declares it alike."
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

// connectErrors finds all of them: there is one for each broker.
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

// reworded is an error in other words.
type reworded struct {
	text string
	err  error
}

func (e *reworded) Error() string { return e.text }
func (e *reworded) Unwrap() error { return e.err }
