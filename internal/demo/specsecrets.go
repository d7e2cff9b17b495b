package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/moonladderstudios/mm-orchestrator/internal/leaktest"
)

// callMark begins the record of a call in the file calls.
const callMark = "call of "

// showSecrets looks for the token and the key wherever the runs may have left them, in
// each encoding that a reader would try.
func (s *specDemo) showSecrets(ctx context.Context) error {
	search := leaktest.NewSearch(s.secrets)
	var leaks []error
	look := func(where, text string) {
		if name, _ := search.Find(text); name != "" {
			leaks = append(leaks, fmt.Errorf("%s has a part of the %s", where, name))
		}
	}
	// Without this, a search that finds nothing would show nothing.
	for name, value := range s.secrets {
		if found, _ := search.Find("it is " + value); found != name {
			return fmt.Errorf("the search does not find the %s", name)
		}
	}

	files, rows := 0, 0
	if err := filepath.WalkDir(s.folder, func(path string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case path == s.path("credentials"): // the only place where they are
			return fs.SkipDir
		case !entry.Type().IsRegular():
			return nil
		}
		text, err := os.ReadFile(path)
		if err == nil {
			files++
			look(s.short(path), string(text))
		}
		return err
	}); err != nil {
		return err
	}
	database, err := pgx.Connect(ctx, s.database)
	if err != nil {
		return err
	}
	defer database.Close(context.WithoutCancel(ctx))
	names, err := database.Query(ctx, `SELECT quote_ident(schemaname) || '.' || quote_ident(tablename) FROM pg_tables WHERE schemaname NOT IN ('pg_catalog', 'information_schema')`)
	if err != nil {
		return err
	}
	tables, err := pgx.CollectRows(names, pgx.RowTo[string])
	if err != nil {
		return err
	}
	for _, table := range tables {
		found, err := database.Query(ctx, `SELECT to_jsonb(t)::text FROM `+table+` t`)
		if err != nil {
			return err
		}
		texts, err := pgx.CollectRows(found, pgx.RowTo[string])
		if err != nil {
			return err
		}
		rows += len(texts)
		look("table "+table, strings.Join(texts, "\n"))
	}
	history, err := s.github.Git(ctx, repository, "log", "--all", "--patch")
	if err != nil {
		return err
	}
	look("the repository", history)
	for _, r := range s.github.Requests("") {
		look("a request to GitHub", r.Path+"\n"+string(r.Body))
	}
	look("the output of mm-orchestrator spec", s.printed.String())
	calls, err := os.ReadFile(s.calls)
	if err != nil {
		return err
	}
	if len(leaks) > 0 {
		return errors.Join(leaks...)
	}
	s.screen.print("")
	s.screen.line("secrets", fmt.Sprintf("no part of the GitHub token or of Codex's key is in %d files, %d rows, the output, the repository,", files, rows), "")
	s.screen.line("", fmt.Sprintf("the addresses and bodies of requests to GitHub, and in arguments and environment of %d calls of git and codex", strings.Count(string(calls), callMark)), "")
	s.screen.line("", "(only codex has the key, in CODEX_API_KEY; it hands it on to the git that it starts itself)", "")
	return nil
}
