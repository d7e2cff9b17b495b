package store_test

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
)

// alterOf finds the statement in a cure.
var alterOf = regexp.MustCompile(`ALTER [A-Z]+ \S+ CONNECTION LIMIT \d+`)

// tooFew checks for the connections and says what is wrong with them.
func tooFew(t *testing.T, tables, results *store.Store) *store.TooFewConnections {
	t.Helper()
	err := store.CheckConnections(t.Context(), tables, results)
	var few *store.TooFewConnections
	if err != nil && !errors.As(err, &few) {
		t.Fatal(err)
	}
	return few
}

// If a limit is too low for one worker alone, the error has the statement that makes
// it just high enough.
func TestALimitBelowWhatAWorkerNeeds(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, limit, why string
		results          bool
		need             int
	}{
		{"role", "ALTER ROLE %[1]s CONNECTION LIMIT 2", "role %[1]s may have 2", false, 3},
		{"database", "ALTER DATABASE %[2]s CONNECTION LIMIT 1", "the database may have 1%.0[2]s", false, 3},
		{"role of both", "ALTER ROLE %[1]s CONNECTION LIMIT 4", "role %[1]s may have 4", true, 5},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			d := storetest.New(t)
			role, database := roleOf(t, d.URL), d.Pool.Config().ConnConfig.Database
			s := d.Open(t)
			var results *store.Store
			if tt.results {
				results = d.Open(t)
			}
			if few := tooFew(t, s, results); few != nil {
				t.Fatal(few)
			}
			s.Close()
			if results != nil {
				results.Close()
				results = d.Open(t)
			}
			s = d.Open(t)
			execute(t, d, fmt.Sprintf(tt.limit, role, database))
			few := tooFew(t, s, results)
			if few == nil || few.Busy || few.Need != tt.need || few.Why != fmt.Sprintf(tt.why, role, database) || !errors.Is(few, store.ErrInvalid) {
				t.Fatalf("%+v", few)
			}
			execute(t, d, alterOf.FindString(few.Cure))
			if few = tooFew(t, s, results); few != nil && few.Busy {
				// What this test itself has open, or closed just now.
				execute(t, d, alterOf.FindString(few.Cure))
			}
			eventually(t, func() error { return store.CheckConnections(t.Context(), s, results) })
		})
	}
}

// While others use the connections, waiting may help.
func TestConnectionsThatOthersUse(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	role := roleOf(t, d.URL)
	execute(t, d, "ALTER ROLE "+role+" CONNECTION LIMIT 5")
	other, s := d.Open(t), d.Open(t)
	if few := tooFew(t, other, nil); few != nil {
		t.Fatal(few)
	}
	decide(t, other, d.Create(t, storetest.Seed{}), store.StepAnalyze, "t") // takes the lock
	few := tooFew(t, s, nil)
	if few == nil || !few.Busy || !errors.Is(few, store.ErrUnavailable) ||
		!strings.HasSuffix(few.Why, fmt.Sprintf(" could be opened, as role %s may have 5, of which others use 3", role)) || !strings.Contains(few.Cure, "CONNECTION LIMIT 6") {
		t.Fatalf("%+v", few)
	}
	other.Close()
	eventually(t, func() error { return store.CheckConnections(t.Context(), s, nil) })
}

// A pooler's limit is in no catalog, so all connections must be opened to find it.
func TestAPoolerWithTooFewConnections(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	for size, enough := range map[int]bool{2: false, 3: true} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			t.Parallel()
			through := devenv.Pooler(t, d.URL, "session", fmt.Sprintf("default_pool_size = %d", size))
			s := d.Open(t, asRole(through), func(c *store.Config) { c.ConnectTimeout = 3 * time.Second; c.Worker = "pool of " + fmt.Sprint(size) })
			few := tooFew(t, s, nil)
			if enough && few != nil || !enough && (few == nil || !strings.Contains(few.Why, "2 could be opened") || !strings.Contains(few.Cure, "PgBouncer")) {
				t.Errorf("%+v", few)
			}
		})
	}
}

// eventually tries until there is no error.
func eventually(t *testing.T, try func() error) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for err := try(); err != nil; err = try() {
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}
