package orchestrator

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/client"

	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
)

// The quiet period and the plan's timeouts, in seconds, of the tests with real
// services. Faults that sick services have come back within the quiet period; slow
// ones are well before the timeout, also on a busy machine.
const (
	serviceQuiet = 4 * time.Second
	sickTimeout  = 6
	slowTimeout  = 20
)

// busy is how much longer than promised verify may take on a machine that is busy
// with containers of other tests.
const busy = 5 * time.Second

// A service is a real service that verify judges. Its container has the program of
// testdata/service, published at a port of 127.0.0.1.
type service struct {
	name string
	// env is the program's environment.
	env string
	// restart is the restart policy, check the interval of docker's health check.
	restart string
	check   time.Duration
	// config changes the container before it is created.
	config func(*container.Config, *container.HostConfig)
	// more is how many further containers the service has, and env2 their
	// environment.
	more int
	env2 string
	// with runs when the containers have started, and may return a function that
	// runs while verify does.
	with func(*serviceEnv) func()
	// url is the plan's, the published port's by default, "-" for none. IP and PORT
	// stand for the container's address and the published port.
	url string
	// healthcheck is added to the plan's, parameters to those of verify.
	healthcheck, parameters string
	// often says that the service is also part of `go test`.
	often bool
	// want is a part of the failure's text.
	want string
}

// serviceEnv is the test of a service.
type serviceEnv struct {
	*testEnv
	docker  *client.Client
	project string
	port    uint16
	// ids are the service's containers.
	ids []string
	ip  string
	url string
}

// serviceImages are the two images of the services, made once.
var serviceImages struct {
	sync.Mutex
	users int
	name  string
}

// serviceTurns bounds how many services run at the same time.
var serviceTurns = make(chan struct{}, 8)

// eachService tests services side by side. They wait most of the time, so that more
// of them run than the tests' flag -parallel allows.
func eachService(t *testing.T, services []service, test func(*testing.T, service)) {
	var all sync.WaitGroup
	for _, s := range services {
		if s.often || everyLayout {
			all.Go(func() {
				serviceTurns <- struct{}{}
				defer func() { <-serviceTurns }()
				t.Run(s.name, func(t *testing.T) { test(t, s) })
			})
		}
	}
	all.Wait()
}

// makeServiceImages makes the images :new and :old of a name, and removes them when
// the last test that uses them ends.
func makeServiceImages(t *testing.T, docker *client.Client) string {
	t.Helper()
	serviceImages.Lock()
	defer serviceImages.Unlock()
	if serviceImages.users == 0 {
		dir := t.TempDir()
		build := exec.Command("go", "build", "-ldflags", "-s -w", "-o", filepath.Join(dir, "service"), "./testdata/service")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		program, err := os.ReadFile(filepath.Join(dir, "service"))
		if err != nil {
			t.Fatal(err)
		}
		serviceImages.name = "mm-verify-test-" + strings.ToLower(rand.Text()[:8])
		for _, tag := range []string{"new", "old"} {
			var layer bytes.Buffer
			archive := tar.NewWriter(&layer)
			if err := errors.Join(
				archive.WriteHeader(&tar.Header{Name: "service", Mode: 0o755, Size: int64(len(program))}), write(archive, program),
				archive.WriteHeader(&tar.Header{Name: "name", Mode: 0o644, Size: int64(len(serviceImages.name + tag))}), write(archive, []byte(serviceImages.name+tag)),
				archive.Close()); err != nil {
				t.Fatal(err)
			}
			answer, err := docker.ImageImport(t.Context(), client.ImageImportSource{Source: &layer, SourceName: "-"}, serviceImages.name,
				client.ImageImportOptions{Tag: tag, Changes: []string{`ENTRYPOINT ["/service"]`}})
			if err == nil {
				_, err = io.Copy(io.Discard, answer)
				answer.Close()
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	serviceImages.users++
	t.Cleanup(func() {
		serviceImages.Lock()
		defer serviceImages.Unlock()
		if serviceImages.users--; serviceImages.users > 0 {
			return
		}
		for _, tag := range []string{"new", "old"} {
			if _, err := docker.ImageRemove(context.Background(), serviceImages.name+":"+tag, client.ImageRemoveOptions{Force: true}); err != nil {
				t.Log(err)
			}
		}
	})
	return serviceImages.name
}

func write(w io.Writer, data []byte) error {
	_, err := w.Write(data)
	return err
}

// judge starts a service, runs verify and returns its failure, nil for success.
func (s service) judge(t *testing.T, timeout int) (*Failure, string) {
	t.Helper()
	_ = devenv.Compose(t) // says what is missing without an engine
	e := &serviceEnv{testEnv: newTestEnv(t), project: "mmverify" + strings.ToLower(rand.Text()[:8])}
	var err error
	if e.docker, err = client.New(client.FromEnv); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.docker.Close() })
	image := makeServiceImages(t, e.docker)
	ports, err := devenv.FreePorts(1)
	if err != nil {
		t.Fatal(err)
	}
	e.port = uint16(ports[0])
	t.Cleanup(e.remove)
	e.start(s, image+":new", s.env, e.port)
	for range s.more {
		e.start(s, image+":new", s.env2, 0)
	}
	engine, err := compose.NewEngine(compose.EngineConfig{Host: os.Getenv("DOCKER_HOST")})
	if err != nil {
		t.Fatal(err)
	}
	defer engine.Close()
	e.config.Engine, e.config.QuietPeriod = engine, serviceQuiet
	e.config.StateTimeout = time.Duration(timeout) * time.Second
	if found, err := e.docker.ContainerInspect(t.Context(), e.ids[0], client.ContainerInspectOptions{}); err == nil && found.Container.NetworkSettings != nil {
		for _, endpoint := range found.Container.NetworkSettings.Networks {
			e.ip = endpoint.IPAddress.String()
		}
	}
	e.url = "http://127.0.0.1:PORT/health"
	if s.url != "" {
		e.url = s.url
	}
	during := func() {}
	if s.with != nil {
		if f := s.with(e); f != nil {
			during = f
		}
	}
	e.url = strings.NewReplacer("IP", e.ip, "PORT", strconv.Itoa(int(e.port))).Replace(e.url)
	check := fmt.Sprintf(`"healthcheck": {"url": %q, "timeoutSeconds": %d, "intervalSeconds": 2%s}`, e.url, timeout, prefixed(s.healthcheck))
	if e.url == "-" {
		check = `"healthcheck": null`
	}
	e.plan(fmt.Sprintf(`[{"name": "restart", "parameters": {"command": ["docker", "compose", "--project-name", %q, "up", "-d", "--no-deps", "web"]}},
		{"name": "verify", "parameters": {%s%s}}]`, e.project, check, prefixed(s.parameters)))
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		during()
	}()
	begun := time.Now()
	_, _, err = e.execute("verify")
	took := time.Since(begun)
	<-ended
	if over := took - time.Duration(timeout)*time.Second - serviceQuiet; over > time.Second+busy {
		t.Errorf("verify took %s, which is %s more than the timeout and the quiet period", took, over)
	}
	log := e.artifact("verify.log")
	var failure *Failure
	if err != nil && !errors.As(err, &failure) {
		t.Fatal(err)
	}
	return failure, log
}

func prefixed(text string) string {
	if text == "" {
		return ""
	}
	return ", " + text
}

// create creates a container of the service.
func (e *serviceEnv) create(s service, image, env string, port uint16) (string, error) {
	config := &container.Config{
		Image: image, Env: strings.FieldsFunc(env, func(r rune) bool { return r == '|' }),
		Labels: map[string]string{"com.docker.compose.project": e.project, "com.docker.compose.service": "web", "com.docker.compose.oneoff": "False", "com.docker.compose.config-hash": "h"},
	}
	if s.check > 0 {
		config.Healthcheck = &container.HealthConfig{Test: []string{"CMD", "/service", "check"}, Interval: s.check, Timeout: 2 * time.Second, Retries: 2}
	}
	policy, retries, _ := strings.Cut(s.restart, ":")
	host := &container.HostConfig{RestartPolicy: container.RestartPolicy{Name: container.RestartPolicyMode(policy)}}
	if retries != "" {
		host.RestartPolicy.MaximumRetryCount, _ = strconv.Atoi(retries)
	}
	if port != 0 {
		inside := network.MustParsePort("8080/tcp")
		config.ExposedPorts = network.PortSet{inside: {}}
		host.PortBindings = network.PortMap{inside: {{HostIP: netip.MustParseAddr("127.0.0.1"), HostPort: strconv.Itoa(int(port))}}}
	}
	if s.config != nil {
		s.config(config, host)
	}
	created, err := e.docker.ContainerCreate(e.t.Context(), client.ContainerCreateOptions{
		Config: config, HostConfig: host, Name: fmt.Sprintf("%s-web-%d", e.project, len(e.ids)+1),
	})
	if err != nil {
		return "", err
	}
	e.ids = append(e.ids, created.ID)
	return created.ID, nil
}

func (e *serviceEnv) start(s service, image, env string, port uint16) {
	e.t.Helper()
	id, err := e.create(s, image, env, port)
	if err != nil {
		e.t.Fatal(err)
	}
	if s.want == "created" {
		return
	}
	if _, err := e.docker.ContainerStart(e.t.Context(), id, client.ContainerStartOptions{}); err != nil && !strings.Contains(s.want, "created") {
		e.t.Fatal(err)
	}
}

// remove removes all containers of the test.
func (e *serviceEnv) remove() {
	ctx := context.Background()
	list, err := e.docker.ContainerList(ctx, client.ContainerListOptions{All: true, Filters: client.Filters{}.Add("label", "com.docker.compose.project="+e.project)})
	if err != nil {
		e.t.Error(err)
		return
	}
	for _, item := range list.Items {
		e.ids = append(e.ids, item.ID)
	}
	for _, id := range e.ids {
		if _, err := e.docker.ContainerRemove(ctx, id, client.ContainerRemoveOptions{Force: true}); err != nil && !strings.Contains(err.Error(), "No such container") && !strings.Contains(err.Error(), "already in progress") {
			e.t.Log(err)
		}
	}
}

// do acts on the first container, and fails the test if that does not work.
func (e *serviceEnv) do(what string) {
	e.t.Helper()
	ctx, id := e.t.Context(), e.ids[0]
	now := 0
	var err error
	switch what {
	case "pause":
		_, err = e.docker.ContainerPause(ctx, id, client.ContainerPauseOptions{})
	case "unpause":
		_, err = e.docker.ContainerUnpause(ctx, id, client.ContainerUnpauseOptions{})
	case "kill":
		_, err = e.docker.ContainerKill(ctx, id, client.ContainerKillOptions{Signal: "KILL"})
	case "stop":
		_, err = e.docker.ContainerStop(ctx, id, client.ContainerStopOptions{Timeout: &now})
	case "restart":
		_, err = e.docker.ContainerRestart(ctx, id, client.ContainerRestartOptions{Timeout: &now})
	case "remove":
		_, err = e.docker.ContainerRemove(ctx, id, client.ContainerRemoveOptions{Force: true})
	}
	if err != nil {
		e.t.Error(what, err)
	}
}

// after returns a function that acts on the container when verify has been at work
// for a while.
func after(wait time.Duration, what ...string) func(*serviceEnv) func() {
	return func(e *serviceEnv) func() {
		return func() {
			for _, act := range what {
				timer := time.NewTimer(wait)
				<-timer.C
				e.do(act)
			}
		}
	}
}

// now returns a function that acts on the container before verify begins.
func now(what ...string) func(*serviceEnv) func() {
	return func(e *serviceEnv) func() {
		for _, act := range what {
			e.do(act)
		}
		return nil
	}
}

// stranger is a server of HTTP that is no container.
func stranger(e *serviceEnv) func() {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		e.t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(listener)
	}()
	e.t.Cleanup(func() {
		_ = server.Close()
		<-done
	})
	e.url = "http://" + listener.Addr().String() + "/"
	return nil
}

// another starts a container that is not one of the service's. It answers at a port
// of 127.0.0.1, or at an address of its own.
func another(published bool) func(*serviceEnv) func() {
	return func(e *serviceEnv) func() {
		ports, err := devenv.FreePorts(1)
		if err != nil {
			e.t.Fatal(err)
		}
		port := uint16(ports[0])
		id, err := e.create(service{config: func(c *container.Config, _ *container.HostConfig) { c.Labels["com.docker.compose.service"] = "other" }},
			serviceImages.name+":new", "", port)
		if err == nil {
			_, err = e.docker.ContainerStart(e.t.Context(), id, client.ContainerStartOptions{})
		}
		if err != nil {
			e.t.Fatal(err)
		}
		if published {
			e.url = fmt.Sprintf("http://127.0.0.1:%d/", port)
			return nil
		}
		found, err := e.docker.ContainerInspect(e.t.Context(), id, client.ContainerInspectOptions{})
		if err != nil {
			e.t.Fatal(err)
		}
		for _, endpoint := range found.Container.NetworkSettings.Networks {
			e.url = "http://" + endpoint.IPAddress.String() + ":8080/"
		}
		return nil
	}
}

// oldContainer adds a container of the service that runs the image of before.
func oldContainer(e *serviceEnv) func() {
	id, err := e.create(service{config: func(c *container.Config, _ *container.HostConfig) { c.Image = serviceImages.name + ":old" }}, "", "", 0)
	if err == nil {
		_, err = e.docker.ContainerStart(e.t.Context(), id, client.ContainerStartOptions{})
	}
	if err != nil {
		e.t.Fatal(err)
	}
	// Its image name now stands for the new image, as after a build.
	name := e.project + ":web"
	e.retag(name, ":old")
	e.replaceWith(id, name)
	return nil
}

// otherImage makes the image name of the only container stand for another image.
func otherImage(e *serviceEnv) func() {
	name := e.project + ":web"
	e.retag(name, ":new")
	e.replaceWith(e.ids[0], name)
	return nil
}

func (e *serviceEnv) retag(name, tag string) {
	e.t.Helper()
	if _, err := e.docker.ImageTag(e.t.Context(), client.ImageTagOptions{Source: serviceImages.name + tag, Target: name}); err != nil {
		e.t.Fatal(err)
	}
}

// replaceWith creates a container again from an image name, and lets that name
// stand for another image then.
func (e *serviceEnv) replaceWith(id, name string) {
	e.t.Helper()
	e.t.Cleanup(func() {
		_, _ = e.docker.ImageRemove(context.Background(), name, client.ImageRemoveOptions{Force: true})
	})
	first := id == e.ids[0]
	if _, err := e.docker.ContainerRemove(e.t.Context(), id, client.ContainerRemoveOptions{Force: true}); err != nil {
		e.t.Fatal(err)
	}
	port, other := uint16(0), ":new"
	if first {
		port, other = e.port, ":old"
	}
	fresh, err := e.create(service{}, name, "", port)
	if err == nil {
		_, err = e.docker.ContainerStart(e.t.Context(), fresh, client.ContainerStartOptions{})
	}
	if err != nil {
		e.t.Fatal(err)
	}
	e.retag(name, other)
}

func memory(limit int64) func(*container.Config, *container.HostConfig) {
	return func(_ *container.Config, h *container.HostConfig) { h.Memory, h.MemorySwap = limit, limit }
}

// sickServices are services that verify must not call healthy.
func sickServices() []service {
	all := []service{
		{name: "restart loop, exit 0", env: "LIFE=1s|EXIT=0", restart: "always"},
		{name: "restart loop that never answers", env: "STARTUP=5s|LIFE=1s", restart: "always", want: "restarted", often: true},
		{name: "gives up after two restarts", env: "LIFE=300ms", restart: "on-failure:2"},
		{name: "restart loop, slow start", env: "STARTUP=1s|LIFE=2s", restart: "always"},
		{name: "first answer after the quiet period, then ends", env: "STARTUP=4s|ANSWERS=1", restart: "always"},
		{name: "404", env: "STATUS=404", want: "timed out after 6s", often: true},
		{name: "500", env: "STATUS=500"},
		{name: "503", env: "STATUS=503"},
		{name: "401", env: "STATUS=401"},
		{name: "201 instead of 200", env: "STATUS=201"},
		{name: "204 instead of 200", env: "STATUS=204"},
		{name: "200 instead of 204", healthcheck: `"expectedStatus": 204`},
		{name: "redirect to 200", env: "MODE=redirect", often: true},
		{name: "redirect to itself", env: "STATUS=301"},
		{name: "well and not well in turn", env: "STATUS=loop 200 503", want: "did not stay healthy", often: true},
		{name: "two of three answers", env: "STATUS=loop 200x2 503"},
		{name: "three of four answers", env: "STATUS=loop 200x3 500"},
		{name: "well for a second, ill for a second", env: "FLAP=1s"},
		{name: "well for two seconds, ill for two seconds", env: "FLAP=2s"},
		{name: "well, then ill for good", env: "STATUS=200x3 500"},
		{name: "accepts and does not answer", env: "MODE=hang", want: "timed out after 6s", often: true},
		{name: "closes each connection", env: "MODE=reset"},
		{name: "speaks another protocol", env: "MODE=garbage"},
		{name: "headers without end", env: "MODE=headers"},
		{name: "body without end", env: "MODE=body"},
		{name: "answers after longer than the interval", env: "DELAY=4s"},
		{name: "listens at another port", env: "PORT=8081", often: true},
		{name: "listens at loopback of its container", env: "LISTEN=127.0.0.1"},
		{name: "HTTPS where HTTP is asked", env: "MODE=tls"},
		{name: "certificate that nobody has signed", env: "MODE=tls", url: "https://127.0.0.1:PORT/"},
		{name: "HTTP where HTTPS is asked", url: "https://127.0.0.1:PORT/"},
		{name: "answers HEAD only", env: "MODE=head"},
		{name: "refuses the login", env: "MODE=login", url: "http://u%40x:other@127.0.0.1:PORT/"},
		{name: "200, but unhealthy", env: "CHECK=1", check: 300 * time.Millisecond, want: "Its health check ended with code 1 and printed:\nhealth check ends with 1", often: true},
		{name: "200, unhealthy after a while", env: "CHECK=0 1", check: 300 * time.Millisecond},
		{name: "200, health check that hangs", env: "CHECKDELAY=1h", check: 300 * time.Millisecond},
		{name: "200, starting for ever, checks fail", env: "CHECK=1", check: 300 * time.Millisecond, config: func(c *container.Config, _ *container.HostConfig) { c.Healthcheck.StartPeriod = time.Hour }},
		{name: "200, first check is due in an hour", check: time.Hour, want: "is not proven to be healthy", often: true},
		{name: "200, no program for the health check", check: 300 * time.Millisecond, config: func(c *container.Config, _ *container.HostConfig) { c.Healthcheck.Test = []string{"CMD", "/nothing"} }},
		{name: "paused", with: now("pause"), want: "paused", often: true},
		{name: "paused while it is watched", with: after(500*time.Millisecond, "pause")},
		{name: "memory exhausted, in a loop", env: "LIFE=500ms|MEMORY=1", restart: "always", config: memory(32 << 20)},
		{name: "memory exhausted", env: "LIFE=1s|MEMORY=1", config: memory(32 << 20), want: "memory was exhausted"},
		{name: "cannot be started", want: "is created", config: func(c *container.Config, _ *container.HostConfig) { c.Entrypoint = []string{"/nothing"} }},
		{name: "was not started", want: "created"},
		{name: "image name stands for another image", with: otherImage, want: "runs image sha256:", often: true},
		{name: "the old container still runs too", with: oldContainer, want: "runs image sha256:"},
		{name: "no container, and another program answers", with: func(e *serviceEnv) func() { stranger(e); e.do("remove"); return nil }, want: "docker has no container of service web", often: true},
		{name: "a program of the machine answers", with: stranger, want: "a program of the machine", often: true},
		{name: "another container answers at its port", with: another(true), want: "which is not one of the service's", often: true},
		{name: "another container answers at its address", with: another(false), want: "which is not one of the service's"},
		{name: "one of two ends", more: 1, env2: "LIFE=1s"},
		{name: "one of three restarts", more: 2, env2: "LIFE=1500ms", restart: "always"},
		{name: "one of two is unhealthy", more: 1, env2: "CHECK=1", check: 300 * time.Millisecond},
		{name: "killed while it is watched", with: after(500*time.Millisecond, "kill"), want: "exit code 137"},
		{name: "stopped in spite of its policy", with: after(500*time.Millisecond, "stop"), restart: "always"},
		{name: "removed while it is watched", with: after(500*time.Millisecond, "remove"), want: "any more"},
		{name: "restarted all the time", with: after(time.Second, "restart", "restart", "restart", "restart", "restart", "restart"), want: "did not stay"},
		{name: "neither a URL nor a health check", url: "-", want: "neither the plan nor the container has a health check", often: true},
		{name: "no URL, unhealthy", url: "-", env: "CHECK=1", check: 300 * time.Millisecond},
		{name: "no URL, restart loop", url: "-", env: "LIFE=1s", restart: "always", parameters: `"runningIsEnough": true`},
		{name: "no URL, ends", url: "-", env: "LIFE=1s", parameters: `"runningIsEnough": true`},
		{name: "no URL, no container", url: "-", with: now("remove"), parameters: `"runningIsEnough": true`},
	}
	for _, life := range []string{"20ms", "300ms", "700ms", "1s", "1500ms"} {
		for _, policy := range []string{"always", "on-failure"} {
			all = append(all, service{name: "restart loop, " + policy + ", " + life, env: "LIFE=" + life, restart: policy})
		}
	}
	for _, life := range []string{"20ms", "500ms", "1s"} {
		for _, exit := range []string{"0", "3"} {
			all = append(all, service{name: "ends after " + life + " with code " + exit, env: "LIFE=" + life + "|EXIT=" + exit, want: "(exit code " + exit + ")", often: life == "1s"})
		}
	}
	for _, answers := range []string{"1", "2", "3"} {
		for _, policy := range []string{"always", "no"} {
			all = append(all, service{name: "ends after answer " + answers + ", " + policy, env: "ANSWERS=" + answers, restart: policy, often: answers == "1"})
		}
	}
	return all
}

// slowServices are services that are healthy, although some need a while or differ
// from what is usual.
func slowServices() []service {
	all := []service{
		{name: "healthy at once", often: true},
		{name: "answers of 500 first", env: "STATUS=500 200"},
		{name: "three of 503 first", env: "STATUS=503x3 200", often: true},
		{name: "five of 404 first", env: "STATUS=404x5 200"},
		{name: "a short fault after the first answer", env: "STATUS=200 503x2 200", often: true},
		{name: "restarts until it works", env: "CRASHES=2|LIFE=300ms", restart: "always", often: true},
		{name: "restarts once", env: "CRASHES=1|LIFE=1500ms", restart: "always"},
		{name: "restarts three times", env: "CRASHES=3|LIFE=200ms", restart: "always"},
		{name: "restarts on failure until it works", env: "CRASHES=2|LIFE=300ms", restart: "on-failure"},
		{name: "restarts once after it has answered", env: "CRASHES=1|LIFE=2s", restart: "always"},
		{name: "was killed by memory once", env: "CRASHES=1|LIFE=500ms|MEMORY=1", restart: "always", config: memory(32 << 20)},
		{name: "answers after half a second", env: "DELAY=500ms"},
		{name: "answers after one second", env: "DELAY=1s"},
		{name: "answers after one and a half seconds", env: "DELAY=1500ms"},
		{name: "chunks, slowly", env: "MODE=chunks"},
		{name: "huge body", env: "MODE=huge"},
		{name: "early hints", env: "MODE=hints"},
		{name: "HTTP/1.0 without a length", env: "MODE=old"},
		{name: "answers before it has read", env: "MODE=early"},
		{name: "login", env: "MODE=login", url: "http://u%40x:p%2Fw@127.0.0.1:PORT/", often: true},
		{name: "spaces and escapes", env: "MODE=query", url: "http://127.0.0.1:PORT/a b/ä?c=d e&f=%2f#g"},
		{name: "redirect is expected", env: "MODE=redirect", healthcheck: `"expectedStatus": 302`},
		{name: "204 is expected", env: "STATUS=204", healthcheck: `"expectedStatus": 204`},
		{name: "304 is expected", env: "STATUS=304", healthcheck: `"expectedStatus": 304`},
		{name: "404 is expected", env: "STATUS=404", healthcheck: `"expectedStatus": 404`},
		{name: "HEAD", env: "MODE=head", healthcheck: `"method": "head"`},
		{name: "POST", healthcheck: `"method": "POST"`},
		{name: "docker's check fails twice first", env: "CHECK=1 0", check: 500 * time.Millisecond, often: true},
		{name: "unhealthy first", env: "CHECK=1x3 0", check: 400 * time.Millisecond},
		{name: "docker's checks fail while it starts", env: "CHECK=1x5 0", check: 500 * time.Millisecond, config: func(c *container.Config, _ *container.HostConfig) { c.Healthcheck.StartPeriod = 5 * time.Second }},
		{name: "docker's check is due after two seconds", check: 2 * time.Second},
		{name: "docker's check is due after four seconds", check: 4 * time.Second, often: true},
		{name: "docker's check takes a second", env: "CHECKDELAY=1s", check: 500 * time.Millisecond},
		{name: "one failed check of docker's", env: "CHECK=0x2 1 0", check: 500 * time.Millisecond},
		{name: "two containers", more: 1},
		{name: "two containers, the second starts later", more: 1, env2: "STARTUP=2s", check: 500 * time.Millisecond},
		{name: "three containers", more: 2},
		{name: "its own address", url: "http://IP:8080/", often: true},
		{name: "name of the machine", url: "http://localhost:PORT/"},
		{name: "port at all addresses", config: func(_ *container.Config, h *container.HostConfig) {
			for port, bindings := range h.PortBindings {
				bindings[0].HostIP = netip.IPv4Unspecified()
				h.PortBindings[port] = bindings
			}
		}},
		{name: "network of the machine", config: func(c *container.Config, h *container.HostConfig) {
			c.Env = append(c.Env, "LISTEN=127.0.0.1", "PORT="+h.PortBindings[network.MustParsePort("8080/tcp")][0].HostPort)
			h.NetworkMode, h.PortBindings, c.ExposedPorts = "host", nil, nil
		}},
		{name: "no URL, health check of docker's", url: "-", check: 500 * time.Millisecond, often: true},
		{name: "no URL, health check that fails first", url: "-", env: "CHECK=1x3 0", check: 500 * time.Millisecond},
		{name: "no URL, running is enough", url: "-", parameters: `"runningIsEnough": true`, often: true},
		{name: "no URL, running is enough after restarts", url: "-", env: "CRASHES=2|LIFE=300ms", restart: "always", parameters: `"runningIsEnough": true`},
		{name: "unpaused after a second", with: func(e *serviceEnv) func() { e.do("pause"); return after(time.Second, "unpause")(e) }},
		{name: "restarted once by somebody", with: after(time.Second, "restart")},
		{name: "restarted before", with: now("restart", "restart")},
	}
	for _, startup := range []string{"300ms", "1s", "2s", "3s", "4s", "5s"} {
		all = append(all, service{name: "listens after " + startup, env: "STARTUP=" + startup, often: startup == "5s"})
	}
	for _, warm := range []string{"300ms", "1s", "2s", "3s", "4s", "5s"} {
		all = append(all, service{name: "503 for " + warm, env: "WARM=" + warm, often: warm == "3s"})
	}
	return all
}

func TestNoSickServiceIsCalledHealthy(t *testing.T) {
	t.Parallel()
	eachService(t, sickServices(), func(t *testing.T, s service) {
		failure, log := s.judge(t, sickTimeout)
		switch {
		case failure == nil:
			t.Errorf("it is called healthy:\n%s", log)
		case !strings.Contains(failure.Error(), s.want):
			t.Errorf("%s\nwant %q", failure.Error(), s.want)
		}
		if last := log[strings.LastIndex(log, "\n")+1:]; failure != nil && !strings.HasPrefix(last, "[Verdict: sick") && !strings.HasPrefix(last, "[Verdict: not proven") {
			t.Errorf("verify.log ends with %s", last)
		}
	})
}

func TestNoSlowServiceIsCalledSick(t *testing.T) {
	t.Parallel()
	eachService(t, slowServices(), func(t *testing.T, s service) {
		if failure, log := s.judge(t, slowTimeout); failure != nil {
			t.Errorf("%s\n%s", failure.Error(), log)
		}
	})
}

// The count of services is a promise: `make test-change` has at least 50 of each
// kind.
func TestThereAreEnoughServices(t *testing.T) {
	t.Parallel()
	seen := map[string]bool{}
	for _, list := range [][]service{sickServices(), slowServices()} {
		often := 0
		for _, s := range list {
			if seen[s.name] {
				t.Errorf("two services are called %q", s.name)
			}
			seen[s.name] = true
			if s.often {
				often++
			}
		}
		if len(list) < 50 || often < 12 {
			t.Errorf("%d services, %d of them often", len(list), often)
		}
		t.Logf("%d services, %d of them often", len(list), often)
	}
}
