package chaos

import (
	"context"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
)

const (
	// backWithin is how soon after its server is back a worker has to use it
	// again: consume, or hold the session that proves it alive.
	backWithin = 2 * time.Second
	// backLimit fails the trial. It leaves room for a machine that is busy with
	// other trials; whatever takes longer than backWithin is counted.
	backLimit = 5 * time.Second
)

// peer is a server as a worker sees it.
type peer string

// The peers.
const (
	toBroker   peer = "broker"
	toDatabase peer = "database"
)

var peers = []peer{toBroker, toDatabase}

// turns are the points at which a worker loses a peer and has it back.
var turns = map[peer]struct{ lost, back faultpoint.Point }{
	toBroker:   {faultpoint.ConnectionLost, faultpoint.ConnectionRestored},
	toDatabase: {faultpoint.SessionLost, faultpoint.SessionEstablished},
}

// An outage is a fault as one worker meets it.
type outage struct {
	peer peer
	// cause tells kinds of faults apart in the report.
	cause string
	pid   int
	// at is when it began; over when the peer was back.
	at, over time.Time
	// certain: the worker was connected and its connection is gone for sure, so
	// that it has to notice.
	certain bool
}

// recovery is how an outage ended for the worker.
type recovery struct {
	outage
	// noticed: it cost the worker its connection.
	noticed bool
	// took is the time from the peer's return to the worker's; from the moment
	// at which the worker noticed, if its connection died without a word and
	// only its heartbeats can tell.
	took time.Duration
}

// follow reads from a trace how the outage ended. over is false while the
// worker has still to notice or to come back.
func (x outage) follow(moments []moment) (r recovery, over bool) {
	r = recovery{outage: x}
	connected, from := true, x.over
	for _, m := range moments {
		if m.PID != x.pid || m.At < x.at.UnixNano() {
			continue
		}
		switch m.Point {
		case turns[x.peer].lost:
			r.noticed, connected = true, false
			if at := time.Unix(0, m.At); x.cause == string(hole) && at.After(from) {
				from = at
			}
		case turns[x.peer].back:
			connected = true
			// One that is back before its peer, for instance by a connection
			// that is merely slow, has lost no time. A first session is no
			// return.
			if took := time.Unix(0, m.At).Sub(from); r.noticed && took > 0 {
				r.took = took
				return r, true
			}
		}
	}
	return r, connected && (r.noticed || !x.certain)
}

// standing says which of the living workers use the peer at the moment.
func (l *lane) standing(p peer) (map[int]bool, error) {
	if _, err := l.trace.read(); err != nil {
		return nil, err
	}
	using := map[int]bool{}
	for _, w := range l.workers {
		if w.alive() {
			using[w.pid()] = l.trace.using[p][w.pid()]
		}
	}
	return using, nil
}

// recovered waits until every worker that lives has its servers back.
func (l *lane) recovered(ctx context.Context, o *outcome) {
	for _, x := range o.outages {
		i := slices.IndexFunc(l.workers, func(w *workerProcess) bool { return w.pid() == x.pid })
		if i < 0 {
			continue // it was killed or stopped in a later stage
		}
		var r recovery
		err := until(ctx, fmt.Sprintf("worker %d to use the %s again after %s", x.pid, x.peer, x.cause), func() (over bool, err error) {
			moments, err := l.trace.read()
			r, over = x.follow(moments)
			return over || !l.workers[i].alive(), err
		})
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			o.complain(stuck, "%v", err)
		case !l.workers[i].alive():
		default:
			o.recoveries = append(o.recoveries, r)
			if r.took > backLimit {
				o.complain(tardy, "worker %d used the %s again %s after it was back (%s)", x.pid, x.peer, r.took.Round(time.Millisecond), x.cause)
			}
		}
	}
}

// A trialRecovery names the trial of a recovery.
type trialRecovery struct {
	recovery
	trial int
}

// printRecoveries writes a line for each peer and cause.
func printRecoveries(w io.Writer, all []trialRecovery) {
	for _, p := range peers {
		var causes []string
		for _, r := range all {
			if r.peer == p && !slices.Contains(causes, r.cause) {
				causes = append(causes, r.cause)
			}
		}
		slices.Sort(causes)
		for _, cause := range append(causes, "") {
			of := slices.DeleteFunc(slices.Clone(all), func(r trialRecovery) bool { return r.peer != p || cause != "" && r.cause != cause })
			if len(of) == 0 {
				continue
			}
			name := cause
			if cause == "" {
				name = "all"
			}
			fmt.Fprintf(w, "| %s: %s | %s |\n", p, name, recoverySummary(of))
		}
	}
}

func recoverySummary(of []trialRecovery) string {
	var took []time.Duration
	var slowest trialRecovery
	late := 0
	for _, r := range of {
		if !r.noticed {
			continue
		}
		took = append(took, r.took)
		if r.took > backWithin {
			late++
		}
		if r.took >= slowest.took {
			slowest = r
		}
	}
	text := fmt.Sprintf("%d/%d cost the connection", len(took), len(of))
	if len(took) == 0 {
		return text
	}
	return fmt.Sprintf("%s; back after: median %s, worst %s (trial %d), later than %s: %d/%d", text,
		median(took).Round(time.Millisecond), slowest.took.Round(time.Millisecond), slowest.trial, backWithin, late, len(took))
}
