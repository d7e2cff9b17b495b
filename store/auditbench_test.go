package store_test

import (
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/audit"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
)

// BenchmarkAuditTrail measures what the trail costs: the begin and end of a step with it
// and without it, and the intent of a command, which is a statement of its own.
func BenchmarkAuditTrail(b *testing.B) {
	run := func(b *testing.B, d *storetest.Database, command bool) {
		s := d.Open(b)
		exit := 0
		for b.Loop() {
			b.StopTimer()
			id := d.Create(b, storetest.Seed{})
			b.StartTimer()
			claim := begin(b, s, id, store.StepAnalyze, "t").Claim
			outcome := good(store.StepAnalyze)
			if command {
				argv := []string{"docker", "compose", "--project-name", "shop", "build", "api"}
				if err := s.Record(b.Context(), claim, audit.Record{Kind: audit.CommandStarted, Command: &audit.Command{Number: 1, Argv: argv, Dir: "/workspace"}}); err != nil {
					b.Fatal(err)
				}
				outcome.Audit = []audit.Record{{Kind: audit.CommandEnded, Command: &audit.Command{Number: 1, Argv: argv, Dir: "/workspace", Exit: &exit}}}
			}
			finish(b, s, claim, outcome)
		}
		b.StopTimer()
		var records, bytes float64
		if err := d.Pool.QueryRow(b.Context(), `SELECT count(*)::float8, COALESCE(sum(octet_length(record)), 0)::float8 FROM mm_orchestrator.audit`).Scan(&records, &bytes); err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(records/float64(b.N), "records/op")
		b.ReportMetric(bytes/float64(b.N), "trail-B/op")
		b.ReportMetric(float64(b.Elapsed().Microseconds())/1000/float64(b.N), "ms/op")
	}
	b.Run("step without a trail", func(b *testing.B) {
		d := storetest.New(b)
		if _, err := d.Pool.Exec(b.Context(), `
			CREATE OR REPLACE FUNCTION mm_orchestrator.audit_append(run uuid, ids text[], bodies text[], OUT new_length bigint, OUT new_head text) LANGUAGE sql
			AS $$ SELECT NULL::bigint, NULL::text $$`); err != nil {
			b.Fatal(err)
		}
		run(b, d, false)
	})
	b.Run("step", func(b *testing.B) { run(b, storetest.New(b), false) })
	b.Run("step with a command", func(b *testing.B) { run(b, storetest.New(b), true) })
}
