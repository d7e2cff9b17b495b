package compose_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
)

// TestImageNamesOfABuild asks the compose program, and expects every name that a build
// of the target gives to an image.
func TestImageNamesOfABuild(t *testing.T) {
	t.Parallel()
	program := devenv.Compose(t)
	for name, c := range map[string]struct{ services, options, env, want string }{
		"none":                  {services: "web: {build: .}", want: "shop-web"},
		"of the file":           {services: "web: {build: ., image: 'a/b:1'}\n  other: {image: c}", want: "a/b:1"},
		"no build":              {services: "web: {image: 'a/b:1', depends_on: [other]}\n  other: {build: .}", want: "a/b:1"},
		"tags":                  {services: "web: {build: {context: ., tags: ['a/b:1', 'a/b:${TAG}']}}", env: "TAG=two", want: "a/b:1 a/b:two shop-web"},
		"tags and name":         {services: "web: {build: {context: ., tags: ['a/b:1']}, image: c}", want: "a/b:1 c"},
		"compatibility, option": {services: "web: {build: {context: ., tags: [a]}}", options: "--compatibility", want: "a shop_web"},
		"compatibility, .env":   {services: "web: {build: .}", env: "COMPOSE_COMPATIBILITY=true", want: "shop_web"},
		"context of a service": {services: "web: {build: {context: ., additional_contexts: {x: 'service:base', y: /}}}\n" +
			"  base: {build: {context: ., tags: [b], additional_contexts: {z: 'service:first'}}, profiles: [never]}\n  first: {build: ., image: f}\n  other: {build: .}",
			options: "--compatibility", want: "b f shop_base shop_web"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			for file, text := range map[string]string{"compose.yaml": "name: shop\nservices:\n  " + c.services + "\n", ".env": c.env + "\n"} {
				if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			target := compose.Target{Prefix: append([]string{program}, strings.Fields(c.options)...), Services: []string{"web"}}
			config, err := compose.ReadConfig(target, func(command []string) (string, error) {
				cmd := exec.CommandContext(t.Context(), command[0], command[1:]...)
				cmd.Dir = dir
				output, err := cmd.Output()
				return string(output), err
			})
			if err != nil {
				t.Fatal(err)
			}
			names := config.Built(func(service string) bool { return service == "web" })
			slices.Sort(names)
			if got := strings.Join(names, " "); got != c.want || config.Name != "shop" {
				t.Errorf("project %s has the names %s, want %s", config.Name, got, c.want)
			}
		})
	}
}

// Compose 2.25.0 prints YAML whatever format it is asked for.
func TestConfigurationInYAML(t *testing.T) {
	t.Parallel()
	config, err := compose.ParseConfig([]byte(`name: shop
services:
  api:
    build:
      context: /srv/shop
      dockerfile: Dockerfile
      additional_contexts:
        base: service:base
      tags:
        - shop/api:2
    environment:
      GREETING: 'a: b # c'
    networks:
      default: null
    ports:
      - mode: ingress
        target: 5432
        protocol: tcp
  base:
    build:
      context: /srv/shop/base
  db:
    image: postgres:latest
networks:
  default:
    name: shop_default
`))
	if err != nil {
		t.Fatal(err)
	}
	want := map[string][]string{"api": {"shop-api", "shop/api:2"}, "base": {"shop-base"}, "db": {"postgres:latest"}}
	if config.Name != "shop" || !reflect.DeepEqual(config.Images, want) || !slices.Equal(config.Contexts["api"], []string{"base"}) {
		t.Errorf("%+v", config)
	}
	for _, text := range []string{"hello", "hello: world", "{", "", "- a"} {
		if config, err := compose.ParseConfig([]byte(text)); err == nil {
			t.Errorf("%q is %+v", text, config)
		}
	}
}

// TestCopiedFilesOfAService asks the compose program, and expects the files that it copies
// into a container, and none that it mounts.
func TestCopiedFilesOfAService(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	const file = `services:
  web:
    image: a
    secrets: [one, {source: one, target: renamed}, {source: one, target: /root/one}, mounted]
    configs: [text, {source: text, target: /etc/text}, {source: variable, target: sub/variable}, mounted]
  other: {image: b}
secrets: {one: {environment: ONE}, mounted: {file: ./compose.yaml}}
configs: {text: {content: text}, variable: {environment: ONE}, mounted: {file: ./compose.yaml}}
`
	for name, text := range map[string]string{"compose.yaml": file, ".env": "ONE=1\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	config, err := compose.ReadConfig(compose.Target{Prefix: []string{devenv.Compose(t)}}, func(command []string) (string, error) {
		cmd := exec.CommandContext(t.Context(), command[0], command[1:]...)
		cmd.Dir = dir
		output, err := cmd.Output()
		return string(output), err
	})
	if err != nil {
		t.Fatal(err)
	}
	const want = "/etc/text /root/one /run/secrets/one /run/secrets/renamed /sub/variable /text"
	if got := strings.Join(config.Copied["web"], " "); got != want || len(config.Copied["other"]) > 0 {
		t.Errorf("copied: %v, want %s", config.Copied, want)
	}
}
