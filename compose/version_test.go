package compose_test

import (
	"strings"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/compose"
)

func TestFaultsOfVersions(t *testing.T) {
	t.Parallel()
	for version, want := range map[string]struct {
		unusable bool
		part     string // "" for no fault
	}{
		"1.29.2":            {true, "--wait"},
		"v1.29.2":           {true, "--wait"},
		"2.20.2+ds1-0":      {false, "2.26"},
		"2.26.0":            {false, ""},
		"2.26.1-4":          {false, ""},
		"2.40.2":            {false, ""},
		"2.40.3":            {false, "--wait-timeout"},
		"v2.40.3-desktop.1": {false, "--wait-timeout"},
		"2.40.30":           {false, ""},
		"5.6.0":             {false, ""},
		"dev":               {false, ""},
		"":                  {false, ""},
	} {
		fault := compose.FaultOf(version)
		if fault.Unusable != want.unusable || (fault.Text == "") != (want.part == "") || !strings.Contains(fault.Text, want.part) {
			t.Errorf("%q: %+v", version, fault)
		}
	}
}
