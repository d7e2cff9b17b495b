package worker_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/big"
	"net"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/moonladderstudios/mm-orchestrator/worker"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

// tlsFront starts a TLS proxy for the broker. It returns its amqps:// URL and the
// root certificates with which clients trust it.
func tlsFront(t *testing.T, broker string) (string, *x509.CertPool) {
	t.Helper()
	address, err := url.Parse(broker)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(certificate)
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
	return address.String(), roots
}

func TestTLS(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	secure, roots := tlsFront(t, r.url)
	cfg := r.config()
	cfg.Broker = secure
	cfg.TLS = &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}
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
