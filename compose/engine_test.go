package compose_test

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

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
				{"Id": "a", "Labels": {"com.docker.compose.service": "web", "com.docker.compose.oneoff": "True"}},
				{"Id": "b", "Labels": {"com.docker.compose.service": "web"}},
				{"Id": "c", "Labels": {"com.docker.compose.service": "web"}}]`)
		case "b/json":
			fmt.Fprint(w, `{"Id": "b", "Name": "/p-web-1", "Image": "sha256:1", "RestartCount": 3, "State": {"Status": "running",
				"ExitCode": 0, "StartedAt": "2026-01-14T09:30:00.5Z", "OOMKilled": true, "Health": {"Status": "unhealthy", "Log": [{"ExitCode": 0}, {"ExitCode": 7, "Output": "no"}]}},
				"Config": {"Tty": true, "Image": "p-web"}, "HostConfig": {"NetworkMode": "container:d"}}`)
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
	if got, want := fmt.Sprintf("%+v", containers[0]), "{ID:b Name:p-web-1 Service:web Number:0 ImageID:sha256:1 ConfigHash: Replaces:false DependsOn: Created:0001-01-01 00:00:00 +0000 UTC State:running Health:unhealthy ExitCode:0 Restarts:3 RestartPolicy: Error: StartedAt:2026-01-14 09:30:00.5 +0000 UTC "+
		"Image:p-web OOMKilled:true HealthOutput:no HealthExit:7 Network:{Host:false Addresses:[172.18.0.3] Published:[0.0.0.0:8080]} Networks:[] Volumes:map[]}"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	tail, err := e.LogTail(t.Context(), "b", 20)
	if err != nil || !strings.HasSuffix(tail, "xthe end\n") || len(tail) != 64<<10 {
		t.Errorf("%d bytes, %v", len(tail), err)
	}
	if _, err := e.LogTail(t.Context(), "c", 20); err == nil || !strings.Contains(err.Error(), "No such container: c") {
		t.Errorf("%v", err)
	}
}
