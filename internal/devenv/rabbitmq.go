package devenv

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// brokerLimit is the limit on the time from a broker's start to its first
// answer. Usual are 8 s on two cores, most of it for loading plugins.
const brokerLimit = 3 * time.Minute

// findRabbitMQ returns the server script of an installed RabbitMQ, or "". It
// prefers the script that Debian's wrapper in /usr/sbin calls: the wrapper
// requires the account rabbitmq and hides the log.
func findRabbitMQ() string {
	const serverScript = "/usr/lib/rabbitmq/bin/rabbitmq-server"
	if _, err := os.Stat(serverScript); err == nil {
		return serverScript
	}
	path, err := exec.LookPath("rabbitmq-server")
	if err != nil {
		return ""
	}
	return path
}

// broker finds or starts RabbitMQ with its management plugin.
func (b *startup) broker(ctx context.Context) error {
	if b.given(EnvBroker, EnvBrokerAPI) {
		return nil
	}
	if b.given(EnvBroker) {
		return fmt.Errorf("%s is given but %s is not: tests need RabbitMQ's management plugin, by which they make vhosts", EnvBroker, EnvBrokerAPI)
	}
	if err := b.debian.wait(ctx, "rabbitmq-server"); err != nil {
		return err
	}
	if script := findRabbitMQ(); script != "" && !b.Newest {
		return b.brokerProcess(ctx, script)
	}
	return b.brokerContainer(ctx)
}

func (b *startup) brokerProcess(ctx context.Context, script string) error {
	w := b.progress.start("starting", "rabbitmq")
	defer w.failed()
	for attempt := 1; ; attempt++ {
		version, port, retry, err := b.tryBroker(ctx, script, attempt)
		if err == nil {
			w.done(fmt.Sprintf("rabbitmq %s (127.0.0.1:%d)", version, port))
			return nil
		}
		if !retry || attempt == 3 {
			return err
		}
	}
}

// tryBroker starts epmd and the broker. retry means that another process has
// taken one of the ports in the meantime.
func (b *startup) tryBroker(ctx context.Context, script string, attempt int) (version string, port int, retry bool, err error) {
	n, err := newNode(script, filepath.Join(b.dir, fmt.Sprintf("rabbitmq-%d", attempt)), "[rabbitmq_management].\n", "")
	if err != nil {
		return "", 0, false, err
	}
	mapper, err := b.serve(fmt.Sprintf("epmd-%d", attempt), n.mapper(), b.guard.watchThrowaway)
	if err != nil {
		return "", 0, false, err
	}
	err = until(ctx, 10*time.Second, mapper.exited, func(ctx context.Context) error { return dial(ctx, n.epmd) })
	if err != nil {
		return "", 0, mapper.portTaken(), mapper.explain(fmt.Errorf("epmd: %w", err))
	}
	server, err := b.serve(fmt.Sprintf("rabbitmq-%d", attempt), n.server(), b.guard.watchThrowaway)
	if err != nil {
		return "", 0, false, err
	}
	management := &url.URL{Scheme: "http", User: n.url().User, Host: fmt.Sprintf("127.0.0.1:%d", n.management)}
	version, err = b.brokerAnswers(ctx, n.url(), management, server.exited)
	if err != nil {
		return "", 0, server.portTaken(), server.explain(fmt.Errorf("rabbitmq does not answer after its start: %w", err))
	}
	return version, n.amqp, false, nil
}

// node is a node of the installed RabbitMQ: its folder with configuration and
// data, and its ports on 127.0.0.1.
type node struct {
	script, dir, epmdProgram string
	amqp, management, epmd   int
	password                 string // of user mm
	account                  *syscall.Credential
	environment              []string
}

// newNode creates the folder of a node and starts nothing. plugins is the
// content of enabled_plugins; erlang is further arguments of the Erlang virtual
// machine.
func newNode(script, dir, plugins, erlang string) (*node, error) {
	n := &node{script: script, dir: dir, epmdProgram: findEPMD(), password: randomHex()}
	if n.epmdProgram == "" {
		return nil, errors.New("RabbitMQ is installed, but Erlang's epmd is neither on PATH nor under /usr/lib/erlang: install Erlang whole")
	}
	ports, err := FreePorts(4)
	if err != nil {
		return nil, err
	}
	n.amqp, n.management, n.epmd = ports[0], ports[1], ports[3]
	if n.account, err = unprivileged("rabbitmq"); err != nil {
		return nil, err
	}
	if err := ownFolder(dir, n.account); err != nil {
		return nil, err
	}
	files := map[string]string{
		"rabbitmq.conf": fmt.Sprintf(`listeners.tcp.1 = 127.0.0.1:%d
default_user = mm
default_pass = %s
loopback_users = none
log.console = true
disk_free_limit.absolute = 50MB
`, n.amqp, n.password),
		"plugins": plugins,
	}
	if strings.Contains(plugins, "rabbitmq_management") {
		files["rabbitmq.conf"] += fmt.Sprintf("management.tcp.ip = 127.0.0.1\nmanagement.tcp.port = %d\n", n.management)
	}
	for name, content := range files {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			return nil, err
		}
		if n.account != nil {
			if err := os.Chown(path, int(n.account.Uid), int(n.account.Gid)); err != nil {
				return nil, err
			}
		}
	}
	n.environment = []string{
		"PATH=" + filepath.Dir(script) + ":/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin:" + os.Getenv("PATH"),
		"HOME=" + dir, // Erlang keeps its cookie there
		"LANG=C.UTF-8",
		fmt.Sprintf("RABBITMQ_NODENAME=mm%d-%d@localhost", os.Getpid(), n.amqp),
		fmt.Sprintf("ERL_EPMD_PORT=%d", n.epmd),
		"ERL_EPMD_ADDRESS=127.0.0.1",
		fmt.Sprintf("RABBITMQ_DIST_PORT=%d", ports[2]),
		"RABBITMQ_NODE_IP_ADDRESS=127.0.0.1",
		"RABBITMQ_CONFIG_FILE=" + filepath.Join(dir, "rabbitmq"),
		"RABBITMQ_ENABLED_PLUGINS_FILE=" + filepath.Join(dir, "plugins"),
		"RABBITMQ_MNESIA_BASE=" + filepath.Join(dir, "mnesia"),
		"RABBITMQ_LOG_BASE=" + filepath.Join(dir, "log"),
		"RABBITMQ_LOGS=-",
		"RABBITMQ_PID_FILE=" + filepath.Join(dir, "pid"),
		// Without the first argument the distribution port would listen on every
		// address.
		"RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS=" + strings.TrimSpace("-kernel inet_dist_use_interface {127,0,0,1} "+erlang),
	}
	return n, nil
}

// mapper returns the command of the node's epmd. Without one the broker would
// start epmd as a daemon that outlives it. This one runs in the foreground, so
// that it can be ended.
func (n *node) mapper() *exec.Cmd {
	return n.command(n.epmdProgram, "-port", fmt.Sprint(n.epmd), "-address", "127.0.0.1")
}

// server returns the command of the broker. The mapper must be running.
func (n *node) server() *exec.Cmd { return n.command(n.script) }

func (n *node) command(program string, args ...string) *exec.Cmd {
	cmd := exec.Command(program, args...)
	cmd.Env, cmd.Dir = n.environment, n.dir
	runAs(cmd, n.account)
	return cmd
}

func (n *node) url() *url.URL {
	return &url.URL{Scheme: "amqp", User: url.UserPassword("mm", n.password), Host: fmt.Sprintf("127.0.0.1:%d", n.amqp)}
}

// findEPMD returns the path of Erlang's port mapper, or "" if it is not found.
func findEPMD() string {
	if path, err := exec.LookPath("epmd"); err == nil {
		return path
	}
	found, _ := filepath.Glob("/usr/lib/erlang/erts-*/bin/epmd")
	if len(found) == 0 {
		return ""
	}
	return found[0]
}

// brokerAnswers waits for the broker, checks both ports, exports them, and
// returns the broker's major and minor version.
func (b *startup) brokerAnswers(ctx context.Context, broker, management *url.URL, exited <-chan struct{}) (version string, err error) {
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	var overview struct {
		Version string `json:"rabbitmq_version"`
	}
	err = until(ctx, brokerLimit, exited, func(ctx context.Context) error {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, management.String()+"/api/overview", nil)
		if err != nil {
			return err
		}
		response, err := client.Do(request)
		if err != nil {
			return err
		}
		defer response.Body.Close()
		if response.StatusCode != http.StatusOK {
			return fmt.Errorf("management plugin: %s", response.Status)
		}
		if err := json.NewDecoder(response.Body).Decode(&overview); err != nil {
			return fmt.Errorf("management plugin: %w", err)
		}
		return dialHost(ctx, broker.Host)
	})
	if err != nil {
		return "", err
	}
	b.export(EnvBroker, broker.String())
	b.export(EnvBrokerAPI, management.String())
	return overview.Version, nil
}

// brokerContainer runs RabbitMQ from an image.
func (b *startup) brokerContainer(ctx context.Context) error {
	if err := b.waitEngine(ctx); err != nil {
		if b.Newest {
			return fmt.Errorf("the newest RabbitMQ runs in a container: %w", err)
		}
		return fmt.Errorf("RabbitMQ is not installed, and docker cannot run it: %w; %s", err, installHint("rabbitmq-server"))
	}
	find, wanted := b.image, rabbitMQImage
	if b.Newest {
		find, wanted = b.newestImage, newestRabbitMQImage
	}
	image, err := find(ctx, wanted)
	if err != nil {
		return fmt.Errorf("%w; %s", err, installHint("rabbitmq-server"))
	}
	w := b.progress.start("starting", image)
	defer w.failed()
	watch, stopWatch := context.WithCancel(ctx)
	defer stopWatch()
	password := randomHex()
	name, ports, err := b.container(ctx, "rabbitmq", image, map[string]string{
		"RABBITMQ_DEFAULT_USER": "mm", "RABBITMQ_DEFAULT_PASS": password,
	}, 5672, 15672)
	if err != nil {
		return err
	}
	broker := &url.URL{Scheme: "amqp", User: url.UserPassword("mm", password), Host: fmt.Sprintf("127.0.0.1:%d", ports[0])}
	management := &url.URL{Scheme: "http", User: broker.User, Host: fmt.Sprintf("127.0.0.1:%d", ports[1])}
	version, err := b.brokerAnswers(ctx, broker, management, containerExited(watch, name))
	if err != nil {
		return explainContainer(name, fmt.Errorf("rabbitmq does not answer after its start: %w", err))
	}
	b.export(EnvBrokerImage, image)
	w.done(fmt.Sprintf("rabbitmq %s (127.0.0.1:%d, image %s)", version, ports[0], image))
	return nil
}

// installHint says how to get a server that is missing.
func installHint(debianPackage string) string {
	hint := "install it, on Debian as root: apt-get install --no-install-recommends " + debianPackage
	if os.Getuid() != 0 {
		hint += "; or let docker pull its image"
	}
	return hint
}
