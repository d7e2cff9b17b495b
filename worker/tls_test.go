package worker_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/moonladderstudios/mm-orchestrator/worker"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

// tlsFront starts a TLS proxy for the broker, whose certificate is for 127.0.0.1, or for
// names if they are given. It returns its amqps:// URL and the certificate, which clients
// have to trust.
func tlsFront(t *testing.T, broker string, names ...string) (string, *x509.Certificate) {
	t.Helper()
	address, err := url.Parse(broker)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), DNSNames: names}
	if len(names) == 0 {
		template.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1)}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	listener, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}})
	if err != nil {
		t.Fatal(err)
	}
	target := address.Host
	var wait sync.WaitGroup
	wait.Go(func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", target)
			if err != nil {
				_ = client.Close()
				continue
			}
			relay := func(to, from net.Conn) {
				_, _ = io.Copy(to, from)
				_, _ = to.Close(), from.Close()
			}
			wait.Go(func() { relay(server, client) })
			wait.Go(func() { relay(client, server) })
		}
	})
	t.Cleanup(func() { _ = listener.Close(); wait.Wait() })
	address.Scheme, address.Host = "amqps", listener.Addr().String()
	return address.String(), certificate
}

// trust returns a configuration that trusts a certificate.
func trust(certificate *x509.Certificate) *tls.Config {
	roots := x509.NewCertPool()
	roots.AddCert(certificate)
	return &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}
}

func TestTLS(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	secure, certificate := tlsFront(t, r.url)
	cfg := r.config()
	cfg.Broker = secure
	cfg.TLS = trust(certificate)
	w := newWorker(t, cfg)
	registerShop(w)
	stop := workertest.Start(t, w)
	r.result(r.send(workertest.Message("orders", "shop.add", workertest.Args(1, 2), nil)))
	if err := stop(); err != nil {
		t.Error(err)
	}

	cfg.TLS = nil // the system's root certificates do not include it
	cfg.StartTimeout = -1
	w = newWorker(t, cfg)
	registerShop(w)
	if err := w.Run(t.Context()); !errors.Is(err, worker.ErrUnreachable) || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("got %v, want an error about the certificate", err)
	}
}

// localhost is dialled as 127.0.0.1, and its certificate may be for either. A name that the
// program gives is the only one that counts.
func TestTLSWithLocalhost(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	for _, tt := range []struct {
		what, host string
		names      []string // of the certificate; none is 127.0.0.1
		serverName string
		want       string // in the error, or "" for success
	}{
		{"for localhost", "localhost", []string{"localhost"}, "", ""},
		{"for localhost, in capitals", "LocalHost", []string{"localhost"}, "", ""},
		{"for the address", "localhost", nil, "", ""},
		{"for neither", "localhost", []string{"rabbit.example"}, "", "not localhost"},
		{"the address is written", "127.0.0.1", []string{"localhost"}, "", "127.0.0.1"},
		{"the name is given", "localhost", []string{"rabbit.example"}, "rabbit.example", ""},
		{"another name is given", "localhost", []string{"localhost"}, "rabbit.example", "not rabbit.example"},
		{"another name is given for the address", "localhost", nil, "rabbit.example", "rabbit.example"},
	} {
		t.Run(tt.what, func(t *testing.T) {
			t.Parallel()
			secure, certificate := tlsFront(t, r.url, tt.names...)
			secure = strings.Replace(secure, "127.0.0.1", tt.host, 1)
			file := filepath.Join(t.TempDir(), "ca.pem")
			if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate.Raw}), 0o600); err != nil {
				t.Fatal(err)
			}
			ways := map[string]worker.Config{"TLS": {Broker: secure, TLS: trust(certificate)}}
			ways["TLS"].TLS.ServerName = tt.serverName
			if tt.serverName == "" {
				ways["ssl_ca_certs"] = worker.Config{Broker: secure + "?ssl_ca_certs=" + file}
			}
			for name, config := range ways {
				config.Queues, config.StartTimeout = []string{"q"}, -1
				_, err := newWorker(t, config).Inspect(t.Context())
				switch {
				case tt.want == "" && err != nil, tt.want != "" && (!errors.Is(err, worker.ErrUnreachable) || !strings.Contains(err.Error(), tt.want)):
					t.Errorf("%s: %v, want an error with %q", name, err, tt.want)
				}
			}
		})
	}
}

func TestTwoWorkersNeedTheirOwnRegisterers(t *testing.T) {
	t.Parallel()
	registry := prometheus.NewRegistry()
	cfg := worker.Config{Broker: "amqp://localhost", Queues: []string{"q"}}
	for _, name := range []string{"one", "two"} {
		cfg.Metrics = prometheus.WrapRegistererWith(prometheus.Labels{"worker": name}, registry)
		newWorker(t, cfg)
	}
	if _, err := worker.New(cfg); err == nil || !strings.Contains(err.Error(), "registerer") {
		t.Errorf("a second worker on the same registerer gives %v", err)
	}
}
