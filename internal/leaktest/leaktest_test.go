package leaktest_test

import (
	"math/rand/v2"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/internal/leaktest"
)

// A search that overlooks a spelling would make the tests that use it worthless.
func TestEverySpellingIsFound(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(3, 5))
	for name, secret := range leaktest.Secrets() {
		search := leaktest.NewSearch(map[string]string{name: secret})
		for _, form := range leaktest.Spell(secret, random) {
			for _, text := range []string{form.Text, "a log line\nwith " + form.Text + "\nand more", `{"message": "` + form.Text + `"}`} {
				if found, _ := search.Find(text); found != name {
					t.Errorf("%s, %s: not found in %.300q", name, form.How, text)
				}
			}
		}
	}
	search := leaktest.NewSearch(leaktest.Secrets())
	for _, text := range []string{"", "\n", `\`, `\u12`, "%", "%4", "\\\n", "a line\n\\\\", "0", "-----BEGIN RSA PRIVATE KEY-----"} {
		if name, piece := search.Find(text); name != "" {
			t.Errorf("%q has %q of %s", text, piece, name)
		}
	}
}
