package artifacts_test

import (
	"encoding/base64"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
)

// A credential is read long after the worker's loggers and a program's output were
// opened: all of them mask it from then on.
func TestAnAddedSecretIsMaskedByAllThatExists(t *testing.T) {
	t.Parallel()
	const token = "ghp_16C7e42F292c6912E7710c838347Ae178B4a"
	redactor := artifacts.NewRedactor(nil)
	var written, logged strings.Builder
	output := redactor.Writer(&written)
	log := slog.New(redactor.Handler(slog.NewTextHandler(&logged, nil)))
	fmt.Fprint(output, "before, ")
	log.Info("before")

	redactor.Add(token)
	for _, form := range []string{token, base64.StdEncoding.EncodeToString([]byte(token)), strings.ToUpper(fmt.Sprintf("%x", token))} {
		// In two writes, so that the writer must have kept the beginning.
		fmt.Fprint(output, form[:7])
		fmt.Fprint(output, form[7:]+", ")
		log.Info("message "+form, "key", form)
	}
	if err := output.Close(); err != nil {
		t.Fatal(err)
	}
	if got, want := written.String(), "before, ***, ***, ***, "; got != want {
		t.Errorf("the open writer wrote %q, want %q", got, want)
	}
	for i, line := range strings.Split(strings.TrimSpace(logged.String()), "\n") {
		if i > 0 && strings.Count(line, "***") != 2 {
			t.Errorf("log line %s", line)
		}
	}
}

// A credential that is used again is remembered longer than those that are not, of which
// the oldest are forgotten.
func TestRotatedSecretsStaySecret(t *testing.T) {
	t.Parallel()
	const used = "stays-in-use-0123456789"
	redactor := artifacts.NewRedactor(nil)
	redactor.Add(used)
	for i := range 300 {
		redactor.Add(fmt.Sprintf("token-number-%04d", i))
		if i == 150 {
			redactor.Add(used)
		}
	}
	if got, want := redactor.String("token-number-0000 token-number-0150 token-number-0299 "+used), "token-number-0000 *** *** ***"; got != want {
		t.Errorf("masked: %q, want %q", got, want)
	}
	redactor.Add("", " \n")
	if got := redactor.String("a b"); got != "a b" {
		t.Errorf("an empty secret masks: %q", got)
	}
	var none *artifacts.Redactor
	none.Add("nothing happens")
}

func TestSecretsMayBeAddedWhileOthersAreMasked(t *testing.T) {
	t.Parallel()
	redactor := artifacts.NewRedactor([]string{"TOKEN=from-the-environment"})
	var all sync.WaitGroup
	for i := range 4 {
		all.Go(func() {
			var out strings.Builder
			writer := redactor.Writer(&out)
			for n := range 20 {
				secret := fmt.Sprintf("secret-%d-%d-of-this-test", i, n)
				redactor.Add(secret)
				fmt.Fprintf(writer, "%s from-the-environment\n", secret)
			}
			if err := writer.Close(); err != nil || strings.Contains(out.String(), "e") {
				t.Errorf("%v: %q", err, out.String())
			}
		})
	}
	all.Wait()
}
