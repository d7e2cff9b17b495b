package amqp_test

import (
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker/amqp"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker/brokertest"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestBroker(t *testing.T) {
	t.Parallel()
	var proxies sync.Map // by broker
	brokertest.Subject{
		Open: func(t *testing.T) broker.Broker {
			proxy, address := workertest.NewProxy(t, devenv.Broker(t))
			b := amqp.New(amqp.Config{Addresses: address, Heartbeat: 10 * time.Second, Name: "test@shop", Logger: workertest.Logger(t)})
			proxies.Store(b, proxy)
			return b
		},
		Disconnect: func(_ *testing.T, b broker.Broker) {
			proxy, _ := proxies.Load(b)
			proxy.(*workertest.Proxy).CutOnce()
		},
	}.Test(t)
}
