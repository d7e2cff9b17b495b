package chaos

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
)

// restartServer makes the trial one that restarts a server at a point of a step.
func (t *Trial) restartServer(random *rand.Rand) {
	do := []action{restartBroker, restartDatabase, restartBoth}[random.IntN(3)]
	s := stage{Do: do}
	if do != restartBoth {
		s = t.drawPlace(random).stage(do)
	}
	s.Abrupt, s.For = random.IntN(2) == 0, time.Duration(random.IntN(5000))*time.Millisecond
	if do == restartBoth {
		// Without another worker, which could continue the step.
		t.blackout(random, s)
		return
	}
	t.Stages = []stage{s}
}

// needsOwnServers says that trials of the kind would disturb others on the same
// servers.
func (k Kind) needsOwnServers() bool { return k == Restart || k == SpecRestart }

// ownServers are the servers of one lane, for trials that stop them.
type ownServers struct{ broker, database *devenv.OwnServer }

// startOwnServers starts the lane's own servers, which close stops.
func (l *lane) startOwnServers(ctx context.Context) error {
	l.own = &ownServers{}
	for _, start := range []func() error{
		func() (err error) { l.own.broker, err = devenv.StartOwnBroker(ctx, nil); return err },
		func() (err error) { l.own.database, err = devenv.StartOwnDatabase(ctx); return err },
	} {
		if err := start(); err != nil {
			return err
		}
	}
	l.broker, l.database = l.own.broker.URL, l.own.database.URL
	return nil
}

func (s *ownServers) close() error {
	var failures []error
	for _, server := range []*devenv.OwnServer{s.broker, s.database} {
		if server != nil {
			failures = append(failures, server.Close())
		}
	}
	return errors.Join(failures...)
}

// restart stops servers while a worker is paused at the stage's point, lets the
// worker continue, and starts the servers again.
func (l *lane) restart(ctx context.Context, s stage, o *outcome) error {
	servers := map[peer]*devenv.OwnServer{}
	if s.Do != restartDatabase {
		servers[toBroker] = l.own.broker
	}
	if s.Do != restartBroker {
		servers[toDatabase] = l.own.database
	}
	cause, end := "stopped and started", (*devenv.OwnServer).Stop
	if s.Abrupt {
		cause, end = "killed and started", (*devenv.OwnServer).Kill
	}
	if s.Do == restartBoth {
		cause = "both " + cause
	}
	using := map[peer]map[int]bool{}
	for p := range servers {
		var err error
		if using[p], err = l.connected(p); err != nil {
			return err
		}
	}
	at := time.Now()
	ended := make(chan error, 1)
	go func() {
		ended <- each(servers, func(_ peer, server *devenv.OwnServer) error { return end(server) })
	}()
	var err error
	if s.Abrupt {
		err = <-ended
		ended <- nil
	}
	// A server that is stopped ends while the worker continues.
	err = errors.Join(err, l.resume(ctx))
	if err := errors.Join(err, <-ended); err != nil {
		return err
	}
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(s.For):
	}
	var mu sync.Mutex
	if err := each(servers, func(p peer, server *devenv.OwnServer) error {
		if err := server.Start(ctx); err != nil {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		over := time.Now()
		for pid, connected := range using[p] {
			o.outages = append(o.outages, outage{peer: p, cause: cause, pid: pid, at: at, over: over, certain: connected})
		}
		return nil
	}); err != nil {
		return err
	}
	if servers[toDatabase] != nil {
		l.pool.Reset() // its sessions have ended
	}
	if servers[toBroker] == nil {
		return nil
	}
	_ = l.conn.Close()
	return l.connect()
}

// each calls do for all servers at the same time.
func each(servers map[peer]*devenv.OwnServer, do func(peer, *devenv.OwnServer) error) error {
	failures := make(chan error, len(servers))
	for p, server := range servers {
		go func() { failures <- do(p, server) }()
	}
	var all []error
	for range servers {
		all = append(all, <-failures)
	}
	return errors.Join(all...)
}
