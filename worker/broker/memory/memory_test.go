package memory_test

import (
	"testing"

	"go.uber.org/goleak"

	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker/brokertest"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker/memory"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestBroker(t *testing.T) {
	t.Parallel()
	brokertest.Subject{
		Open:       func(*testing.T) broker.Broker { return memory.New() },
		Disconnect: func(_ *testing.T, b broker.Broker) { b.(*memory.Broker).Disconnect() },
	}.Test(t)
}
