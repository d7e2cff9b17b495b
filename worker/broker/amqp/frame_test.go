package amqp_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker/amqp"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

// withFrameMax returns the address of a broker whose setting frame_max is smaller: the
// broker keeps to what the client has agreed to.
func withFrameMax(t *testing.T, address string, frameMax uint32) string {
	t.Helper()
	target, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	relay := func(client net.Conn) {
		defer client.Close()
		server, err := net.Dial("tcp", target.Host)
		if err != nil {
			return
		}
		defer server.Close()
		go func() {
			_, _ = io.Copy(server, client)
			_ = server.Close()
		}()
		// connection.start and connection.tune are the broker's first two frames.
		for range 2 {
			frame := make([]byte, 7)
			if _, err := io.ReadFull(server, frame); err != nil {
				return
			}
			frame = append(frame, make([]byte, binary.BigEndian.Uint32(frame[3:])+1)...)
			if _, err := io.ReadFull(server, frame[7:]); err != nil {
				return
			}
			if bytes.HasPrefix(frame[7:], []byte{0, 10, 0, 30}) {
				binary.BigEndian.PutUint32(frame[13:], frameMax)
			}
			if _, err := client.Write(frame); err != nil {
				return
			}
		}
		_, _ = io.Copy(client, server)
	}
	go func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			go relay(client)
		}
	}()
	proxied := *target
	proxied.Host = listener.Addr().String()
	return proxied.String()
}

// Headers that do not fit into a frame of this broker are an error of their message, and
// the connection stays.
func TestHeadersLargerThanTheBrokersFrames(t *testing.T) {
	t.Parallel()
	address := withFrameMax(t, devenv.Broker(t), 4096)
	b := amqp.New(amqp.Config{Addresses: address, Heartbeat: 10 * time.Second, Name: "test@shop", Logger: workertest.Logger(t)})
	c, err := b.OpenConsumer(t.Context(), []broker.Queue{{Name: "orders"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	p, err := b.OpenPublisher(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	for size := 3900; size < 4096; size++ {
		m := publication("id", "", "orders")
		m.Headers = map[string]any{"argsrepr": strings.Repeat("x", size)}
		err := p.Publish(t.Context(), m, nil)
		var unsendable *broker.UnsendableError
		if err != nil && !errors.As(err, &unsendable) {
			t.Fatalf("headers of %d bytes: %v", size, err)
		}
		if fits := size < 4000; fits != (err == nil) && (size < 3950 || size > 4050) {
			t.Errorf("headers of %d bytes: %v", size, err)
		}
	}
	if err := p.Publish(t.Context(), publication("next", "", "orders"), nil); err != nil {
		t.Errorf("the next message: %v", err)
	}
}
