package artifacts_test

import (
	"encoding/base64"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
)

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// The workspace's .env counts like the environment, in each version that it has had.
func TestSecretsOfTheWorkspace(t *testing.T) {
	t.Parallel()
	workspace := t.TempDir()
	env := filepath.Join(workspace, ".env")
	write(t, env, "# comment\nexport APP_SECRET='one-one-1 x'\nDEBUG=nothing-secret\nDB_URL=postgres://mm:two-two-22@db/x # main\nTOKEN=\"three\\\"33\"\nKEY=\"line-one-1111\nline-two-2222\"\nSHORT_KEY=e\nB_KEY=true\n")
	write(t, filepath.Join(workspace, ".env.production"), "APP_TOKEN: four-4444\n")
	write(t, filepath.Join(workspace, ".env.example"), "APP_TOKEN=placeholder\n")
	r := artifacts.NewRedactor(nil, artifacts.Rules{Workspace: workspace})
	const text = "one-one-1 x|nothing-secret|two-two-22|three\"33|#1 0.1 line-one-1111|#1 0.2 line-two-2222|true|e|four-4444|placeholder"
	if got, want := r.String(text), "***|nothing-secret|***|***|#1 0.1 ***|#1 0.2 ***|true|e|***|placeholder"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	// A command of a plan writes a new file while the worker runs.
	write(t, env, "APP_SECRET=five-5555\n")
	r.Refresh()
	if got := r.String("one-one-1 x five-5555"); got != "*** ***" {
		t.Errorf("after a change: %q", got)
	}
	if err := os.Remove(env); err != nil {
		t.Fatal(err)
	}
	r.Refresh()
	if got := r.String("five-5555"); got != "***" {
		t.Errorf("after the removal: %q", got)
	}
}

// A run's artifacts read the files again before each command.
func TestOutputKnowsSecretsThatCommandsWrite(t *testing.T) {
	t.Parallel()
	workspace := t.TempDir()
	run, err := artifacts.Open(filepath.Join(t.TempDir(), "run"), artifacts.NewRedactor(nil, artifacts.Rules{Workspace: workspace}))
	if err != nil {
		t.Fatal(err)
	}
	defer run.Close()
	log, err := run.Log("patch.log")
	if err != nil {
		t.Fatal(err)
	}
	defer log.Discard()
	write(t, filepath.Join(workspace, ".env"), "NEW_TOKEN=brand-new-1\n")
	output := log.Output()
	fmt.Fprintln(output.Stdout, "it is brand-new-1")
	output.Close()
	text, err := os.ReadFile(filepath.Join(run.Dir(), "patch.log"))
	if err != nil || string(text) != "it is ***" {
		t.Errorf("%q, %v", text, err)
	}
	write(t, filepath.Join(workspace, ".env"), "NEW_TOKEN=brand-new-2\n")
	if file, err := run.Write("patch.diff", "+NEW_TOKEN=brand-new-2\n"); err != nil || file.SizeBytes != int64(len("+NEW_TOKEN=***\n")) {
		t.Errorf("%+v, %v", file, err)
	}
}

func TestFilesWithSecrets(t *testing.T) {
	t.Parallel()
	home, extra := t.TempDir(), t.TempDir()
	write(t, filepath.Join(home, ".pgpass"), "db:5432:*:mm:pg\\:pass-1\n")
	write(t, filepath.Join(home, ".netrc"), "machine h login mm password netrc-22\n")
	write(t, filepath.Join(home, ".git-credentials"), "https://mm:gitpass-333@h\n")
	write(t, filepath.Join(home, ".aws/credentials"), "[default]\nregion = eu-central-1\naws_secret_access_key = awskey-4444\n")
	write(t, filepath.Join(home, ".docker/config.json"), `{"auths": {"r.example": {"auth": "`+base64.StdEncoding.EncodeToString([]byte("mm:docker-55555"))+`"}}}`)
	write(t, filepath.Join(home, ".codex/auth.json"), `{"OPENAI_API_KEY": null, "tokens": {"access_token": "codex.11-access", "refresh_token": "codex-12-refresh", "account_id": "mm@example.org"}}`)
	write(t, filepath.Join(extra, "account.json"), `{"type": "service_account", "private_key_id": "id-666666", "client_email": "mm@example.org"}`)
	write(t, filepath.Join(extra, "password"), "filepass-7777777\n")
	write(t, filepath.Join(extra, "list"), "listed-88888888\nANY_NAME=named-9\n")
	r := artifacts.NewRedactor([]string{
		"HOME=" + home, "GOOGLE_APPLICATION_CREDENTIALS=" + filepath.Join(extra, "account.json"), "POSTGRES_PASSWORD_FILE=" + filepath.Join(extra, "password"), "REGISTRY_LOGIN=by-name-10",
	}, artifacts.Rules{Workspace: t.TempDir(), Files: []string{filepath.Join(extra, "list"), filepath.Join(extra, "missing")}, Names: []string{"registry_*"}})
	for _, secret := range []string{"pg:pass-1", "netrc-22", "gitpass-333", "awskey-4444", "docker-55555", "id-666666", "filepass-7777777", "listed-88888888", "named-9", "by-name-10", "codex.11-access", "codex-12-refresh"} {
		if got := r.String("is " + secret + "."); got != "is ***." {
			t.Errorf("%s: %q", secret, got)
		}
	}
	const clean = "eu-central-1 mm@example.org service_account machine login"
	if got := r.String(clean); got != clean {
		t.Errorf("%q became %q", clean, got)
	}
}

// A file that has a secret of several lines, in whatever form, is as secret as one with a
// single line. What stands in such files beside secrets stays readable.
func TestSecretFilesWithSeveralLines(t *testing.T) {
	t.Parallel()
	const (
		first, last = "n1Kq8VtYzR3xWb7JcQfLmP0sDhGuEaTo5ik9XZ2yNvM4rBj6wCpSdFgHqAeUl0Wx", "Zt8RmB1kYq3LwV7c"
		body        = "MIIDdzCCAl+gAwIBAgIEAgAAuTANBgkqhkiG9w0BAQUFADBaMQswCQYDVQQGEwJJ"
	)
	for name, test := range map[string]struct {
		text           string
		secrets, clean []string
	}{
		"base64":                 {first + "\n" + last + "\n", []string{first, last, first + last, first + "\n" + last}, nil},
		"base64 with an end":     {first + "\n" + last[:14] + "==\n", []string{first, last[:14] + "==", first + "\n" + last[:14] + "=="}, nil},
		"base64, a short end":    {first + "\r\nqk==\r\n", []string{first, first + "qk==", first + "\r\nqk=="}, []string{"qk== alone"}},
		"keys, one a line":       {"# old\nkey.One-1111\nkey.Two-2222\n", []string{"key.One-1111", "key.Two-2222"}, []string{"# old"}},
		"a passphrase in two":    {"correct horse battery\nstaple and Geheim99\n", []string{"correct horse battery", "staple and Geheim99"}, nil},
		"a bundle of CAs":        {"GlobalSign Root CA\n==================\n-----BEGIN CERTIFICATE-----\n" + body + "\n-----END CERTIFICATE-----\n", nil, []string{"GlobalSign Root CA", "CERTIFICATE"}},
		"a key and its password": {"Geheim99xyz\n-----BEGIN ENCRYPTED PRIVATE KEY-----\n" + body + "\n-----END ENCRYPTED PRIVATE KEY-----\n", []string{"Geheim99xyz", body}, nil},
		"names of machines":      {"postgres\nrabbitmq\nweb-1.example.org\ndb.example.org:5432\n10.0.0.1:5000\n127.0.0.1/32\nhttp://web:8080/x\n", nil, []string{"postgres", "rabbitmq", "web-1.example.org", "db.example.org:5432", "10.0.0.1:5000", "127.0.0.1", "http://web:8080/x"}},
		"a script":               {"#!/bin/sh\n\n# comment of it\nexec /opt/tool --with Geheim99\n", []string{"exec /opt/tool --with Geheim99"}, []string{"#!/bin/sh", "# comment of it"}},
		"JSON":                   {"{\n  \"registry\": \"registry.example\",\n  \"enabled\": \"always-on\",\n  \"password\": \"Geheim99x\"\n}\n", []string{"Geheim99x"}, []string{"registry.example", "always-on", "registry"}},
		"a list in JSON":         {"[\n  {\"user\": \"deployment\",\n \"token\": \"Geheim99x\"}\n]\n", []string{"Geheim99x"}, []string{"deployment"}},
		"keys in JSON":           {"[\"key-One-1111\", \"key-Two-2222\"]", []string{"key-One-1111", "key-Two-2222"}, nil},
		"XML":                    {"<settings>\n  <servers>\n    <username>deployment</username>\n    <password>Geheim&amp;99x</password>\n  </servers>\n</settings>\n", []string{"Geheim&99x", "Geheim&amp;99x"}, []string{"<settings>", "<servers>", "deployment"}},
		"variables":              {"# of the database\nusername: deployment\npassword: Geheim99x\n", []string{"Geheim99x"}, []string{"deployment", "username", "password", "# of the database"}},
		"variables without any":  {"DB_PASSWORD=\nDB_USERNAME=\n", nil, []string{"DB_PASSWORD=", "DB_USERNAME="}},
		"nothing":                {"\n\n", nil, []string{"text"}},
	} {
		path := filepath.Join(t.TempDir(), "file")
		write(t, path, test.text)
		r := artifacts.NewRedactor([]string{"ENCRYPTION_MASTER_KEY_FILE=" + path}, artifacts.Rules{Workspace: t.TempDir()})
		for _, secret := range test.secrets {
			if got := r.String("is " + secret + "."); got != "is ***." && got != "is ***\n***." {
				t.Errorf("%s: %q became %q", name, secret, got)
			}
		}
		for _, text := range test.clean {
			if got := r.String("is " + text + "."); got != "is "+text+"." {
				t.Errorf("%s: %q became %q", name, text, got)
			}
		}
	}
}

// The workspace belongs to others: whatever its .env is, the redactor neither waits nor
// fails, and reads no more than its limits say.
func TestHostileFiles(t *testing.T) {
	t.Parallel()
	for name, prepare := range map[string]func(path string) error{
		"pipe":      func(path string) error { return syscall.Mkfifo(path, 0o600) },
		"directory": func(path string) error { return os.Mkdir(path, 0o700) },
		"loop":      func(path string) error { return os.Symlink(path, path) },
		"device":    func(path string) error { return os.Symlink("/dev/zero", path) },
		"large":     func(path string) error { return os.WriteFile(path, make([]byte, 2<<20), 0o600) },
		"no text": func(path string) error {
			return os.WriteFile(path, []byte("A_KEY=\xff\xfe\x00\x00\nB_KEY=\"never closed\n\n=\n"), 0o600)
		},
		"many": func(path string) error {
			var text strings.Builder
			for i := range 40000 {
				fmt.Fprintf(&text, "A%d_KEY=value%d\n", i, i)
			}
			return os.WriteFile(path, []byte(text.String()), 0o600)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			workspace := t.TempDir()
			if err := prepare(filepath.Join(workspace, ".env")); err != nil {
				t.Fatal(err)
			}
			r := artifacts.NewRedactor([]string{"MY_TOKEN=mine-mine"}, artifacts.Rules{Workspace: workspace})
			if got := r.String("it is mine-mine"); got != "it is ***" {
				t.Errorf("%q", got)
			}
		})
	}
}

// What a compose file in the workspace names as a secret is one.
func TestSecretsOfComposeFiles(t *testing.T) {
	t.Parallel()
	workspace := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(workspace, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("docker-compose.yaml", "services:\n  api:\n    secrets: [registry]\n    env_file: plain.txt\n\nsecrets:\n  registry:\n    file: ./registry.txt # of the team\n  # signing\n\n  signing: {file: 'signing key.txt', x: y}\n  deploy:\n    environment: DEPLOY_CODE\n  more: {\"environment\": \"IN_ENV\"}\nvolumes:\n  file: plain.txt\n")
	write("registry.txt", "Registry-88-Sesam\n")
	write("signing key.txt", "Signing-77-Sesam")
	write("plain.txt", "nothing secret here")
	write(".env", "IN_ENV=Env-66-Sesam\nOTHER=visible\n")
	r := artifacts.NewRedactor([]string{"DEPLOY_CODE=Deploy-55-Sesam"}, artifacts.Rules{Workspace: workspace})
	text := "Registry-88-Sesam Signing-77-Sesam Deploy-55-Sesam Env-66-Sesam nothing secret here visible"
	if got := r.String(text); got != "*** *** *** *** nothing secret here visible" {
		t.Errorf("%q", got)
	}
	write("compose.override.yml", "secrets:\n  late: {file: late.txt}\n")
	write("late.txt", "Late-44-Sesam")
	r.Refresh()
	if got := r.String("Late-44-Sesam"); got != "***" {
		t.Errorf("of a new file: %q", got)
	}
}
