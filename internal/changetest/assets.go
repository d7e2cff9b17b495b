package changetest

import (
	"fmt"
	"net"
	"net/http"
	"sync/atomic"
	"time"
)

// assets is a server that images are built with, as they are with the network: with
// it off, no image can be built again.
type assets struct {
	server   *http.Server
	listener net.Listener
	done     chan struct{}
	off      atomic.Bool
}

func newAssets() (*assets, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	a := &assets{listener: listener, done: make(chan struct{})}
	mux := http.NewServeMux()
	mux.HandleFunc("/asset", func(w http.ResponseWriter, _ *http.Request) {
		if a.off.Load() {
			http.Error(w, "there is no network", http.StatusBadGateway)
			return
		}
		w.Header().Set("Last-Modified", time.Unix(1_700_000_000, 0).UTC().Format(http.TimeFormat))
		fmt.Fprintln(w, "an asset")
	})
	mux.HandleFunc("/off", func(http.ResponseWriter, *http.Request) { a.off.Store(true) })
	a.server = &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	go func() {
		defer close(a.done)
		_ = a.server.Serve(listener)
	}()
	return a, nil
}

func (a *assets) url(path string) string { return "http://" + a.listener.Addr().String() + path }

func (a *assets) close() {
	_ = a.server.Close()
	<-a.done
}
