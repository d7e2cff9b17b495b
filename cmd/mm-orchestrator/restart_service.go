package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/pflag"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/compose"
)

var restartServiceCommand = &command{
	name:     compose.HelperCommand,
	args:     "FOLDER",
	words:    1,
	internal: true,
	summary:  "internal: replace the worker's own container",
	about: "Internal. A worker whose run restarts the worker's own service starts this command in a container of its own, mm-orchestrator-helper-…, because the worker ends in the middle of that. " +
		"It runs the step's compose command, waits until a worker has taken the step over, and puts the old container back if none does. It takes its task from FOLDER, and keeps there what it has done: " +
		"after a kill it continues. To end a helper for good, remove its container and that of its standby: docker rm --force.",
	setup: func(fs *pflag.FlagSet) runFunc {
		standby := fs.Bool("standby", false, "Do nothing but start the helper again if it is killed.")
		return func(ctx context.Context, p *program, in input) error {
			if len(in.words) == 0 {
				return &usageError{fmt.Sprintf("%s needs the folder of a task. Only workers start this command, see --help", compose.HelperCommand)}
			}
			ctx, release := signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT)
			defer release()
			if *standby {
				return compose.RunStandby(ctx, in.words[0], p.stdout)
			}
			return compose.RunHelper(ctx, in.words[0], p.stdout, func(environ []string) func(string) string {
				return artifacts.NewRedactor(withoutSources(environ), environmentRules(environ)).String
			})
		}
	},
}

// ownContainers returns the ids of containers that this process may be running in.
func ownContainers() []string {
	// What cannot be read, as on other systems than Linux, names none.
	mountinfo, _ := os.ReadFile("/proc/self/mountinfo")
	cgroup, _ := os.ReadFile("/proc/self/cgroup")
	hostname, _ := os.Hostname()
	return compose.OwnCandidates(string(mountinfo), string(cgroup), hostname)
}

// ownProgram returns the path of this program, "" if it is not known. Then no
// helper can be started.
func ownProgram() string {
	path, _ := os.Executable()
	return path
}
