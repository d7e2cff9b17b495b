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
