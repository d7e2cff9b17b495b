package compose_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/compose"
)

func engine(t *testing.T, host string) *compose.Engine {
	t.Helper()
	e, err := compose.NewEngine(compose.EngineConfig{Host: host})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Close() })
	return e
}

func TestAnUnreachableEngineIsReported(t *testing.T) {
	t.Parallel()
	_, err := engine(t, "tcp://127.0.0.1:1").Containers(t.Context(), "p", "web")
	if !errors.Is(err, compose.ErrUnreachable) || !strings.Contains(err.Error(), "tcp://127.0.0.1:1") {
		t.Errorf("%v", err)
	}
	if err := engine(t, "tcp://127.0.0.1:1").Ping(t.Context()); !errors.Is(err, compose.ErrUnreachable) {
		t.Errorf("%v", err)
	}
	if _, err := compose.NewEngine(compose.EngineConfig{Host: "no host"}); err == nil {
		t.Error("a bad address was accepted")
	}
}

func TestContainersAreRead(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Api-Version", "1.41")
		w.Header().Set("Content-Type", "application/json")
		_, path, _ := strings.Cut(r.URL.Path, "/containers/")
		switch path {
		case "json":
			for _, label := range []string{"com.docker.compose.project=p", "com.docker.compose.service=web"} {
				if !strings.Contains(r.URL.Query().Get("filters"), label) {
					t.Errorf("asked for %s", r.URL)
				}
			}
			fmt.Fprint(w, `[
				{"Id": "a", "Labels": {"com.docker.compose.service": "web", "com.docker.compose.config-hash": "h", "com.docker.compose.oneoff": "True"}},
				{"Id": "b", "Labels": {"com.docker.compose.service": "web", "com.docker.compose.config-hash": "h"}},
				{"Id": "b2", "Labels": {"com.docker.compose.service": "web"}},
				{"Id": "c", "Labels": {"com.docker.compose.service": "web", "com.docker.compose.config-hash": "h"}}]`)
		case "b/json":
			fmt.Fprint(w, `{"Id": "b", "Name": "/p-web-1", "Image": "sha256:1", "RestartCount": 3, "State": {"Status": "running",
				"ExitCode": 0, "StartedAt": "2026-01-14T09:30:00.5Z", "OOMKilled": true, "Health": {"Status": "unhealthy", "Log": [{"ExitCode": 0}, {"ExitCode": 7, "Output": "no"}]}},
				"Config": {"Tty": true, "Image": "p-web"}, "HostConfig": {"NetworkMode": "container:d", "VolumesFrom": ["e:ro"]}}`)
		case "d/json":
			fmt.Fprint(w, `{"Id": "d", "NetworkSettings": {"Networks": {"n": {"IPAddress": "172.18.0.3", "GlobalIPv6Address": ""}},
				"Ports": {"80/tcp": [{"HostIp": "0.0.0.0", "HostPort": "8080"}], "53/udp": [{"HostIp": "0.0.0.0", "HostPort": "53"}], "81/tcp": null}}}`)
		case "b/logs":
			fmt.Fprint(w, strings.Repeat("x", 100<<10)+"the end\n")
		case "c/json":
			w.WriteHeader(http.StatusNotFound)
			fmt.Fprint(w, `{"message": "No such container: c"}`)
		default:
			fmt.Fprint(w, "OK")
		}
	}))
	defer server.Close()
	e := engine(t, strings.Replace(server.URL, "http://", "tcp://", 1))
	containers, err := e.Containers(t.Context(), "p", "web")
	if err != nil || len(containers) != 1 {
		t.Fatalf("%+v, %v", containers, err)
	}
	if got, want := fmt.Sprintf("%+v", containers[0]), "{ID:b Name:p-web-1 Service:web Number:0 ImageID:sha256:1 ConfigHash:h Replaces:false DependsOn: Created:0001-01-01 00:00:00 +0000 UTC State:running Health:unhealthy ExitCode:0 Restarts:3 RestartPolicy: Error: StartedAt:2026-01-14 09:30:00.5 +0000 UTC "+
		"Image:p-web OOMKilled:true HealthOutput:no HealthExit:7 Network:{Host:false Addresses:[172.18.0.3] Published:[0.0.0.0:8080]} Networks:[] NetworkIDs:map[] Shares:[d] VolumesFrom:[e] Volumes:map[] OwnVolumes:[]}"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	tail, err := e.LogTail(t.Context(), "b", 20)
	// What may be the end of a credential is left out at the beginning.
	if err != nil || !strings.HasSuffix(tail, "xthe end\n") || len(tail) != 64<<10-256 {
		t.Errorf("%d bytes, %v", len(tail), err)
	}
	if _, err := e.LogTail(t.Context(), "c", 20); err == nil || !strings.Contains(err.Error(), "No such container: c") {
		t.Errorf("%v", err)
	}
}

// serve returns a client of an engine that the handler plays.
func serve(t *testing.T, handler http.HandlerFunc) *compose.Engine {
	t.Helper()
	server := httptest.NewServer(handler)
	t.Cleanup(server.Close)
	return engine(t, strings.Replace(server.URL, "http://", "tcp://", 1))
}

// cut answers with the beginning of a text, and closes the connection.
func cut(w http.ResponseWriter, r *http.Request, text string, reset bool) {
	if r.Method == http.MethodHead {
		return
	}
	// A connection that is closed before all of the request is read is reset.
	if _, err := io.Copy(io.Discard, r.Body); err != nil {
		panic(err)
	}
	connection, buffer, err := w.(http.Hijacker).Hijack()
	if err != nil {
		panic(err)
	}
	defer connection.Close()
	fmt.Fprintf(buffer, "HTTP/1.1 200 OK\r\nApi-Version: 1.41\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n%s", text)
	buffer.Flush()
	if tcp, is := connection.(*net.TCPConn); is && reset {
		_ = tcp.SetLinger(0)
	}
}

// An engine behind a proxy is as unreachable as one whose socket is gone, however the
// proxy says so, and so is one that ends in the middle of an answer. All who wait for an
// engine go by that.
func TestAnEngineBehindAProxyIsUnreachable(t *testing.T) {
	t.Parallel()
	status := func(code int, text string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "text/html")
			w.WriteHeader(code)
			io.WriteString(w, text)
		}
	}
	const page = "<html><body><h1>503 Service Unavailable</h1>\nNo server is available to handle this request.\n</body></html>\n"
	for name, test := range map[string]struct {
		serve http.HandlerFunc
		why   string
	}{
		"bad gateway":           {status(http.StatusBadGateway, ""), "status 502 Bad Gateway"},
		"no server":             {status(http.StatusServiceUnavailable, page), "status 503 Service Unavailable"},
		"gateway timeout":       {status(http.StatusGatewayTimeout, page), "status 504 Gateway Timeout"},
		"closed in the middle":  {func(w http.ResponseWriter, r *http.Request) { cut(w, r, `[{"Id": "a`, false) }, "before the end of the answer"},
		"closed after the head": {func(w http.ResponseWriter, r *http.Request) { cut(w, r, "", false) }, "before the end of the answer"},
		"reset in the middle":   {func(w http.ResponseWriter, r *http.Request) { cut(w, r, `[{"Id": "a`, true) }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e := serve(t, test.serve)
			for asked, ask := range map[string]func(context.Context) error{
				"containers": func(ctx context.Context) error { _, err := e.Containers(ctx, "p", "web"); return err },
				"project":    func(ctx context.Context) error { _, err := e.Project(ctx, "p"); return err },
				"container":  func(ctx context.Context) error { _, _, err := e.InspectContainer(ctx, "a"); return err },
				"image":      func(ctx context.Context) error { _, err := e.InspectImage(ctx, "a"); return err },
				"pin":        func(ctx context.Context) error { _, err := e.FindPin(ctx, "a"); return err },
				"pins":       func(ctx context.Context) error { _, err := e.ListPins(ctx, ""); return err },
				"removal":    func(ctx context.Context) error { return e.UntagImage(ctx, "a") },
				"load":       func(ctx context.Context) error { return e.LoadImage(ctx, strings.NewReader("x")) },
				"save":       func(ctx context.Context) error { return e.SaveImage(ctx, "a", io.Discard) },
			} {
				err := ask(t.Context())
				if !errors.Is(err, compose.ErrUnreachable) || !strings.Contains(err.Error(), test.why) || strings.Contains(err.Error(), "html") {
					t.Errorf("%s: %v, want unreachable: %s", asked, err, test.why)
				}
			}
		})
	}
}

// What an engine refuses is no outage.
func TestARefusalIsNoOutage(t *testing.T) {
	t.Parallel()
	for code, want := range map[int]error{400: nil, 403: nil, 404: compose.ErrNotFound, 409: nil, 500: nil} {
		e := serve(t, func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(code) })
		_, err := e.InspectImage(t.Context(), "a")
		if err == nil || errors.Is(err, compose.ErrUnreachable) || want != nil && !errors.Is(err, want) || compose.IsForbidden(err) != (code == 403) {
			t.Errorf("%d: %v", code, err)
		}
	}
	e := serve(t, func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := e.InspectImage(ctx, "a"); errors.Is(err, compose.ErrUnreachable) {
		t.Errorf("a request that was given up: %v", err)
	}
	// A disk that is full is none either.
	e = serve(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "image") })
	if err := e.SaveImage(t.Context(), "a", fullDisk{}); !errors.Is(err, syscall.ENOSPC) || errors.Is(err, compose.ErrUnreachable) {
		t.Errorf("a full disk: %v", err)
	}
}

type fullDisk struct{}

func (fullDisk) Write([]byte) (int, error) {
	return 0, &fs.PathError{Op: "write", Path: "x", Err: syscall.ENOSPC}
}

// A proxy that answers in place of the engine shows no engine, nor does another server.
func TestAnEngineIsKnownByItsAnswer(t *testing.T) {
	t.Parallel()
	var up atomic.Bool
	e := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if !up.Load() {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		w.Header().Set("Api-Version", "1.41")
	})
	if err := e.Ping(t.Context()); !errors.Is(err, compose.ErrUnreachable) || e.HasAnswered() {
		t.Errorf("%v, has answered %t", err, e.HasAnswered())
	}
	up.Store(true)
	if err := e.Ping(t.Context()); err != nil || !e.HasAnswered() {
		t.Errorf("%v, has answered %t", err, e.HasAnswered())
	}
	up.Store(false)
	if err := e.Ping(t.Context()); !errors.Is(err, compose.ErrUnreachable) || !e.HasAnswered() {
		t.Errorf("%v, has answered %t", err, e.HasAnswered())
	}
}

// The engine goes on with a removal whose answer was lost, and refuses a second one until
// it is over.
func TestARemovalInProgressIsWaitedFor(t *testing.T) {
	t.Parallel()
	var asked atomic.Int32
	e := serve(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Api-Version", "1.41")
		w.Header().Set("Content-Type", "application/json")
		switch {
		case r.Method != http.MethodDelete:
		case asked.Add(1) < 3:
			w.WriteHeader(http.StatusConflict)
			io.WriteString(w, `{"message": "removal of container a is already in progress"}`)
		default:
			w.WriteHeader(http.StatusNotFound)
			io.WriteString(w, `{"message": "No such container: a"}`)
		}
	})
	if err := e.RemoveContainer(t.Context(), "a"); err != nil || asked.Load() != 3 {
		t.Errorf("%v after %d requests", err, asked.Load())
	}
}

// Whoever reads of an engine that does not answer wants to know why.
func TestWhyAnEngineIsUnreachable(t *testing.T) {
	t.Parallel()
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close() // it accepts nobody
	for host, why := range map[string]string{
		"tcp://127.0.0.1:1":                     ": connection refused",
		"tcp://nowhere.invalid:2375":            ": no such host",
		"tcp://u:geheim99@nowhere.invalid:2375": ": no such host",
		"unix:///nowhere/docker.sock":           ": no such file or directory",
		"tcp://" + silent.Addr().String():       ": no answer in time",
	} {
		config := compose.EngineConfig{Host: host}
		if strings.HasSuffix(host, silent.Addr().String()) {
			config.Timeout = 100 * time.Millisecond
		}
		e, err := compose.NewEngine(config)
		if err != nil {
			t.Fatal(err)
		}
		err = e.Ping(t.Context())
		if !errors.Is(err, compose.ErrUnreachable) || !strings.HasSuffix(err.Error(), why) {
			t.Errorf("%s: %v", host, err)
		}
		_ = e.Close()
	}
}

// A container that is created again has the MAC addresses of before, but for those that
// the engine makes from the IP address.
func TestMACAddressesAreAskedForAgain(t *testing.T) {
	t.Parallel()
	for api, want := range map[string]string{
		"1.41": "chosen=02:42:ac:12:00:77 connect made= connect six=92:5c:00:00:00:01", // one network at a time
		"1.44": "chosen=02:42:ac:12:00:77 made= six=92:5c:00:00:00:01",
	} {
		if got := askedMACAddresses(t, api); got != want {
			t.Errorf("API %s: asked for %s, want %s", api, got, want)
		}
	}
}

// askedMACAddresses creates a container at an engine with this version of its API, and
// returns which MAC addresses were asked for.
func askedMACAddresses(t *testing.T, api string) string {
	t.Helper()
	var asked []string
	e := serve(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Api-Version", api)
		w.Header().Set("Content-Type", "application/json")
		type endpoint struct{ MacAddress string }
		var body struct {
			NetworkingConfig struct{ EndpointsConfig map[string]endpoint }
			EndpointConfig   endpoint
		}
		switch _, path, _ := strings.Cut(r.URL.Path, "/v"+api+"/"); path {
		case "containers/create", "networks/made/connect", "networks/six/connect":
			if err := json.NewDecoder(r.Body).Decode(&body); err != nil {
				t.Error(err)
			}
			for name, endpoint := range body.NetworkingConfig.EndpointsConfig {
				asked = append(asked, name+"="+endpoint.MacAddress)
			}
			if _, name, found := strings.Cut(path, "networks/"); found {
				asked = append(asked, "connect "+strings.TrimSuffix(name, "/connect")+"="+body.EndpointConfig.MacAddress)
			}
			w.WriteHeader(http.StatusCreated)
			fmt.Fprint(w, `{"Id": "new"}`)
		default:
			fmt.Fprint(w, "OK")
		}
	})
	var before compose.Inspection
	err := before.UnmarshalJSON([]byte(`{"Id": "old", "Config": {"Image": "a"}, "HostConfig": {"NetworkMode": "chosen"}, "Networks": {
		"chosen": {"MacAddress": "02:42:ac:12:00:77", "IPAddress": "172.18.0.3"},
		"made": {"MacAddress": "02:42:ac:13:00:03", "IPAddress": "172.19.0.3"},
		"six": {"MacAddress": "92:5c:00:00:00:01", "GlobalIPv6Address": "fd00::3"}}}`))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := e.CreateContainer(t.Context(), "name", before); err != nil {
		t.Fatal(err)
	}
	slices.Sort(asked)
	return strings.Join(asked, " ")
}

// An older compose writes capabilities without CAP_, and this client with it. A rollback
// that compared the texts would create the container again and again.
func TestCapabilitiesAreComparedByMeaning(t *testing.T) {
	t.Parallel()
	const before = `{"CapAdd": ["NET_ADMIN", "sys_time"], "CapDrop": ["ALL"]}`
	inspection := func(host string) (i compose.Inspection) {
		if err := i.UnmarshalJSON([]byte(`{"HostConfig": ` + host + `}`)); err != nil {
			t.Fatal(err)
		}
		return i
	}
	for host, want := range map[string]string{
		`{"CapAdd": ["CAP_SYS_TIME", "CAP_NET_ADMIN"], "CapDrop": ["ALL"]}`:      "[]",
		`{"CapAdd": ["CAP_NET_ADMIN"], "CapDrop": ["CAP_ALL"]}`:                  "[HostConfig.CapAdd HostConfig.CapDrop]",
		`{"CapAdd": ["CAP_SYS_TIME", "CAP_NET_ADMIN"], "CapDrop": ["CAP_KILL"]}`: "[HostConfig.CapDrop]",
	} {
		if got := fmt.Sprint(inspection(before).Differences(inspection(host))); got != want {
			t.Errorf("%s: %s, want %s", host, got, want)
		}
	}
}
