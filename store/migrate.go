package store

import (
	"context"
	"embed"
	"fmt"
	"io/fs"
	"regexp"
	"slices"
	"sort"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/moonladderstudios/mm-orchestrator/results/postgres"
)

//go:embed migrations/*.sql
var migrationFiles embed.FS

// MigrateOptions says what Migrate does besides the schema mm_orchestrator.
type MigrateOptions struct {
	// SharedTables creates MoonMind's tables in a database that has none of them.
	// Existing tables are compared and never changed.
	SharedTables bool
	// ResultTables, if set, creates Celery's tables or adds columns to them, like
	// [postgres.Backend.EnsureTables].
	ResultTables *ResultsConfig
	// DryRun only makes the plan, and changes nothing.
	DryRun bool
	// Rehearse does everything and rolls it back, to find out whether this role has
	// the rights. It takes the same locks as a real migration.
	Rehearse bool
}

// ReportStep is one step of a migration.
type ReportStep = postgres.Step

// Report is what a migration does or did, in order. Without steps there is nothing
// to do.
type Report = postgres.Report

func lockMigrations(ctx context.Context, tx pgx.Tx) error { return postgres.LockTables(ctx, tx) }

// Migrate brings the database to what this program needs, in one transaction.
//
//   - It creates the schema mm_orchestrator, or brings it to the newest version.
//   - With SharedTables it creates MoonMind's tables if none exists. If they exist
//     and differ from MoonMind's, it returns a [*SchemaDifference] and changes
//     nothing.
//   - With ResultTables it creates or completes Celery's tables.
//
// It is idempotent, and safe to run in several processes at once. With DryRun the
// report is the plan.
func (s *Store) Migrate(ctx context.Context, options MigrateOptions) (Report, error) {
	var report Report
	err := s.inTx(ctx, "migrate the database "+s.place, func(tx pgx.Tx) error {
		report = Report{}
		if !options.DryRun {
			if err := lockMigrations(ctx, tx); err != nil {
				return err
			}
		}
		if options.SharedTables {
			steps, err := planShared(ctx, tx)
			if err != nil {
				return err
			}
			report.Steps = append(report.Steps, steps...)
		}
		steps, err := planOwn(ctx, tx, newestVersion())
		if err != nil {
			return err
		}
		report.Steps = append(report.Steps, steps...)
		if options.ResultTables != nil {
			config := options.ResultTables.WithDefaults()
			if err := config.Validate(); err != nil {
				return err
			}
			steps, err := postgres.PlanTables(ctx, tx, config)
			if err != nil {
				return err
			}
			report.Steps = append(report.Steps, steps...)
		}
		switch {
		case options.DryRun:
			return nil
		case options.Rehearse:
			return report.Rehearse(ctx, tx)
		}
		return report.Run(ctx, tx)
	})
	if err != nil {
		return Report{}, err
	}
	return report, nil
}

// Removal is what RemoveOwnSchema does or did.
type Removal struct {
	Report
	// Tables are those that are dropped.
	Tables []RemovedTable
}

// RemovedTable is a table of schema mm_orchestrator.
type RemovedTable struct {
	Name string
	Rows int
}

// A SchemaInUseError says why RemoveOwnSchema has not removed the schema. Nothing
// was changed.
type SchemaInUseError struct {
	// Workers are the live workers that use the schema.
	Workers []LiveWorker
	// Parked counts the messages that are parked in the schema and in no queue.
	Parked int
}

func (e *SchemaInUseError) Error() string {
	var nodes []string
	for _, w := range e.Workers {
		nodes = append(nodes, w.Node)
	}
	const refused = "schema mm_orchestrator was not removed: "
	switch {
	case len(nodes) > 1:
		return fmt.Sprintf(refused+"workers %s are running and need it", strings.Join(nodes, ", "))
	case len(nodes) == 1:
		return fmt.Sprintf(refused+"worker %s is running and needs it", nodes[0])
	case e.Parked == 1:
		return refused + "it has 1 parked message, which is in no queue"
	}
	return fmt.Sprintf(refused+"it has %d parked messages, which are in no queue", e.Parked)
}

// RemoveOwnSchema removes the schema mm_orchestrator by the down migrations of its
// versions, and with it all claims and recorded outcomes. MoonMind's tables and
// Celery's are not changed. It is the last step when an operator goes back to the
// Python worker.
//
// While a worker is alive or a message is parked it returns a [*SchemaInUseError],
// also with dryRun. It locks the tables before it checks, so that neither can
// change until it is done.
func (s *Store) RemoveOwnSchema(ctx context.Context, dryRun bool) (Removal, error) {
	var removal Removal
	err := s.inTx(ctx, "remove schema mm_orchestrator of "+s.place, func(tx pgx.Tx) (err error) {
		removal = Removal{}
		if err := lockMigrations(ctx, tx); err != nil {
			return err
		}
		if removal.Steps, err = planOwn(ctx, tx, 0); err != nil {
			return err
		}
		if removal.Tables, err = ownTables(ctx, tx); err != nil {
			return err
		}
		if err := checkUnused(ctx, tx, removal.Tables, dryRun); err != nil || dryRun {
			return err
		}
		return removal.Run(ctx, tx)
	})
	if err != nil {
		return Removal{}, err
	}
	return removal, nil
}

// ownTables lists the tables of schema mm_orchestrator, whatever its version.
func ownTables(ctx context.Context, tx pgx.Tx) ([]RemovedTable, error) {
	rows, err := tx.Query(ctx, `
		SELECT relname::text FROM pg_catalog.pg_class
		WHERE relnamespace = to_regnamespace('mm_orchestrator') AND relkind = 'r' ORDER BY relname`)
	if err != nil {
		return nil, err
	}
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return nil, err
	}
	tables := make([]RemovedTable, len(names))
	for i, name := range names {
		tables[i].Name = name
		if err := tx.QueryRow(ctx, `SELECT count(*) FROM `+pgx.Identifier{"mm_orchestrator", name}.Sanitize()).Scan(&tables[i].Rows); err != nil {
			return nil, err
		}
	}
	return tables, nil
}

// checkUnused returns a SchemaInUseError if the schema is in use. Without dryRun it
// locks the tables first.
func checkUnused(ctx context.Context, tx pgx.Tx, tables []RemovedTable, dryRun bool) error {
	used := &SchemaInUseError{}
	for _, table := range tables {
		name := pgx.Identifier{"mm_orchestrator", table.Name}.Sanitize()
		if !dryRun {
			if _, err := tx.Exec(ctx, `LOCK TABLE `+name+` IN ACCESS EXCLUSIVE MODE`); err != nil {
				return err
			}
		}
		var err error
		var holders, registered []LiveWorker
		switch table.Name {
		case "parked":
			err = tx.QueryRow(ctx, `SELECT count(*) FROM mm_orchestrator.parked`).Scan(&used.Parked)
		case "workers":
			registered, err = listWorkers(ctx, tx, "")
		case "claims":
			// A worker of an older version has no row in table workers.
			holders, err = listHolders(ctx, tx)
		}
		if err != nil {
			return err
		}
		used.Workers = slices.Concat(registered, used.Workers, holders)
	}
	// A worker that runs a step is in both lists.
	seen := map[int64]bool{}
	used.Workers = slices.DeleteFunc(used.Workers, func(w LiveWorker) bool {
		twice := seen[w.Key]
		seen[w.Key] = true
		return twice
	})
	if len(used.Workers) > 0 || used.Parked > 0 {
		return used
	}
	return nil
}

// listHolders returns the live workers that run a step.
func listHolders(ctx context.Context, tx pgx.Tx) ([]LiveWorker, error) {
	rows, err := tx.Query(ctx, withActivity+`
		SELECT c.holder, '', c.worker, c.started_at
		FROM mm_orchestrator.claims AS c
		JOIN living AS l ON l.key = c.holder
		WHERE c.outcome IS NULL
		ORDER BY c.started_at`)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, scanLiveWorker)
}

// migration is one version of the schema mm_orchestrator.
type migration struct {
	version  int
	name     string
	up, down string
}

var migrationFile = regexp.MustCompile(`^(\d{4})_(\w+)\.(up|down)\.sql$`)

// ownMigrations returns the embedded migrations, oldest first. It ignores files with
// other names; a test finds those.
func ownMigrations() []migration {
	found := map[int]*migration{}
	entries, err := fs.ReadDir(migrationFiles, "migrations")
	if err != nil {
		panic(err) // embedded
	}
	for _, entry := range entries {
		parts := migrationFile.FindStringSubmatch(entry.Name())
		if parts == nil {
			continue
		}
		text, err := migrationFiles.ReadFile("migrations/" + entry.Name())
		if err != nil {
			panic(err) // embedded
		}
		version, _ := strconv.Atoi(parts[1])
		if found[version] == nil {
			found[version] = &migration{version: version, name: parts[2]}
		}
		if parts[3] == "up" {
			found[version].up = string(text)
		} else {
			found[version].down = string(text)
		}
	}
	list := make([]migration, 0, len(found))
	for _, m := range found {
		list = append(list, *m)
	}
	sort.Slice(list, func(i, j int) bool { return list[i].version < list[j].version })
	return list
}

func newestVersion() int {
	list := ownMigrations()
	return list[len(list)-1].version
}

// ownVersion returns the version of schema mm_orchestrator, 0 for none, and whether
// the schema exists.
func ownVersion(ctx context.Context, tx pgx.Tx) (version int, schema bool, err error) {
	var table bool
	err = tx.QueryRow(ctx, `
		SELECT to_regnamespace('mm_orchestrator') IS NOT NULL, to_regclass('mm_orchestrator.schema_versions') IS NOT NULL`).Scan(&schema, &table)
	if err != nil || !table {
		return 0, schema, err
	}
	err = tx.QueryRow(ctx, `SELECT COALESCE(max(version), 0) FROM mm_orchestrator.schema_versions`).Scan(&version)
	return version, schema, err
}

const createVersions = `CREATE TABLE mm_orchestrator.schema_versions (
    version     integer      NOT NULL,
    name        text         NOT NULL,
    applied_at  timestamptz  NOT NULL DEFAULT now(),
    CONSTRAINT schema_versions_pkey PRIMARY KEY (version),
    CONSTRAINT schema_versions_positive CHECK (version >= 1)
)`

// planOwn returns the steps that bring schema mm_orchestrator to version target; 0
// removes it.
func planOwn(ctx context.Context, tx pgx.Tx, target int) ([]ReportStep, error) {
	version, schema, err := ownVersion(ctx, tx)
	if err != nil {
		return nil, err
	}
	if version > newestVersion() {
		return nil, failure(ErrSchema, "schema mm_orchestrator in %s is of version %d, this program knows %d: use the program that made it",
			tx.Conn().Config().Database, version, newestVersion())
	}
	var steps []ReportStep
	if target > 0 && version == 0 {
		if !schema {
			steps = append(steps, ReportStep{What: "create schema mm_orchestrator", SQL: "CREATE SCHEMA mm_orchestrator"})
		}
		steps = append(steps, ReportStep{What: "create table mm_orchestrator.schema_versions",
			SQL: strings.Replace(createVersions, "CREATE TABLE", "CREATE TABLE IF NOT EXISTS", 1)})
	}
	list := ownMigrations()
	for _, m := range list {
		if m.version > version && m.version <= target {
			steps = append(steps, ReportStep{
				What: fmt.Sprintf("bring schema mm_orchestrator to version %d (%s)", m.version, m.name),
				SQL:  fmt.Sprintf("%s;\nINSERT INTO mm_orchestrator.schema_versions (version, name) VALUES (%d, '%s')", strings.TrimRight(m.up, ";\n "), m.version, m.name),
			})
		}
	}
	for i := len(list) - 1; i >= 0; i-- {
		if m := list[i]; m.version <= version && m.version > target {
			steps = append(steps, ReportStep{
				What: fmt.Sprintf("undo version %d (%s) of schema mm_orchestrator", m.version, m.name),
				SQL:  fmt.Sprintf("%s;\nDELETE FROM mm_orchestrator.schema_versions WHERE version = %d", strings.TrimRight(m.down, ";\n "), m.version),
			})
		}
	}
	if target == 0 && schema {
		steps = append(steps, ReportStep{What: "drop schema mm_orchestrator",
			SQL: "DROP TABLE IF EXISTS mm_orchestrator.schema_versions; DROP SCHEMA mm_orchestrator"})
	}
	return steps, nil
}
