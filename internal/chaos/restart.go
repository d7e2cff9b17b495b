package chaos

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
)

// restartServer makes the trial one that restarts a server at a moment of a
// step.
func (t *Trial) restartServer(random *rand.Rand) {
	p := t.somewhere(random)
	do := []action{restartBroker, restartDatabase}[random.IntN(2)]
	s := p.stage(do)
	s.Abrupt, s.For = random.IntN(2) == 0, time.Duration(random.IntN(5000))*time.Millisecond
	t.Stages = []stage{s}
}

// needsOwnServers says whether trials of the kind would disturb others that use
// the same servers.
func (k Kind) needsOwnServers() bool { return k == Restart }

// ownServers are a lane's own, for trials that end them.
type ownServers struct{ broker, database *devenv.OwnServer }

// startServers gives the lane servers of its own, which close ends.
func (l *lane) startServers(ctx context.Context) error {
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

// restart ends a server while a worker stands at the stage's moment, and brings
// it back.
func (l *lane) restart(ctx context.Context, s stage, o *outcome) error {
	server, p, cause := l.own.broker, toBroker, "stopped and started"
	if s.Do == restartDatabase {
		server, p = l.own.database, toDatabase
	}
	using, err := l.standing(p)
	if err != nil {
		return err
	}
	at := time.Now()
	if s.Abrupt {
		cause = "killed and started"
		if err := errors.Join(server.Kill(), l.resume(ctx)); err != nil {
			return err
		}
	} else {
		// The worker goes on while the server says good-bye.
		stopped := make(chan error, 1)
		go func() { stopped <- server.Stop() }()
		err := l.resume(ctx)
		if err := errors.Join(<-stopped, err); err != nil {
			return err
		}
	}
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(s.For):
	}
	if err := server.Start(ctx); err != nil {
		return err
	}
	over := time.Now()
	for pid, connected := range using {
		o.outages = append(o.outages, outage{peer: p, cause: cause, pid: pid, at: at, over: over, certain: connected})
	}
	if s.Do == restartDatabase {
		l.pool.Reset() // its sessions are gone
		return nil
	}
	_ = l.conn.Close()
	return l.listen()
}
