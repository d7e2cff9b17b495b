package client_test

import (
	"context"
	"errors"
	"math/big"
	"os"
	"os/exec"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/client"
	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/results/postgres"
)

// startPython runs testdata/shop.py until the test ends.
func startPython(t *testing.T, version, broker, database string) {
	t.Helper()
	backend := strings.Replace(database, "postgres://", "db+postgresql+psycopg2://", 1)
	cmd := exec.Command(devenv.Celery(t, version), "testdata/shop.py", broker, backend)
	output, err := os.CreateTemp(t.TempDir(), "worker")
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = output, output
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		_ = output.Close()
		if text, err := os.ReadFile(output.Name()); err == nil && t.Failed() {
			t.Logf("%s", text)
		}
	})
}

func get[T any](t *testing.T, r *client.Result) T {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	var value T
	if err := r.Get(ctx, &value); err != nil {
		t.Fatal(err)
	}
	return value
}

func equal[T any](t *testing.T, what string, got, want T) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

// A real Celery worker runs what the client sends, and the client reads what it
// stores.
func TestPythonWorkersRunWhatTheClientSends(t *testing.T) {
	t.Parallel()
	for _, version := range []string{"5.4.0", "5.5.3", "5.6.3", "5.7.0"} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			database := devenv.Database(t)
			backend, err := postgres.Open(t.Context(), database)
			if err != nil {
				t.Fatal(err)
			}
			defer backend.Close()
			env := newTestEnv(t, backend)
			startPython(t, version, env.url, database)
			send := func(s client.Signature, options ...client.Option) *client.Result {
				t.Helper()
				r, err := env.client.Send(t.Context(), s, options...)
				if err != nil {
					t.Fatal(err)
				}
				return r
			}
			equal(t, "add", get[int](t, send(add(2, 3))), 5)
			equal(t, "kwargs", get[int](t, send(add().Kwarg("y", 2).Kwarg("x", 1), client.Countdown(50*time.Millisecond), client.Expires(time.Minute))), 3)
			equal(t, "compressed", get[int](t, send(add(1, 1), client.Compress())), 2)
			huge := new(big.Int).Lsh(big.NewInt(1), 100)
			equal(t, "big", get[*big.Int](t, send(add(huge, 1))).String(), new(big.Int).Add(huge, big.NewInt(1)).String())
			equal(t, "types", get[[]string](t, send(client.Task("shop.types", append(rich, []byte("abc"), []byte{0xff}, nil, 1.5, true)...))),
				[]string{"datetime", "date", "time", "Decimal", "UUID", "bytes", "bytes", "NoneType", "float", "bool"})

			chain := send(client.Chain(add(1, 2), add(10), client.Group(add(100), add(200))))
			equal(t, "chain with a group", get[[]int](t, chain), []int{113, 213})
			equal(t, "first of the chain", get[int](t, chain.Parent.Parent), 3)
			group := send(client.Group(add(1, 1), client.Chain(add(2, 2), add(3)), add(5, 5)), client.Queue("mail"))
			equal(t, "group", get[[]int](t, group), []int{2, 7, 10})
			if state, err := group.State(t.Context()); state != "SUCCESS" || err != nil {
				t.Errorf("group is %s, %v", state, err)
			}

			type request struct {
				Root, Shadow, Queue string
				Parent, Group       *string // None here
				Headers, Stamps     map[string]any
				Priority            int
				Timelimit           []any
			}
			seen := get[request](t, send(client.Task("shop.request"), client.Queue("mail"), client.Priority(4), client.Shadow("nice"),
				client.Header("x-tenant", "acme"), client.Stamp("trace", "a1"), client.TimeLimit(30*time.Second, 20*time.Second)))
			if seen.Queue != "mail" || seen.Priority != 4 || seen.Shadow != "nice" || seen.Headers["x-tenant"] != "acme" || seen.Stamps["trace"] != "a1" || seen.Parent != nil || seen.Root == "" {
				t.Errorf("request %+v", seen)
			}

			linked := protocol.NewID()
			sum := send(add(20, 22), client.Link(client.Task("shop.note", "linked").With(client.TaskID(linked))))
			equal(t, "callback", get[[]any](t, env.client.Result(linked)), []any{int64(42), "linked"})
			if version == "5.7.0" {
				get[int](t, sum)
				children, err := sum.Children(t.Context())
				if err != nil || len(children) != 1 || children[0].ID != linked {
					t.Errorf("children %v, %v", children, err)
				}
			}

			told := protocol.NewID()
			failed := send(client.Chain(client.Task("shop.fail", "B").Immutable(), add(1)), client.LinkError(client.Task("shop.told").With(client.TaskID(told))))
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			err = failed.Get(ctx, nil)
			var failure *client.TaskError
			if !errors.As(err, &failure) || failure.Exception.Type != "OutOfStock" || failure.Exception.Repr() != "OutOfStock('B', 7)" || !strings.Contains(failure.Traceback, "raise OutOfStock") {
				t.Errorf("failure %#v", err)
			}
			equal(t, "error callback", get[string](t, env.client.Result(told)), failed.Parent.ID)
			// Celery marks the later tasks of a failed chain.
			if state, err := failed.State(t.Context()); state != "FAILURE" || err != nil {
				t.Errorf("later task is %s, %v", state, err)
			}

			revoked := send(client.Chain(add(1, 1).With(client.Countdown(3*time.Second)), add(1)))
			if err := revoked.Parent.Revoke(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := revoked.Get(ctx, nil); !errors.As(err, &failure) || failure.State != "REVOKED" || failure.TaskID != revoked.Parent.ID {
				t.Errorf("revoked: %v", err)
			}
		})
	}
}
