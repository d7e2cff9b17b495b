package chaos

import (
	"net/http"
	"slices"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
	"github.com/moonladderstudios/mm-orchestrator/internal/githubtest"
)

// A serviceFault is a fault of GitHub's API or of the git server. It ends before the
// program has asked as often as it does: the run must succeed.
type serviceFault struct {
	name string
	// request is what githubtest.Fail takes, with REPO for the repository. times is how many
	// requests have the fault.
	request string
	times   int
	fault   githubtest.Fault
	// task makes such a request, near these points.
	task   string
	points []faultpoint.Point
}

// late is how long a late answer takes.
const late = 3 * time.Second

var serviceFaults = func() (all []serviceFault) {
	const page = "<html><body><h1>502 Bad Gateway</h1></body></html>"
	faults := []struct {
		name  string
		times int
		fault githubtest.Fault
		api   bool
	}{
		{"is done, and its answer is lost", 1, githubtest.LoseAnswer(), false},
		{"is cut off", 2, githubtest.Cut(), false},
		{"fails with 500", 2, githubtest.Status(http.StatusInternalServerError, "Server Error"), false},
		{"fails with 502 of a proxy", 2, githubtest.Text(http.StatusBadGateway, page), false},
		{"is answered late", 2, githubtest.Late(late), false},
		{"meets a secondary rate limit (403)", 2, githubtest.SecondaryLimit(http.StatusForbidden, time.Second), true},
		{"meets a secondary rate limit (429)", 2, githubtest.SecondaryLimit(http.StatusTooManyRequests, time.Second), true},
	}
	for _, r := range []struct {
		name, request string
		api           bool
		task          string
		points        []faultpoint.Point
	}{
		{"the request for the repository", "GET /api/v3/repos/REPO mm-orchestrator", true, submit, []faultpoint.Point{faultpoint.StepBegun, faultpoint.SpecWriteBefore, faultpoint.SpecWriteCommitted, faultpoint.CodexCloneBefore}},
		{"the list of pull requests", "GET /api/v3/repos/REPO/pulls?", true, publish, aroundOpening},
		{"opening a pull request", "POST /api/v3/repos/REPO/pulls mm-orchestrator", true, publish, aroundOpening},
		{"the list of branches", "GET /REPO.git/info/refs?service=git-upload-pack mm-orchestrator git", false, submit, []faultpoint.Point{faultpoint.StepBegun, faultpoint.CodexCloneBefore, faultpoint.CodexCloned, faultpoint.CodexStarting}},
		{"a clone", "POST /REPO.git/git-upload-pack", false, submit, []faultpoint.Point{faultpoint.CodexCloneBefore, faultpoint.CodexCloned, faultpoint.CodexStarting}},
		{"the list of branches before a push", "GET /REPO.git/info/refs?service=git-receive-pack mm-orchestrator git", false, publish, aroundPush},
		{"a push", "POST /REPO.git/git-receive-pack", false, publish, aroundPush},
	} {
		for _, f := range faults {
			if !f.api || r.api {
				all = append(all, serviceFault{r.name + " " + f.name, r.request, f.times, f.fault, r.task, r.points})
			}
		}
	}
	return all
}()

var (
	aroundPush = []faultpoint.Point{
		faultpoint.PublishFetched, faultpoint.PublishCommitRecorded, faultpoint.PublishPushing, faultpoint.PublishPushedBranch, faultpoint.PublishPushRecorded,
	}
	aroundOpening = []faultpoint.Point{faultpoint.PublishPushRecorded, faultpoint.PublishOpening, faultpoint.PublishOpened, faultpoint.PublishOpenRecorded}
)

// findService returns the fault with a name.
func findService(name string) (serviceFault, bool) {
	i := slices.IndexFunc(serviceFaults, func(f serviceFault) bool { return f.name == name })
	if i < 0 {
		return serviceFault{}, false
	}
	return serviceFaults[i], true
}
