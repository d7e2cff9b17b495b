package client_test

import (
	"os/exec"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/client"
	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
)

// canvases are in Python and in Go what the captured programs do not have.
var canvases = map[string]struct {
	python string
	golang scenario
	// 5.4 gives the errbacks an option immutable, and chains in a group the id null. No
	// worker reads either.
	since57 bool
}{
	"group of chains": {
		python: `group(s("a", 1), chain(s("b", 2), s("c", 3), s("d", 4)), s("e", 5)).apply_async(queue="mail", priority=2)`,
		golang: of(client.Group(task("a", 1), client.Chain(task("b", 2), task("c", 3), task("d", 4)), task("e", 5)), client.Queue("mail"), client.Priority(2)),
	},
	"nested chains": {
		python: `chain(s("a", 1), chain(s("b", 2), s("c", 3)), s("d", 4)).apply_async(link_error=s("err"))`,
		golang: of(client.Chain(task("a", 1), client.Chain(task("b", 2), task("c", 3)), task("d", 4)), client.LinkError(task("err"))),
	},
	"nested groups": {
		python: `group(s("a", 1), group(s("b", 2), s("c", 3))).apply_async()`,
		golang: of(client.Group(task("a", 1), client.Group(task("b", 2), task("c", 3)))),
	},
	"chain of one": {
		python: `chain(s("a", 1)).apply_async(queue="mail")`,
		golang: of(client.Chain(task("a", 1)), client.Queue("mail")),
	},
	"chain in a link": {
		python: `s("a", 1).apply_async(link=chain(s("b", 2), s("c", 3)))`,
		golang: of(task("a", 1), client.Link(client.Chain(task("b", 2), task("c", 3)))),
	},
	"errbacks of a chain that ends in a group": {
		python:  `chain(s("a", 1), group(s("b", 2), s("c", 3))).apply_async(link_error=s("err"))`,
		golang:  of(client.Chain(task("a", 1), client.Group(task("b", 2), task("c", 3))), client.LinkError(task("err"))),
		since57: true,
	},
	"chain in a group at the end of a chain": {
		python:  `chain(s("a", 1), group(s("b", 2), chain(s("c", 3), s("d", 4)))).apply_async(link_error=s("err"))`,
		golang:  of(client.Chain(task("a", 1), client.Group(task("b", 2), client.Chain(task("c", 3), task("d", 4)))), client.LinkError(task("err"))),
		since57: true,
	},
	"group at the end of a chain in a group at the end of a chain": {
		python:  `chain(s("a", 1), group(s("b", 2), chain(s("c", 3), group(s("d", 4), s("e", 5))))).apply_async()`,
		golang:  of(client.Chain(task("a", 1), client.Group(task("b", 2), client.Chain(task("c", 3), client.Group(task("d", 4), task("e", 5)))))),
		since57: true,
	},
	"group alone in a chain in a group at the end of a chain": {
		python:  `chain(s("a", 1), group(s("b", 2), chain(group(s("c", 3), s("d", 4))))).apply_async()`,
		golang:  of(client.Chain(task("a", 1), client.Group(task("b", 2), client.Chain(client.Group(task("c", 3), task("d", 4)))))),
		since57: true,
	},
	"options of a step": {
		python: `chain(s("a", 1).set(queue="mail", priority=7, headers={"x": 1}), s("b", 2).set(link=[s("c", 3)], link_error=[s("d")])).apply_async(link_error=s("err"), countdown=30)`,
		golang: of(client.Chain(task("a", 1).With(client.Queue("mail"), client.Priority(7), client.Header("x", 1)), task("b", 2).With(client.Link(task("c", 3)), client.LinkError(task("d")))),
			client.LinkError(task("err")), client.Countdown(30*time.Second)),
	},
}

func task(name string, args ...any) client.Signature { return client.Task("go."+name, args...) }

const canvasProducer = `
import sys
from celery import Celery, chain, group, signature
from kombu import Exchange, Queue
app = Celery("shop", broker=sys.argv[1], set_as_current=True)
app.conf.update(task_default_queue="orders", broker_transport_options={"confirm_publish": True},
    task_queues=[Queue("orders", Exchange("orders"), routing_key="orders"), Queue("mail", Exchange("shop"), routing_key="mail.send")])
def s(name, *args):
    return signature("go." + name, args=args, app=app)
`

// TestCanvasesEqualThoseOfAProducer sends canvases with a Python program and with the
// client, and compares every field of every message.
func TestCanvasesEqualThoseOfAProducer(t *testing.T) {
	t.Parallel()
	for _, version := range []string{"5.4.0", "5.7.0"} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			env := newTestEnv(t, nil)
			for _, queue := range []string{"orders", "mail"} {
				if _, err := env.client.Send(t.Context(), add(), client.Queue(queue)); err != nil {
					t.Fatal(err)
				}
			}
			env.take("orders", "mail")
			for name, canvas := range canvases {
				if version == "5.4.0" && canvas.since57 {
					continue
				}
				theirsAt := time.Now()
				if out, err := exec.CommandContext(t.Context(), devenv.Celery(t, version), "-c", canvasProducer+canvas.python, env.url).CombinedOutput(); err != nil {
					t.Fatalf("%s: %v\n%s", name, err, out)
				}
				want := env.take("orders", "mail")
				oursAt := time.Now()
				signature, options := canvas.golang()
				if _, err := env.client.Send(t.Context(), signature, options...); err != nil {
					t.Fatalf("%s: %v", name, err)
				}
				got := env.take("orders", "mail")
				if len(got) != len(want) || len(got) == 0 {
					t.Errorf("%s: %d messages, Python sent %d", name, len(got), len(want))
					continue
				}
				ours, theirs := newNames(), newNames()
				for i := range got {
					a, b := flatDelivery(t, ours, oursAt, got[i]), flatDelivery(t, theirs, theirsAt, want[i])
					for _, field := range union(a, b) {
						if a[field] != b[field] && field != "headers.ignore_result" && field != "headers.eta" {
							t.Errorf("%s, message %d, %s:\n got %s\nwant %s", name, i, field, a[field], b[field])
						}
					}
				}
			}
		})
	}
}

func flatDelivery(t *testing.T, names *names, now time.Time, d amqp.Delivery) map[string]string {
	return flat(t, names, now, d.Exchange, d.RoutingKey, propertiesOf(d), d.Headers, d.Body)
}
