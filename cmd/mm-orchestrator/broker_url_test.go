package main

import (
	"bytes"
	"encoding/json"
	"os/exec"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
)

// brokerURLs are forms that kombu and we must read alike.
var brokerURLs = []string{
	"amqp://guest:guest@rabbitmq:5672//",
	"amqp://",
	"amqp:///",
	"amqp:////",
	"pyamqp://",
	"amqp://rabbitmq",
	"amqp://rabbitmq/",
	"amqp://RabbitMQ:5673",
	"amqp://user@rabbitmq",
	"amqp://user:@rabbitmq",
	"amqp://:pw@rabbitmq",
	"amqp://user:pw@rabbitmq/prod",
	"amqp://user:pw@rabbitmq//prod",
	"amqp://user:pw@rabbitmq/%2F",
	"amqp://user:pw@rabbitmq/%2Fprod",
	"amqp://user:pw@rabbitmq/a/b",
	"amqp://us%40er:p%2Fw%3A%20%25@rabbitmq:5672/v%20host",
	"amqp://user:p@ss@rabbitmq:5672/",
	"amqp://user:a:b@rabbitmq",
	"amqp://user:100%@rabbitmq",
	"amqp://user:a+b@rabbitmq",
	"amqp://localhost//",
	"amqp://[::1]:5672//",
	"amqps://user:pw@rabbitmq/prod",
	"amqps://user:pw@rabbitmq:5679/prod",
}

// The judge is kombu itself, in the oldest and newest Celery that we stand
// beside.
func TestBrokerURLsAreReadAsKombuReadsThem(t *testing.T) {
	t.Parallel()
	const program = `
import json, sys
from kombu import Connection
out = []
for url in json.load(sys.stdin):
    c = Connection(url)
    t = c.transport
    p = {k: (getattr(c, k) or v) for k, v in t.default_connection_params.items() if k in ("userid", "password", "hostname", "port")}
    host = p["hostname"] if p["hostname"] != "localhost" else "127.0.0.1"
    out.append([c.transport_cls in ("amqps",) or bool(c.ssl), p["userid"], p["password"], host, p["port"], c.virtual_host])
json.dump(out, sys.stdout)
`
	input, err := json.Marshal(brokerURLs)
	if err != nil {
		t.Fatal(err)
	}
	for _, version := range []string{"5.4.0", "5.7.0"} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			cmd := exec.CommandContext(t.Context(), devenv.Celery(t, version), "-c", program)
			cmd.Stdin = bytes.NewReader(input)
			var stderr bytes.Buffer
			cmd.Stderr = &stderr
			out, err := cmd.Output()
			if err != nil {
				t.Fatalf("%v\n%s", err, stderr.String())
			}
			var kombu [][]any
			if err := json.Unmarshal(out, &kombu); err != nil {
				t.Fatal(err)
			}
			for i, text := range brokerURLs {
				b, err := parseBrokerURL(text)
				if err != nil {
					t.Errorf("%s: %v", text, err)
					continue
				}
				got := []any{b.TLS, b.User, b.Password.Reveal(), b.Host, float64(b.Port), b.VHost}
				if !reflect.DeepEqual(got, kombu[i]) {
					t.Errorf("%s:\n got %v\nwant %v", text, got, kombu[i])
				}
			}
		})
	}
}

func TestBrokerURLForAConnection(t *testing.T) {
	t.Parallel()
	brokers, err := parseBrokerURLs("pyamqp://us%40er:p%2Fw%3A%20%2B@One:1//;amqps://two/v%2Fh?ssl_ca_certs=/ca.pem&ssl_cert_reqs=CERT_REQUIRED&heartbeat=30; ;")
	if err != nil {
		t.Fatal(err)
	}
	if b := brokers[1]; b.CAFile != "/ca.pem" || b.Heartbeat != 30*time.Second {
		t.Errorf("options: %+v", b)
	}
	var plain, redacted []string
	for _, b := range brokers {
		plain = append(plain, b.AMQP().Reveal())
		redacted = append(redacted, b.Redacted())
	}
	if want := []string{"amqp://us%40er:p%2Fw%3A%20%2B@one:1/%2F", "amqps://guest:guest@two:5671/v%2Fh"}; !reflect.DeepEqual(plain, want) {
		t.Errorf("got %q\nwant %q", plain, want)
	}
	if want := []string{"amqp://us%40er:***@one:1/%2F", "amqps://guest:***@two:5671/v%2Fh"}; !reflect.DeepEqual(redacted, want) {
		t.Errorf("got %q\nwant %q", redacted, want)
	}
}

func TestBrokerURLsThatAreRefused(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"":                                     "no broker is named",
		" ; ":                                  "no broker is named",
		"rabbitmq":                             "no scheme",
		"redis://redis":                        "not supported",
		"sqs://":                               "not supported",
		"amqp://h:0":                           "not a number from 1",
		"amqp://h:99999":                       "not a number from 1",
		"amqp://::1":                           "brackets",
		"amqp://[::1":                          "of the form [address]:port",
		"amqp://u:p#w@h":                       "%23",
		"amqp://h?ssl_cert_reqs=CERT_NONE":     "always checked",
		"amqp://h?heartbeat=x":                 "number of seconds",
		"amqp://h?ssl_ca_certs=/x":             "amqps://",
		"amqps://h?ssl_certfile=/x":            "go together",
		"amqp://h?surprise=1":                  "not supported",
		"amqp://h/" + strings.Repeat("v", 256): "longer than 255",
		"amqp://u:a%0Ab@h":                     "control character",
	} {
		_, err := parseBrokerURLs(text)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want %q", text, err, want)
		}
	}
}
