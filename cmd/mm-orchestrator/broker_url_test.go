package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

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

// Whatever is accepted is handed to the AMQP library in a form that it reads
// as we do.
func FuzzBrokerURL(f *testing.F) {
	for _, text := range brokerURLs {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		b, err := parseBrokerURL(text)
		if err != nil {
			return
		}
		uri, err := amqp.ParseURI(b.AMQP().Reveal())
		if err != nil {
			t.Fatalf("%q becomes %q: %v", text, b.AMQP().Reveal(), err)
		}
		if uri.Username != b.User || uri.Password != b.Password.Reveal() || uri.Host != b.Host || uri.Port != b.Port || uri.Vhost != b.VHost || (uri.Scheme == "amqps") != b.TLS {
			t.Errorf("%q is read as %+v, the library reads %+v", text, b, uri)
		}
	})
}

func TestBrokerTLS(t *testing.T) {
	t.Parallel()
	certificate, key := selfSigned(t)
	nothing := filepath.Join(t.TempDir(), "nothing.pem")
	if err := os.WriteFile(nothing, []byte("nothing"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ url, want string }{
		{"amqps://h?ssl_ca_certs=" + certificate, ""},
		{"amqps://h?ssl_ca_certs=" + certificate + "&ssl_certfile=" + certificate + "&ssl_keyfile=" + key, ""},
		{"amqps://h?ssl_ca_certs=/nowhere.pem", "ssl_ca_certs of the broker URL cannot be read"},
		{"amqps://h?ssl_ca_certs=" + nothing, "has no certificate in PEM form"},
		{"amqps://h?ssl_certfile=" + nothing + "&ssl_keyfile=" + key, "ssl_certfile and ssl_keyfile of the broker URL cannot be used"},
		{"amqps://a?ssl_ca_certs=" + certificate + ";amqps://b", "different ssl_ options"},
	} {
		brokers, err := parseBrokerURLs(tt.url)
		if err != nil {
			t.Fatal(err)
		}
		config, err := brokerTLS(brokers)
		switch {
		case tt.want == "":
			if err != nil || config == nil || config.RootCAs == nil {
				t.Errorf("%s: %+v, %v", tt.url, config, err)
			}
		case err == nil || !strings.Contains(err.Error(), tt.want) || exitCode(err) != exitConfig:
			t.Errorf("%s: got %v, want %q", tt.url, err, tt.want)
		}
	}
	if config, err := brokerTLS([]brokerURL{{TLS: true}, {}}); config != nil || err != nil {
		t.Errorf("without options: %v, %v", config, err)
	}
}

// selfSigned writes a certificate and its key.
func selfSigned(t *testing.T) (certificate, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	certificate, key = filepath.Join(t.TempDir(), "cert.pem"), filepath.Join(t.TempDir(), "key.pem")
	for path, block := range map[string]*pem.Block{certificate: {Type: "CERTIFICATE", Bytes: der}, key: {Type: "PRIVATE KEY", Bytes: keyDER}} {
		if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return certificate, key
}
