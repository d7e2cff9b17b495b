package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/pflag"
)

var healthCommand = &command{
	name:     "health",
	synonyms: []string{"ping", "healthcheck", "ready", "alive"},
	summary:  "ask a running worker whether it is healthy, for container health checks",
	about: "Asks the worker at the configured listen address, and prints the answer. Exit code 0: the worker is healthy. 1: it is not, or it does not answer. " +
		"Meant for HEALTHCHECK, in the same environment as the worker.",
	examples: []example{
		{"mm-orchestrator health", "in a Dockerfile: HEALTHCHECK CMD [\"mm-orchestrator\", \"health\"]"},
		{"mm-orchestrator health --ready --timeout 2s", "does it consume now?"},
	},
	topics: []topic{topicMetrics},
	setup: func(fs *pflag.FlagSet) runFunc {
		f := &healthFlags{}
		fs.BoolVar(&f.ready, "ready", false, "Ask /readyz instead of /healthz: does the worker consume now?")
		durationVar(fs, &f.timeout, "timeout", 5*time.Second, "How long to wait for the answer.")
		return f.run
	},
}

type healthFlags struct {
	ready   bool
	timeout time.Duration
}

func (f *healthFlags) run(ctx context.Context, p *program, in input) error {
	c, _, err := resolve(p.env, in.settings)
	if err != nil {
		return err
	}
	if c.Listen == "" {
		return &configError{c.name("MM_ORCHESTRATOR_LISTEN") + " is empty, so the worker answers no health checks: set it to the same host:port for worker and health"}
	}
	path := "/healthz"
	if f.ready {
		path = "/readyz"
	}
	ctx, cancel := context.WithTimeout(ctx, f.timeout)
	defer cancel()
	answer, err := probe(ctx, "http://"+probeAddress(c.Listen)+path)
	if err != nil {
		return err
	}
	fmt.Fprintln(p.stdout, answer)
	return nil
}

// probeAddress is the address at which this machine reaches a worker that
// listens at address.
func probeAddress(address string) string {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return address
	}
	if ip, err := netip.ParseAddr(host); host == "" || (err == nil && ip.IsUnspecified()) {
		host = "127.0.0.1"
		if err == nil && ip.Is6() {
			host = "::1"
		}
	}
	return net.JoinHostPort(host, port)
}

// errNothingListens is in an error of probe if the connection was refused.
var errNothingListens = errors.New("connection refused, nothing listens there")

// probe returns the body of a 200 answer. Any other answer is an error with the
// reason in the body.
func probe(ctx context.Context, url string) (string, error) {
	// No proxy: the worker is on this machine.
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	res, err := client.Do(req)
	if err != nil {
		switch {
		case errors.Is(err, syscall.ECONNREFUSED):
			return "", fmt.Errorf("no worker answers at %s: %w", req.URL.Host, errNothingListens)
		case errors.Is(err, context.DeadlineExceeded):
			return "", fmt.Errorf("no worker answers at %s in time", req.URL.Host)
		}
		return "", fmt.Errorf("no worker answers at %s: %w", req.URL.Host, errors.Unwrap(err))
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, 4<<10))
	if err != nil {
		return "", fmt.Errorf("cannot read the answer from %s: %w", req.URL.Host, err)
	}
	text := oneLine(string(body), 2000)
	switch res.StatusCode {
	case http.StatusOK, http.StatusServiceUnavailable: // what a worker answers
	default:
		return "", &curedError{
			fmt.Errorf("another program than a worker answers at %s: status %d", req.URL.Host, res.StatusCode),
			"Set MM_ORCHESTRATOR_LISTEN to the same free address for worker and health",
		}
	}
	if res.StatusCode != http.StatusOK {
		if text == "" {
			text = "no reason given"
		}
		return "", fmt.Errorf("unhealthy (%d from %s): %s", res.StatusCode, strings.TrimPrefix(url, "http://"), text)
	}
	return text, nil
}
