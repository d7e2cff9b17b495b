package orchestrator

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
)

func TestAllowListVectors(t *testing.T) {
	t.Parallel()
	data, err := os.ReadFile("testdata/allowlist_vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	var vectors struct {
		Profile []string `json:"profile_patterns"`
		Against []struct {
			Path    string `json:"path"`
			Allowed bool   `json:"allowed"`
		} `json:"against_the_profile"`
		Override []struct {
			Pattern string `json:"pattern"`
			Path    string `json:"path"`
			Allowed bool   `json:"allowed"`
		} `json:"against_a_one_pattern_override"`
	}
	if err := json.Unmarshal(data, &vectors); err != nil {
		t.Fatal(err)
	}
	workspace := artifacts.Resolve(t.TempDir())
	for _, patterns := range [][]string{vectors.Profile, profiles["api"].allowlist} {
		list := newAllowlist(workspace, patterns)
		for _, vector := range vectors.Against {
			if got := list.allows(vector.Path); got != vector.Allowed {
				t.Errorf("%q: %t, want %t", vector.Path, got, vector.Allowed)
			}
		}
	}
	for _, vector := range vectors.Override {
		if got := newAllowlist(workspace, []string{vector.Pattern}).allows(vector.Path); got != vector.Allowed {
			t.Errorf("%q for %q: %t, want %t", vector.Path, vector.Pattern, got, vector.Allowed)
		}
	}
}

func TestAllowListFollowsSymlinks(t *testing.T) {
	t.Parallel()
	workspace := artifacts.Resolve(t.TempDir())
	if err := os.Mkdir(filepath.Join(workspace, "api_service"), 0o755); err != nil {
		t.Fatal(err)
	}
	for link, target := range map[string]string{"evil": "pyproject.toml", "api_service/Dockerfile": "../secrets.txt", "poetry.lock": "/etc/hostname"} {
		if err := os.Symlink(target, filepath.Join(workspace, link)); err != nil {
			t.Fatal(err)
		}
	}
	list := newAllowlist(workspace, profiles["api"].allowlist)
	for path, want := range map[string]bool{"evil": true, "api_service/Dockerfile": false, "poetry.lock": false, workspace + "/pyproject.toml": true} {
		if got := list.allows(path); got != want {
			t.Errorf("%s: %t, want %t", path, got, want)
		}
	}
}

func TestGlobsAreTranslatedAsPythonDoes(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		glob, name string
		want       bool
	}{
		{"[]a]", "]", true}, {"[!]a]", "b", true}, {"[!]a]", "]", false},
		{"[a-]", "-", true}, {"[-a]", "-", true}, {"[z-a]x", "ax", false}, {"[!z-a]x", "ax", true},
		{"[a--]x", "ax", false}, {"[^a]", "^", true}, {"[^a]", "b", false}, {"[\\]", "\\", true},
		{"a\nb*", "a\nb\nc", true}, {"a.b", "axb", false}, {"?", "ü", true}, {"[a-c-e]", "-", true}, {"[a-c-e]", "d", false},
		{"[[]", "[", true}, {"x$", "x\n", false}, {"{a,b}", "a", false},
	} {
		if got := fnmatch(test.glob).MatchString(test.name); got != test.want {
			t.Errorf("%q for %q: %t, want %t", test.name, test.glob, got, test.want)
		}
	}
}

func FuzzGlobsCompile(f *testing.F) {
	f.Add("a[b-c]*[!]x]?[")
	f.Fuzz(func(t *testing.T, glob string) {
		if len(glob) < 200 && fnmatch(glob) == nil {
			t.Errorf("%q does not compile", glob)
		}
	})
}
