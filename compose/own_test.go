package compose

import (
	"slices"
	"strings"
	"testing"
)

func TestOwnCandidates(t *testing.T) {
	t.Parallel()
	own, other := strings.Repeat("a1", 32), strings.Repeat("b2", 32)
	mount := func(id, point string) string {
		return "700 690 8:1 /var/lib/docker/containers/" + id + point[strings.LastIndexByte(point, '/'):] + " " + point + " rw - ext4 /dev/sda1 rw\n"
	}
	for name, test := range map[string]struct {
		mountinfo, cgroup, hostname string
		want                        []string
	}{
		"a container": {mountinfo: mount(own, "/etc/resolv.conf") + mount(own, "/etc/hostname"), hostname: own[:12], want: []string{own, own[:12]}},
		"a container with a host name of its own": {mountinfo: mount(own, "/etc/hosts"), hostname: "worker", want: []string{own}},
		"cgroup version 1":                        {cgroup: "9:pids:/docker/" + own + "\n8:cpu:/docker/" + own + "\n", hostname: "worker", want: []string{own}},
		"cgroup of systemd":                       {cgroup: "1:name=systemd:/system.slice/docker-" + own + ".scope\n", want: []string{own}},
		"only the host name":                      {cgroup: "0::/\n", hostname: own[:12], want: []string{own[:12]}},
		"a host on which containers run": {
			mountinfo: "400 26 0:59 / /var/lib/docker/containers/" + other + "/mounts/shm rw - tmpfs shm rw\n" + mount(other, "/host/etc/hostname"),
			cgroup:    "0::/user.slice/session-1.scope\n", hostname: "devbox"},
		"a host with a short hexadecimal name": {hostname: "cafe"},
	} {
		if got := OwnCandidates(test.mountinfo, test.cgroup, test.hostname); !slices.Equal(got, test.want) {
			t.Errorf("%s: %v, want %v", name, got, test.want)
		}
	}
}

func TestStoppedBy(t *testing.T) {
	t.Parallel()
	own := OwnContainer{ID: strings.Repeat("c3", 32), Name: "moonmind-orchestrator-1", Project: "moonmind", Service: "orchestrator"}
	const plain = `{"name": "moonmind", "services": {
		"orchestrator": {"depends_on": {"rabbitmq": {"condition": "service_healthy", "required": true}}},
		"rabbitmq": {}, "web": {}, "ui": {"depends_on": {"web": {}}}, "admin": {"depends_on": {"ui": {}, "orchestrator": {}}}}}`
	const bound = `{"name": "moonmind", "services": {
		"orchestrator": {"depends_on": {"rabbitmq": {"restart": true}}, "network_mode": "service:vpn", "volumes_from": ["data:ro"]},
		"rabbitmq": {}, "vpn": {}, "data": {}, "web": {"depends_on": {"vpn": {}}}}}`
	const self, all, dependent, together = "is the one that this worker runs in", "covers all services", "has no --no-deps", "together with"
	for _, test := range []struct{ model, command, want string }{
		{plain, "docker compose --project-name moonmind up -d --no-deps orchestrator", self},
		{plain, "docker compose up -d --no-deps --timeout 30 orchestrator", self},
		{plain, "docker compose up --no-deps orchestrator -d", self},
		{plain, "docker-compose -p moonmind up -d web orchestrator", self},
		{plain, "docker compose restart orchestrator", self},
		{plain, "docker compose scale orchestrator=2", self},
		{plain, "docker compose up -d", all},
		{plain, "docker compose down", all},
		{plain, "docker compose up -d --timeout 5", all},
		{plain, "docker compose up -d admin", dependent},
		{plain, "docker compose up -d --no-deps admin", ""},
		{plain, "docker compose up -d ui", ""},
		{plain, "docker compose up -d --no-deps rabbitmq", ""},
		{plain, "docker compose up -d --scale orchestrator web", ""},
		{plain, "docker compose build orchestrator", ""},
		{plain, "docker compose stop web", ""},
		{strings.Replace(plain, `"moonmind"`, `"elsewhere"`, 1), "docker compose up -d orchestrator", ""},
		{bound, "docker compose up -d --no-deps rabbitmq", together + " rabbitmq"},
		{bound, "docker compose up -d --no-deps vpn", together + " vpn"},
		{bound, "docker compose up -d web", together + " vpn"},
		{bound, "docker compose up -d --no-deps web", ""},
		{bound, "docker compose up -d --no-deps data", together + " data"},
		{bound, "docker compose stop vpn", ""},
		{plain, "docker restart moonmind-orchestrator-1", self},
		{plain, "docker container stop -t 5 c3c3c3c3c3c3", self},
		{plain, "docker restart moonmind-web-1", ""},
		{plain, "docker ps", ""},
		{plain, "git status --short", ""},
	} {
		model, err := ParseModel([]byte(test.model))
		if err != nil {
			t.Fatal(err)
		}
		got := own.StoppedBy(strings.Fields(test.command), model)
		if (test.want == "") != (got == "") || !strings.Contains(got, test.want) {
			t.Errorf("%s: %q, want %q", test.command, got, test.want)
		}
	}
}
