package secret_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
)

func TestNothingPrintsASecret(t *testing.T) {
	t.Parallel()
	type holder struct {
		Password secret.String
		Pointer  *secret.String
	}
	s := secret.New("hunter2")
	h := holder{Password: s, Pointer: &s}
	var out bytes.Buffer
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%T"} {
		fmt.Fprintf(&out, verb+" "+verb+" "+verb+"\n", s, h, &h)
	}
	fmt.Fprintln(&out, s, h, &s, fmt.Errorf("bad password %v", s))
	if err := json.NewEncoder(&out).Encode(h); err != nil {
		t.Fatal(err)
	}
	if err := json.NewEncoder(&out).Encode(map[secret.String]int{s: 1}); err != nil {
		t.Fatal(err)
	}
	slog.New(slog.NewTextHandler(&out, nil)).Info("text", "secret", s, "holder", h)
	slog.New(slog.NewJSONHandler(&out, nil)).Info("json", "secret", s, "holder", h)

	hex := fmt.Sprintf("%x", "hunter2")
	for _, form := range []string{"hunter2", hex, strings.ToUpper(hex)} {
		if strings.Contains(out.String(), form) {
			t.Errorf("the secret was printed as %s in:\n%s", form, out.String())
		}
	}
	if s.Reveal() != "hunter2" {
		t.Errorf("Reveal() = %q", s.Reveal())
	}
	if got := secret.New("").String(); got != "" {
		t.Errorf("the empty secret prints as %q", got)
	}
}

func TestRedactURL(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ in, want string }{
		{"amqp://guest:guest@rabbitmq:5672//", "amqp://guest:***@rabbitmq:5672//"},
		{"amqp://rabbitmq/moonmind", "amqp://rabbitmq/moonmind"},
		{"amqp://user@rabbitmq//", "amqp://user@rabbitmq//"},
		{"amqp://user:p%40ss:w@rd@rabbitmq//", "amqp://user:***@rabbitmq//"},
		{"amqp://a:one@x//;amqp://b:two@y//", "amqp://a:***@x//;amqp://b:***@y//"},
		{"db+postgresql://:pw@db/moonmind?sslmode=require", "db+postgresql://:***@db/moonmind?sslmode=require"},
		{"postgres:///moonmind?host=/run&password=pw&user=u", "postgres:///moonmind?host=/run&password=***&user=u"},
		{"http://api:5000/health?at=a@b:c@d", "http://api:5000/health?at=a@b:c@d"},
		{"amqp://user:p/w?#@rabbitmq//", "amqp://user:***@rabbitmq//"},
		{"api=http://api:5000/h,web=http://u:p@web/", "api=http://api:5000/h,web=http://u:***@web/"},
		{"broker amqp://u:p@h// is away, mail a@b", "broker amqp://u:***@h// is away, mail a@b"},
		{"", ""},
	} {
		if got := secret.RedactURL(tt.in); got != tt.want {
			t.Errorf("RedactURL(%q) = %q, want %q", tt.in, got, tt.want)
		}
	}
}
