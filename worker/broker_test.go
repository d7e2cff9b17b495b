package worker_test

import (
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/worker"
)

// Addresses that kombu accepts, with special characters in user name and
// password, raw and percent-encoded.
func TestAddressesThatKombuAccepts(t *testing.T) {
	t.Parallel()
	broker := devenv.Broker(t)
	good, err := url.Parse(broker)
	if err != nil {
		t.Fatal(err)
	}
	vhost := strings.TrimPrefix(good.Path, "/")
	user, password := "us er@"+vhost, "Geheim 99@x:[y]^%zz+ü;"
	devenv.BrokerUser(t, broker, user, password)
	for _, address := range []string{
		"pyamqp://us er@" + vhost + ":Geheim 99@x:[y]^%zz+ü%3B@" + good.Host + "/" + vhost,
		"AMQP://us%20er%40" + vhost + ":Geheim%2099@x:[y]^%25zz%2B%C3%BC%3B@" + good.Host + "/" + vhost + "?heartbeat=7.5",
		"amqp://" + strings.ReplaceAll(url.QueryEscape(user)+":"+url.QueryEscape(password), "+", "%20") + "@" + good.Host + "/" + vhost,
		"amqp://x:y@127.0.0.1:1/" + vhost + "; " + strings.ReplaceAll((&url.URL{Scheme: "amqp", User: url.UserPassword(user, password), Host: good.Host}).String(), ";", "%3B"),
	} {
		w, err := worker.New(worker.Config{Broker: address, Queues: []string{"q"}, StartTimeout: -1})
		if err != nil {
			t.Errorf("%s: %v", address, err)
			continue
		}
		found, err := w.Inspect(t.Context())
		if err != nil {
			t.Errorf("%s: %v", address, err)
		} else if want := good.Host + "/" + vhost; found.Broker != want {
			t.Errorf("%s: connected to %s, want %s", address, found.Broker, want)
		}
	}
}

// The options of an address set fields of Config, and errors about them do not
// contain the password.
func TestOptionsOfAnAddress(t *testing.T) {
	t.Parallel()
	config := worker.Config{Broker: "amqp://h?heartbeat=7.5", Queues: []string{"q"}}
	if got := config.WithDefaults().Heartbeat; got != 7500*time.Millisecond {
		t.Errorf("the heartbeat is %s", got)
	}
	config.Broker = "amqps://u:Geheim99@h?ssl_ca_certs=/nowhere/at/all.pem"
	if err := config.Validate(); err == nil || !strings.Contains(err.Error(), "/nowhere/at/all.pem") || strings.Contains(err.Error(), "Geheim99") {
		t.Errorf("got %v", err)
	}
}

// In an address with an unescaped @, the text after the host may be a part of the
// password: no error contains it.
func TestErrorsHideWhatMayBeAPartOfThePassword(t *testing.T) {
	t.Parallel()
	for _, address := range []string{"amqp://user:1/Geheim99@127.0.0.1:1/v", "amqp://user:Geheim98@127.0.0.1:1/Geheim99@h/v"} {
		w, err := worker.New(worker.Config{Broker: address, Queues: []string{"q"}, StartTimeout: -1})
		if err != nil {
			t.Fatal(err)
		}
		if _, err = w.Inspect(t.Context()); err == nil || strings.Contains(err.Error(), "Geheim") || strings.Contains(err.Error(), ":1") {
			t.Errorf("%s: %v", address, err)
		} else if !strings.Contains(err.Error(), "write %40 for an @") {
			t.Errorf("%s: the error does not say what to do: %v", address, err)
		}
	}
}
