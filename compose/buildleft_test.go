package compose

import (
	"slices"
	"testing"
)

func TestBuildContainersAreFoundInTheOutput(t *testing.T) {
	t.Parallel()
	output := "Step 1/3 : FROM base\n ---> 440cd4c61704\nStep 2/3 : RUN x\n ---> Running in a1f28a68d5f2\nRemoving intermediate container a1f28a68d5f2\n" +
		"text ---> Running in 000000000000\n ---> Running in b1f28a68d5f2\r\n ---> Running in a1f28a68d5f2\n"
	if got := BuildContainers([]byte(output)); !slices.Equal(got, []string{"a1f28a68d5f2", "b1f28a68d5f2"}) {
		t.Errorf("%q", got)
	}
}
