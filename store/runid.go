package store

import (
	"context"
	"strings"

	"github.com/jackc/pgx/v5"
)

// leastPrefix is the least number of digits in a prefix, as in git: fewer would
// often match by chance.
const leastPrefix = 4

// An IDPrefix is the id of a run, or its beginning, as a user typed it. The zero
// value matches no run.
type IDPrefix struct {
	// digits are lower-case and hexadecimal: at least leastPrefix, at most 32.
	digits string
}

// ParseIDPrefix parses an id, or at least its first 4 digits. Like Python's UUID it
// accepts upper case, urn:uuid:, braces, and no hyphens. It returns ErrInvalid for
// anything else.
func ParseIDPrefix(text string) (IDPrefix, error) {
	plain := strings.ToLower(strings.TrimSpace(text))
	plain = strings.TrimPrefix(plain, "urn:uuid:")
	plain = strings.TrimSuffix(strings.TrimPrefix(plain, "{"), "}")
	digits := strings.ReplaceAll(plain, "-", "")
	isHex := strings.Trim(digits, "0123456789abcdef") == ""
	// Either there are no hyphens, or all are at their places; the text may end with
	// one.
	inPlace := plain == digits || plain == hyphenated(digits) || plain+"0" == hyphenated(digits+"0")
	switch {
	case !isHex || !inPlace || len(digits) > 32:
		return IDPrefix{}, failure(ErrInvalid, "%q is not the id of a run, nor the beginning of one: ids are UUIDs", cut(text, 80))
	case len(digits) < leastPrefix:
		return IDPrefix{}, failure(ErrInvalid, "%q is too short for the id of a run: give at least %d digits", cut(text, 80), leastPrefix)
	}
	return IDPrefix{digits}, nil
}

// ParseRunID parses a whole id of a run, in any form that ParseIDPrefix accepts, and
// returns it as PostgreSQL prints it. It returns ErrInvalid for anything else.
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

// isUUID says whether text is a UUID in the form that the API uses. Python's UUID()
// accepts other forms, which no producer sends.
func isUUID(text string) bool {
	id, err := ParseRunID(text)
	return err == nil && id == strings.ToLower(text)
}

// String returns the id or prefix as PostgreSQL prints it.
func (p IDPrefix) String() string { return hyphenated(p.digits) }

// hyphenated inserts the hyphens of a UUID into its first digits.
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

// ListRunsByID returns at most limit runs whose ids begin with prefix, ordered by
// id. It reads a range of the primary key.
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
