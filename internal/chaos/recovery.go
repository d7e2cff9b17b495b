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
	// backWithin is how soon after the return of its server a worker should use it
	// again: consume, or have the session with its lock. Longer times are counted.
	backWithin = 2 * time.Second
	// backLimit fails the trial. It leaves room for a machine that is busy with
	// other trials.
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

// connectionPoints are the points at which a worker loses its connection to a peer
// and has one again.
var connectionPoints = map[peer]struct{ lost, back faultpoint.Point }{
	toBroker:   {faultpoint.ConnectionLost, faultpoint.ConnectionRestored},
	toDatabase: {faultpoint.SessionLost, faultpoint.SessionEstablished},
}

// An outage is a fault of a peer or its connections, for one worker.
type outage struct {
	peer peer
	// cause names the kind of fault in the report.
	cause string
	pid   int
	// at is when it began, over when the peer was available again.
	at, over time.Time
	// certain says that the worker certainly lost a connection, and so has to
	// notice the outage.
	certain bool
}

// recovery is how an outage ended for the worker.
type recovery struct {
	outage
	// noticed says that the worker lost its connection.
	noticed bool
	// took is the time from the end of the outage until the worker was connected
	// again. If only heartbeats can show that the connection is dead, it counts
	// from the moment at which the worker noticed.
	took time.Duration
}

// follow reads from a trace how the outage ended. over is false while the worker
// has still to notice it or to connect again.
func (x outage) follow(moments []moment) (r recovery, over bool) {
	r = recovery{outage: x}
	connected, from := true, x.over
	for _, m := range moments {
		if m.PID != x.pid || m.At < x.at.UnixNano() {
			continue
		}
		switch m.Point {
		case connectionPoints[x.peer].lost:
			r.noticed, connected = true, false
			if at := time.Unix(0, m.At); x.cause == string(hole) && at.After(from) {
				from = at
			}
		case connectionPoints[x.peer].back:
			connected = true
			// A worker that connects before the end of the outage, over a slow
			// connection for instance, has lost no time. A first session is no
			// recovery.
			if took := time.Unix(0, m.At).Sub(from); r.noticed && took > 0 {
				r.took = took
				return r, true
			}
		}
	}
	return r, connected && (r.noticed || !x.certain)
}

// connected says which living workers are connected to the peer now.
func (l *lane) connected(p peer) (map[int]bool, error) {
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

// recovered waits until every living worker is connected to its servers again.
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
			o.report(stuck, "%v", err)
		case !l.workers[i].alive():
		default:
			o.recoveries = append(o.recoveries, r)
			if r.took > backLimit {
				o.report(slowRecovery, "worker %d used the %s again %s after the end of the outage (%s)", x.pid, x.peer, r.took.Round(time.Millisecond), x.cause)
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
	text := fmt.Sprintf("%d/%d ended the connection", len(took), len(of))
	if len(took) == 0 {
		return text
	}
	return fmt.Sprintf("%s; connected again after: median %s, worst %s (trial %d), later than %s: %d/%d", text,
		median(took).Round(time.Millisecond), slowest.took.Round(time.Millisecond), slowest.trial, backWithin, late, len(took))
}
