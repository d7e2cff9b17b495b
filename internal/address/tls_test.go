package address_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/address"
)

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
	} {
		brokers, err := address.ParseBrokers(tt.url)
		if err != nil {
			t.Fatal(err)
		}
		config, err := brokers[0].TLSConfig()
		switch {
		case tt.want == "":
			if err != nil || config == nil || config.RootCAs == nil {
				t.Errorf("%s: %+v, %v", tt.url, config, err)
			}
		case err == nil || !strings.Contains(err.Error(), tt.want):
			t.Errorf("%s: got %v, want %q", tt.url, err, tt.want)
		}
	}
	if config, err := (address.Broker{TLS: true}).TLSConfig(); config != nil || err != nil {
		t.Errorf("without options: %v, %v", config, err)
	}
}

// The connection goes to 127.0.0.1 for localhost, as in kombu, and the certificate may be
// for either.
func TestServerNames(t *testing.T) {
	t.Parallel()
	for text, want := range map[string][]string{
		"amqps://LocalHost:1/v": {"localhost", "127.0.0.1"}, "amqps://127.0.0.1": {"127.0.0.1"}, "amqps://": {"127.0.0.1"}, "amqps://[::1]": {"::1"},
		"amqps://Rabbit.example": {"rabbit.example"},
	} {
		brokers, err := address.ParseBrokers(text)
		if err != nil {
			t.Fatal(err)
		}
		if got := brokers[0].ServerNames(); !slices.Equal(got, want) || brokers[0].Host != want[len(want)-1] {
			t.Errorf("%s: %q at %s, want %q", text, got, brokers[0].Host, want)
		}
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
