package compose

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/moby/moby/api/types/container"
)

// TestHelperContainerIsLikeTheWorkers checks what a helper has of the container that
// it is to replace: all that it needs to reach files and engine, and nothing that
// others take for the service.
func TestHelperContainerIsLikeTheWorkers(t *testing.T) {
	t.Parallel()
	const worker = `{"Id": "0123456789abcdef", "Config": {"Hostname": "0123456789ab", "User": "1000:998", "Env": ["POSTGRES_PASSWORD=secret"], "Cmd": ["worker"],
			"Entrypoint": ["mm-orchestrator"], "Image": "local", "ExposedPorts": {"9808/tcp": {}}, "StopSignal": "SIGINT", "Tty": true,
			"Labels": {"com.docker.compose.project": "moonmind", "com.docker.compose.service": "orchestrator", "com.docker.compose.config-hash": "h", "own": "label"}},
		"HostConfig": {"Binds": ["/repo:/repo", "/var/run/docker.sock:/var/run/docker.sock"], "Mounts": [{"Type": "volume", "Source": "cache", "Target": "/cache"}],
			"NetworkMode": "moonmind_default", "RestartPolicy": {"Name": "always"}, "PortBindings": {"9808/tcp": [{"HostPort": "9808"}]}, "GroupAdd": ["998"],
			"PidMode": "container:other", "ExtraHosts": ["db:1.2.3.4"], "ReadonlyRootfs": true, "AutoRemove": true, "SecurityOpt": ["label=disable"]},
		"Networks": {"moonmind_default": {"Aliases": ["orchestrator"]}, "back": {}}}`
	var own Inspection
	if err := json.Unmarshal([]byte(worker), &own); err != nil {
		t.Fatal(err)
	}
	task := HelperTask{Name: HelperPrefix + "r-restart-1-1", RunID: "r", Step: "restart", Before: ServiceState{Project: "moonmind", Service: "orchestrator"}}
	options := helperOptions(own, "sha256:now", "/usr/local/bin/mm-orchestrator", task)
	config, host := options.Config, options.HostConfig
	if options.Name != task.Name || config.Image != "sha256:now" || strings.Join(append(config.Entrypoint, config.Cmd...), " ") != "/usr/local/bin/mm-orchestrator restart-service /mm-orchestrator-helper" {
		t.Errorf("%s runs %s, %v %v", options.Name, config.Image, config.Entrypoint, config.Cmd)
	}
	if config.User != "1000:998" || strings.Join(host.Binds, " ") != "/repo:/repo /var/run/docker.sock:/var/run/docker.sock" || len(host.Mounts) != 1 || len(host.GroupAdd) != 1 || len(host.SecurityOpt) != 1 {
		t.Errorf("it does not reach what the worker reaches: %+v %+v", config, host)
	}
	if config.Hostname != "" || config.Env != nil || config.ExposedPorts != nil || host.PortBindings != nil || config.Tty || host.AutoRemove || host.ReadonlyRootfs || host.PidMode != "" || config.StopSignal != "SIGTERM" {
		t.Errorf("it has what is the worker's alone: %+v %+v", config, host)
	}
	if host.RestartPolicy.Name != container.RestartPolicyOnFailure || host.RestartPolicy.MaximumRetryCount != 0 {
		t.Errorf("restart policy %+v", host.RestartPolicy)
	}
	for name, value := range config.Labels {
		if strings.HasPrefix(name, "com.docker.compose.") && value != "" || name == "own" {
			t.Errorf("label %s=%s", name, value)
		}
	}
	if config.Labels[labelHelper] != "r" || config.Labels[labelProject] != "" || len(config.Labels) != 7 {
		t.Errorf("labels %v", config.Labels)
	}
	if host.NetworkMode != "none" || options.NetworkingConfig != nil || host.ExtraHosts != nil {
		t.Errorf("with the socket it needs no network: %+v", host)
	}
	task.Host = "tcp://docker-proxy:2375"
	options = helperOptions(own, "sha256:now", "/usr/local/bin/mm-orchestrator", task)
	if mode := options.HostConfig.NetworkMode; mode != "moonmind_default" || len(options.NetworkingConfig.EndpointsConfig) != 1 || options.NetworkingConfig.EndpointsConfig["moonmind_default"].Aliases != nil {
		t.Errorf("network %s, %+v", mode, options.NetworkingConfig)
	}
	if again := own.config; again.Image != "local" || len(again.Env) != 1 || own.hostConfig.RestartPolicy.Name != "always" {
		t.Error("the worker's own description was changed")
	}
}
