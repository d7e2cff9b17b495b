package store

import (
	"context"
	"strings"

	"github.com/jackc/pgx/v5"
)

// leastPrefix is how many digits of an id are enough, as for git: fewer fit by
// chance.
const leastPrefix = 4

// An IDPrefix is an id of a run as somebody has written it: the whole of it, or
// its beginning. The zero value fits no run.
type IDPrefix struct {
	// digits are lower-case hexadecimal ones, at least leastPrefix of them and at
	// most 32.
	digits string
}

// ParseIDPrefix reads an id, or the first 4 digits of one or more. Like Python's
// UUID it takes upper case, urn:uuid:, braces, and an id without hyphens. What
// can be no id is ErrInvalid.
func ParseIDPrefix(text string) (IDPrefix, error) {
	plain := strings.ToLower(strings.TrimSpace(text))
	plain = strings.TrimPrefix(plain, "urn:uuid:")
	plain = strings.TrimSuffix(strings.TrimPrefix(plain, "{"), "}")
	digits := strings.ReplaceAll(plain, "-", "")
	isHex := strings.Trim(digits, "0123456789abcdef") == ""
	// Hyphens stand where they belong, the last one perhaps at the end, or there
	// are none.
	inPlace := plain == digits || plain == hyphenated(digits) || plain+"0" == hyphenated(digits+"0")
	switch {
	case !isHex || !inPlace || len(digits) > 32:
		return IDPrefix{}, failure(ErrInvalid, "%q is not the id of a run, nor the beginning of one: ids are UUIDs", cut(text, 80))
	case len(digits) < leastPrefix:
		return IDPrefix{}, failure(ErrInvalid, "%q is too short for the id of a run: give at least %d digits", cut(text, 80), leastPrefix)
	}
	return IDPrefix{digits}, nil
}

// ParseRunID reads the whole id of a run, in every form that ParseIDPrefix takes,
// and returns it as the database writes it. Anything else is ErrInvalid.
func ParseRunID(text string) (string, error) {
	prefix, err := ParseIDPrefix(text)
	if err != nil {
		return "", err
	}
	if len(prefix.digits) < 32 {
		return "", failure(ErrInvalid, "%q is only the beginning of the id of a run", cut(text, 80))
	}
	return prefix.String(), nil
}

// String is the id, or its beginning, as the database writes it.
func (p IDPrefix) String() string { return hyphenated(p.digits) }

// hyphenated puts the hyphens of a UUID between digits, as far as they go.
func hyphenated(digits string) string {
	var out strings.Builder
	for i, digit := range digits {
		switch i {
		case 8, 12, 16, 20:
			out.WriteByte('-')
		}
		out.WriteRune(digit)
	}
	return out.String()
}

// ListRunsByID returns the runs whose ids begin so, by id, at most limit of
// them. They are a range of the primary key, so that the index finds them.
func (s *Store) ListRunsByID(ctx context.Context, prefix IDPrefix, limit int) ([]Run, error) {
	if prefix.digits == "" {
		return nil, failure(ErrInvalid, "no id of a run is given")
	}
	rest := 32 - len(prefix.digits)
	first, last := hyphenated(prefix.digits+strings.Repeat("0", rest)), hyphenated(prefix.digits+strings.Repeat("f", rest))
	var runs []Run
	err := s.retry(ctx, "look for run "+prefix.String(), func(ctx context.Context) error {
		rows, err := s.pool.Query(ctx, selectRunsByID, first, last, limit)
		if err != nil {
			return err
		}
		runs, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (Run, error) { return scanRun(row) })
		return err
	})
	return runs, err
}

const selectRunsByID = `
	SELECT ` + runColumns + `
	FROM orchestrator_runs AS r
	JOIN orchestrator_action_plans AS p ON p.id = r.action_plan_id
	WHERE r.id BETWEEN $1 AND $2
	ORDER BY r.id
	LIMIT $3`
