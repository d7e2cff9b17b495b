package orchestrator

import (
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/compose"
)

// A moment is a look of a test, with its time in seconds after the beginning.
type moment struct {
	at float64
	// reply is the text of the reply: the expected status is "200", "-" none
	// asked for. elsewhere says who answered it.
	reply, elsewhere string
	containers       []compose.Container
	silent           bool // the engine does not answer
}

func TestVerdicts(t *testing.T) {
	t.Parallel()
	begun := time.Unix(1_000_000, 0)
	second := func(s float64) time.Time { return begun.Add(time.Duration(s * float64(time.Second))) }
	// web is a container that was started so many seconds after the beginning, and
	// restarted so often.
	web := func(started float64, restarts int) compose.Container {
		return compose.Container{ID: "1", Name: "web", State: "running", ImageID: "sha256:new", StartedAt: second(started), Restarts: restarts}
	}
	with := func(c compose.Container, change func(*compose.Container)) compose.Container {
		change(&c)
		return c
	}
	in := func(state string) compose.Container {
		return with(web(-5, 0), func(c *compose.Container) { c.State, c.ExitCode = state, 1 })
	}
	docker := func(health string) compose.Container {
		return with(web(-5, 0), func(c *compose.Container) { c.Health = health })
	}
	// setup is a container of a one-shot service.
	setup := func(state string, code int) compose.Container {
		return with(web(-1, 0), func(c *compose.Container) { c.Service, c.State, c.ExitCode = "web", state, code })
	}
	oneShot := func(r *requirements) { r.oneShots = []string{"web"} }
	list := func(all ...compose.Container) []compose.Container { return all }
	const ok = "200"
	for _, test := range []struct {
		name    string
		change  func(*requirements)
		moments []moment
		want    string // of the verdict and its reason, at the last moment
		open    bool   // no verdict yet
	}{
		{name: "up for long, answers", moments: []moment{{at: 0.1, reply: ok, containers: list(web(-60, 0))}}, want: "healthy"},
		{name: "has just started", moments: []moment{{at: 0.1, reply: ok, containers: list(web(-1, 0))}}, open: true},
		{name: "has just started, period over", moments: []moment{{at: 0.1, reply: ok, containers: list(web(-1, 0))}, {at: 9.1, reply: ok, containers: list(web(-1, 0))}}, want: "healthy"},
		{name: "period not over", moments: []moment{{at: 0.1, reply: ok, containers: list(web(-1, 0))}, {at: 8.9, reply: ok, containers: list(web(-1, 0))}}, open: true},
		{name: "up for long, answers late", moments: []moment{{at: 0.1, reply: "503", containers: list(web(-60, 0))}, {at: 3, reply: ok, containers: list(web(-60, 0))}}, open: true},
		{name: "up for long, answers late and then well", moments: []moment{
			{at: 1, reply: "503", containers: list(web(-60, 0))}, {at: 3, reply: ok, containers: list(web(-60, 0))}, {at: 11, reply: ok, containers: list(web(-60, 0))}}, want: "healthy"},
		{name: "first answer at the deadline", moments: []moment{
			{at: 29.9, reply: "503", containers: list(web(-60, 0))}, {at: 29.95, reply: ok, containers: list(web(-60, 0))}, {at: 39.8, reply: ok, containers: list(web(-60, 0))}}, open: true},
		{name: "first answer at the deadline, well to the end", moments: []moment{
			{at: 29.9, reply: "503", containers: list(web(-60, 0))}, {at: 29.95, reply: ok, containers: list(web(-60, 0))}, {at: 39.95, reply: ok, containers: list(web(-60, 0))}}, want: "healthy"},
		{name: "no answer", moments: []moment{{at: 30, reply: "refused", containers: list(web(-60, 0))}}, want: "sick: Health check for http://web/ timed out after 30s"},
		{name: "no answer, before the deadline", moments: []moment{{at: 29, reply: "refused", containers: list(web(-60, 0))}}, open: true},
		{name: "crash after the first answer", moments: []moment{
			{at: 0.1, reply: ok, containers: list(web(0, 0))}, {at: 5, reply: "refused", containers: list(in("restarting"))}, {at: 6, reply: ok, containers: list(web(5.5, 1))}, {at: 11, reply: ok, containers: list(web(5.5, 1))}}, open: true},
		{name: "crash loop that always answers", moments: []moment{
			{at: 0.1, reply: ok, containers: list(web(0, 0))}, {at: 9, reply: ok, containers: list(web(8.8, 1))}, {at: 18, reply: ok, containers: list(web(17.9, 2))}, {at: 27, reply: ok, containers: list(web(26.9, 3))}, {at: 36, reply: ok, containers: list(web(35.9, 4))}},
			want: "sick: Containers of service web did not stay up for 10s\nContainer web is running, restarted 4 times"},
		{name: "crash after the deadline", moments: []moment{
			{at: 29, reply: ok, containers: list(web(25, 0))}, {at: 32, reply: "refused", containers: list(in("restarting"))}},
			want: "sick: Service web did not stay healthy for 10s: after 200 (attempt 1) came refused (attempt 2)\nContainer web is restarting (exit code 1)"},
		{name: "one restart, then well", moments: []moment{
			{at: 1, reply: ok, containers: list(web(0, 0))}, {at: 3, reply: "refused", containers: list(in("restarting"))}, {at: 4, reply: ok, containers: list(web(3.5, 1))}, {at: 14, reply: ok, containers: list(web(3.5, 1))}}, want: "healthy"},
		{name: "flapping", moments: []moment{
			{at: 28, reply: ok, containers: list(web(25, 0))}, {at: 29, reply: "503", containers: list(web(25, 0))}, {at: 29.5, reply: ok, containers: list(web(25, 0))}, {at: 31, reply: "503", containers: list(web(25, 0))}},
			want: "sick: Service web did not stay healthy for 10s: after 200 (attempt 1) came 503 (attempt 4)"},
		{name: "a short fault after the deadline", moments: []moment{
			{at: 25, reply: "503", containers: list(web(-60, 0))}, {at: 26, reply: ok, containers: list(web(-60, 0))}, {at: 31, reply: ok, containers: list(web(30.5, 1))}}, want: "sick: Containers of service web did not stay up for 10s\nContainer web is running, restarted 1 times"},
		{name: "exited", moments: []moment{{at: 0.1, reply: "refused", containers: list(in("exited"))}}, open: true},
		{name: "exited for good", moments: []moment{{at: 0.1, reply: "refused", containers: list(in("exited"))}, {at: 5.2, reply: "refused", containers: list(in("exited"))}},
			want: "sick: Health check for http://web/ was given up after 5s\nContainer web is exited (exit code 1)"},
		{name: "exited, but started again", moments: []moment{{at: 0.1, reply: "refused", containers: list(in("exited"))}, {at: 5.2, reply: "refused", containers: list(web(4, 1))}}, open: true},
		{name: "exited after it has answered", moments: []moment{{at: 0.1, reply: ok, containers: list(web(0, 0))}, {at: 2, reply: "refused", containers: list(in("exited"))}, {at: 7, reply: "refused", containers: list(in("exited"))}},
			want: "sick: Service web did not stay healthy for 10s: after 200 (attempt 1) came refused (attempt 3)\nContainer web is exited (exit code 1)"},
		{name: "exited, another program answers", moments: []moment{{at: 0.1, reply: ok, containers: list(in("exited"))}, {at: 5.2, reply: ok, containers: list(in("exited"))}}, want: "sick: \nContainer web is exited (exit code 1)"},
		{name: "paused", moments: []moment{{at: 0.1, reply: ok, containers: list(in("paused"))}, {at: 5.2, reply: ok, containers: list(in("paused"))}}, want: "sick: \nContainer web is paused"},
		{name: "dead", moments: []moment{{at: 0.1, reply: ok, containers: list(in("dead"))}, {at: 5.2, reply: ok, containers: list(in("dead"))}}, want: "sick: \nContainer web is dead (exit code 1)"},
		{name: "memory exhausted", moments: []moment{{at: 30, reply: ok, containers: list(with(in("restarting"), func(c *compose.Container) { c.OOMKilled, c.ExitCode = true, 137 }))}},
			want: "sick: \nContainer web is restarting (exit code 137), its memory was exhausted"},
		{name: "unhealthy", moments: []moment{{at: 30, reply: ok, containers: list(docker("unhealthy"))}}, want: "sick: \nContainer web is unhealthy"},
		{name: "unhealthy before the deadline", moments: []moment{{at: 29, reply: ok, containers: list(docker("unhealthy"))}}, open: true},
		{name: "unhealthy, then healthy", moments: []moment{{at: 1, reply: ok, containers: list(docker("unhealthy"))}, {at: 11, reply: ok, containers: list(docker("healthy"))}}, want: "healthy"},
		{name: "starting, then healthy", moments: []moment{{at: 1, reply: ok, containers: list(docker("starting"))}, {at: 20, reply: ok, containers: list(docker("healthy"))}}, want: "healthy"},
		{name: "starting", moments: []moment{{at: 29, reply: ok, containers: list(docker("starting"))}}, open: true},
		{name: "starting for ever", moments: []moment{{at: 30, reply: ok, containers: list(docker("starting"))}},
			want: "not proven: \nContainer web is starting, since docker has not finished its first health check"},
		{name: "starting, with a failed check", moments: []moment{{at: 30, reply: ok, containers: list(with(docker("starting"), func(c *compose.Container) { c.HealthExit = 1 }))}},
			want: "sick: \nContainer web is starting"},
		{name: "healthy, but the last check has failed", moments: []moment{{at: 30, reply: ok, containers: list(with(docker("healthy"), func(c *compose.Container) { c.HealthExit = 1 }))}},
			want: "sick: \nContainer web is healthy, but its last health check has failed"},
		{name: "another image", moments: []moment{{at: 0.1, reply: ok, containers: list(with(web(-60, 0), func(c *compose.Container) { c.ImageID, c.Image = "sha256:old", "p-web" }))}, {at: 6, reply: ok, containers: list(with(web(-60, 0), func(c *compose.Container) { c.ImageID, c.Image = "sha256:old", "p-web" }))}},
			want: "sick: \nContainer web runs image sha256:old, but the image p-web is sha256:new"},
		{name: "another image than the one to restore", change: func(r *requirements) { r.image = "sha256:new" }, moments: []moment{{at: 0.1, reply: ok, containers: list(with(web(-60, 0), func(c *compose.Container) { c.ImageID = "sha256:old" }))}, {at: 6, reply: ok, containers: list(with(web(-60, 0), func(c *compose.Container) { c.ImageID = "sha256:old" }))}},
			want: "sick: \nContainer web runs image sha256:old, but the image to be run is sha256:new"},
		{name: "another image, which the plan does not touch", change: func(r *requirements) { r.deployed = false }, moments: []moment{{at: 0.1, reply: ok, containers: list(with(web(-60, 0), func(c *compose.Container) { c.ImageID = "sha256:old" }))}}, want: "healthy"},
		{name: "one of two", moments: []moment{{at: 0.1, reply: ok, containers: list(web(-60, 0), with(in("exited"), func(c *compose.Container) { c.ID, c.Name = "2", "web2" }))}, {at: 6, reply: ok, containers: list(web(-60, 0), with(in("exited"), func(c *compose.Container) { c.ID, c.Name = "2", "web2" }))}},
			want: "sick: \nContainer web2 is exited (exit code 1)"},
		{name: "the younger of two counts", moments: []moment{{at: 0.1, reply: ok, containers: list(web(-60, 0), with(web(-1, 0), func(c *compose.Container) { c.ID = "2" }))}}, open: true},
		{name: "no container", moments: []moment{{at: 0.1, reply: ok}, {at: 5.2, reply: ok}}, want: "not proven: docker has no container of service web in project p"},
		{name: "no container, no answer", moments: []moment{{at: 0.1, reply: "refused"}, {at: 5.2, reply: "refused"}}, want: "sick: Health check for http://web/ was given up after 5s\nDocker has no container of service web in project p"},
		{name: "the container vanishes", moments: []moment{{at: 0.1, reply: ok, containers: list(web(-1, 0))}, {at: 2, reply: ok}, {at: 7.1, reply: ok}}, want: "sick: Docker has no container of service web in project p any more"},
		{name: "no container, and the plan has no compose command", change: func(r *requirements) { r.composed = false }, moments: []moment{{at: 0.1, reply: ok}}, open: true},
		{name: "the same, period over", change: func(r *requirements) { r.composed = false }, moments: []moment{{at: 0.1, reply: ok}, {at: 10, reply: ok}}, want: "healthy"},
		{name: "another program answers", moments: []moment{{at: 29, reply: ok, elsewhere: "nginx answers", containers: list(web(-60, 0))}}, open: true},
		{name: "another program answers to the end", moments: []moment{{at: 30, reply: ok, elsewhere: "nginx answers", containers: list(web(-60, 0))}}, want: "not proven: 200, but nginx answers"},
		{name: "engine never answers", moments: []moment{{at: 0.1, reply: ok, silent: true}, {at: 10, reply: ok, silent: true}}, want: "healthy"},
		{name: "engine never answers, period not over", moments: []moment{{at: 0.1, reply: ok, silent: true}, {at: 9, reply: ok, silent: true}}, open: true},
		{name: "engine does not answer any more", moments: []moment{{at: 0.1, reply: ok, containers: list(web(-1, 0))}, {at: 12, reply: ok, silent: true}}, open: true},
		{name: "engine does not answer to the end", moments: []moment{{at: 0.1, reply: ok, containers: list(web(-1, 0))}, {at: 30, reply: ok, silent: true}},
			want: "not proven: the docker engine does not answer any more, so that the containers of service web cannot be seen"},
		{name: "exited, and then the engine does not answer", moments: []moment{{at: 1, reply: "refused", containers: list(in("exited"))}, {at: 30, reply: "refused", silent: true}},
			want: "sick: Health check for http://web/ timed out after 30s\nContainer web is exited (exit code 1)"},
		{name: "engine answered earlier in the run", change: func(r *requirements) { r.engineWasSeen = true }, moments: []moment{{at: 30, reply: ok, silent: true}},
			want: "not proven: the docker engine does not answer any more, so that the containers of service web cannot be seen"},
		{name: "engine answers again", moments: []moment{{at: 0.1, reply: ok, containers: list(web(-1, 0))}, {at: 12, reply: ok, silent: true}, {at: 22, reply: ok, containers: list(web(-1, 0))}}, want: "healthy"},
		{name: "no URL, docker's check", moments: []moment{{at: 0.1, reply: "-", containers: list(docker("healthy"))}, {at: 6, reply: "-", containers: list(docker("healthy"))}}, want: "healthy"},
		{name: "no URL, no check", moments: []moment{{at: 0.1, reply: "-", containers: list(web(-60, 0))}}, want: "not proven: service web runs, but neither"},
		{name: "no URL, no check, restarting", moments: []moment{{at: 0.1, reply: "-", containers: list(in("restarting"))}}, open: true},
		{name: "no URL, no check, running is enough", change: func(r *requirements) { r.runningIsEnough = true }, moments: []moment{{at: 0.1, reply: "-", containers: list(web(-60, 0))}}, want: "healthy"},
		{name: "no URL, running is enough, not long", change: func(r *requirements) { r.runningIsEnough = true }, moments: []moment{{at: 0.1, reply: "-", containers: list(web(-6, 0))}}, open: true},
		{name: "no URL, no container", change: func(r *requirements) { r.runningIsEnough = true }, moments: []moment{{at: 0.1, reply: "-"}, {at: 6, reply: "-"}}, want: "not proven: docker has no container"},
		{name: "no URL, no engine", change: func(r *requirements) { r.runningIsEnough = true }, moments: []moment{{at: 0.1, reply: "-", silent: true}, {at: 6, reply: "-", silent: true}}, want: "not proven: the plan has no health check, and the worker has no docker engine"},
		{name: "one-shot, completed", change: oneShot, moments: []moment{{at: 0.1, reply: "-", containers: list(setup("exited", 0))}, {at: 9.1, reply: "-", containers: list(setup("exited", 0))}}, want: "healthy"},
		{name: "one-shot, completed later", change: oneShot, moments: []moment{{at: 0.1, reply: "-", containers: list(setup("running", 0))}, {at: 20, reply: "-", containers: list(setup("running", 0))}, {at: 21, reply: "-", containers: list(setup("exited", 0))}}, want: "healthy"},
		{name: "one-shot, not completed", change: oneShot, moments: []moment{{at: 30, reply: "-", containers: list(setup("running", 0))}}, want: "not proven: \nContainer web is running, and has to complete"},
		{name: "one-shot, failed", change: oneShot, moments: []moment{{at: 0.1, reply: "-", containers: list(setup("exited", 1))}, {at: 5.2, reply: "-", containers: list(setup("exited", 1))}}, want: "sick: \nContainer web is exited (exit code 1)"},
		{name: "one-shot, never started", change: oneShot, moments: []moment{{at: 0.1, reply: "-", containers: list(setup("created", 0))}, {at: 5.2, reply: "-", containers: list(setup("created", 0))}}, want: "sick: \nContainer web is created"},
		{name: "one-shot, starts again and again", change: oneShot, moments: []moment{{at: 30, reply: "-", containers: list(setup("restarting", 0))}}, want: "sick: \nContainer web is restarting (exit code 0)"},
		{name: "one-shot, another image", change: oneShot, moments: []moment{{at: 0.1, reply: "-", containers: list(with(setup("exited", 0), func(c *compose.Container) { c.ImageID = "sha256:old" }))}, {at: 5.2, reply: "-", containers: list(with(setup("exited", 0), func(c *compose.Container) { c.ImageID = "sha256:old" }))}},
			want: "sick: \nContainer web runs image sha256:old"},
		{name: "completed, but nobody wants that", moments: []moment{{at: 0.1, reply: "-", containers: list(setup("exited", 0))}, {at: 5.2, reply: "-", containers: list(setup("exited", 0))}}, want: "sick: \nContainer web is exited (exit code 0)"},
		{name: "as sick as before", change: func(r *requirements) { r.before = list(in("exited")) }, moments: []moment{{at: 0.1, reply: "refused", containers: list(in("exited"))}}, want: "healthy: as before: web was exited (1) before the run"},
		{name: "absent as before", change: func(r *requirements) { r.before = []compose.Container{} }, moments: []moment{{at: 0.1, reply: "refused"}}, want: "healthy: as before: web was absent before the run"},
		{name: "as unhealthy as before", change: func(r *requirements) { r.before = list(docker("unhealthy")) }, moments: []moment{{at: 0.1, reply: "503", containers: list(docker("unhealthy"))}}, want: "healthy: as before: web was running and unhealthy before the run"},
		{name: "exited before, made again without a start", change: func(r *requirements) { r.before = list(in("exited")) }, moments: []moment{{at: 0.1, reply: "refused", containers: list(setup("created", 0))}}, want: "healthy: as before: web was exited (1) before the run"},
		{name: "exited before, ended by another signal now", change: func(r *requirements) { r.before = list(setup("exited", 0)) }, moments: []moment{{at: 0.1, reply: "-", containers: list(setup("exited", 143))}}, want: "healthy: as before: web was exited (0) before the run"},
		{name: "one of two was stopped before", change: func(r *requirements) { r.before = list(web(-60, 0), in("exited")) }, moments: []moment{{at: 0.1, reply: "refused", containers: list(web(-60, 0), setup("created", 0))}}, want: "healthy: as before: web was exited (1), running before the run"},
		{name: "ran before, made again without a start", change: func(r *requirements) { r.before = list(web(-60, 0)) }, moments: []moment{{at: 0.1, reply: "-", containers: list(setup("created", 0))}, {at: 5.2, reply: "-", containers: list(setup("created", 0))}}, want: "sick: \nContainer web is created"},
		{name: "healthy before, its first check comes late", change: func(r *requirements) { r.before = list(docker("healthy")) }, moments: []moment{{at: 29, reply: "-", containers: list(docker("starting"))}, {at: 30, reply: "-", containers: list(docker("starting"))}}, want: "healthy: as before, although docker has not finished"},
		{name: "healthy before, its first check has failed", change: func(r *requirements) { r.before = list(docker("healthy")) }, moments: []moment{{at: 30, reply: "-", containers: list(with(docker("starting"), func(c *compose.Container) { c.HealthExit = 1 }))}}, want: "sick: \nContainer web is starting"},
		{name: "unhealthy before, docker has not said so yet", change: func(r *requirements) { r.before = list(docker("unhealthy")) }, moments: []moment{
			{at: 29, reply: "-", containers: list(with(docker("starting"), func(c *compose.Container) { c.HealthExit = 1 }))}, {at: 30, reply: "-", containers: list(with(docker("starting"), func(c *compose.Container) { c.HealthExit = 1 }))}}, want: "healthy: as before: web was running and unhealthy before the run"},
		{name: "in a restart loop before, starts again now", change: func(r *requirements) { r.before = inLoops(list(web(-2, 3)), begun, r.quiet) }, moments: []moment{
			{at: 1, reply: "-", containers: list(web(0, 0))}, {at: 4, reply: "-", containers: list(web(3, 1))}}, want: "healthy: as before: web was in a restart loop before the run"},
		{name: "other than before", change: func(r *requirements) { r.before = list(docker("unhealthy")) }, moments: []moment{{at: 0.1, reply: "refused", containers: list(in("exited"))}, {at: 6, reply: "refused", containers: list(in("exited"))}}, want: "sick: Health check for http://web/ was given up after 6s\nContainer web is exited (exit code 1)"},
		{name: "well before, exited now", change: func(r *requirements) { r.before = list(web(-60, 0)) }, moments: []moment{{at: 30, reply: "refused", containers: list(in("exited"))}}, want: "sick: Health check for"},
		{name: "well before, no check at all", change: func(r *requirements) { r.before = list(web(-60, 0)) }, moments: []moment{{at: 0.1, reply: "-", containers: list(web(-60, 0))}}, want: "healthy"},
		{name: "a clock of the engine that is fast", moments: []moment{{at: 1, reply: ok, containers: list(web(1000, 0))}, {at: 11, reply: ok, containers: list(web(1000, 0))}}, want: "healthy"},
		{name: "a clock of the engine that is slow", moments: []moment{{at: 1, reply: ok, containers: list(web(-3, 0))}, {at: 6, reply: ok, containers: list(web(-2, 1))}, {at: 10, reply: ok, containers: list(web(-2, 1))}}, open: true},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			r := requirements{
				project: "p", service: "web", composed: true, deployed: true, begun: begun, deadline: second(30), quiet: 10 * time.Second,
				check: &healthCheck{url: "http://web/", timeout: 30},
			}
			if test.moments[0].reply == "-" {
				r.check = nil
			}
			if test.change != nil {
				test.change(&r)
			}
			var e evidence
			var v verdict
			var done bool
			for i, m := range test.moments {
				if done {
					t.Fatalf("verdict %s before moment %d", text(v), i)
				}
				l := look{at: second(m.at), engine: !m.silent, containers: m.containers, images: map[string]string{}}
				for _, c := range m.containers {
					l.images[c.ID] = "sha256:new"
				}
				if m.reply != "-" {
					l.reply = &reply{attempt: i + 1, text: m.reply, expected: m.reply == ok, elsewhere: m.elsewhere}
				}
				e = e.with(l, r)
				v, done = decide(e, r, l.at)
			}
			switch {
			case test.open && done:
				t.Errorf("%s, want no verdict yet", text(v))
			case !test.open && !done:
				t.Errorf("no verdict yet, so far %s; want %s", text(v), test.want)
			case !test.open && !strings.HasPrefix(text(v), test.want):
				t.Errorf("%s\nwant %s", text(v), test.want)
			}
		})
	}
}

func text(v verdict) string {
	all := v.health.String()
	if v.reason != "" || len(v.about) > 0 {
		all += ": " + v.reason
	}
	for _, f := range v.about {
		all += "\n" + f.text
	}
	return all
}

func TestConditionsInWords(t *testing.T) {
	t.Parallel()
	same(t, "several", condition([]compose.Container{{State: "exited", ExitCode: 2}, {State: "running"}, {State: "running"}, {State: "restarting"}, {State: "running", Health: "starting"}}),
		"exited (2), in a restart loop, running, running and starting")
	same(t, "none", condition(nil), "absent")
}
