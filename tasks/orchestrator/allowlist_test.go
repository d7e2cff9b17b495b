package orchestrator

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/policy"
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
	for _, patterns := range [][]string{vectors.Profile, policy.Default().Services["api"].AllowList} {
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

func TestAllowListJudgesLinksByTheirOwnName(t *testing.T) {
	t.Parallel()
	workspace := artifacts.Resolve(t.TempDir())
	if err := os.Mkdir(filepath.Join(workspace, "api_service"), 0o755); err != nil {
		t.Fatal(err)
	}
	for link, target := range map[string]string{"evil": "pyproject.toml", "api_service/Dockerfile": "../secrets.txt", "poetry.lock": "/etc/hostname", "folder": "api_service", "away": "/"} {
		if err := os.Symlink(target, filepath.Join(workspace, link)); err != nil {
			t.Fatal(err)
		}
	}
	list := newAllowlist(workspace, policy.Default().Services["api"].AllowList)
	for path, want := range map[string]bool{
		"evil": false, "api_service/Dockerfile": true, "poetry.lock": true, workspace + "/pyproject.toml": true,
		"folder/pyproject.toml": true, "away/pyproject.toml": false,
	} {
		if got := list.allows(path); got != want {
			t.Errorf("%s: %t, want %t", path, got, want)
		}
	}
}
