package preflight

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/compose"
)

// loginPurpose labels the containers of checkLogin.
const loginPurpose = "codex-login-check"

// volumeName is what docker allows as the name of a volume.
var volumeName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]*$`)

// summaryLimit is the length of a summary of the output, in characters.
const summaryLimit = 512

// checkLogin runs `codex login status` in a container with a volume, as MoonMind does,
// and with its texts. Other than there, the output is read before the container is
// removed, and neither an image nor a volume is made for it.
func (c *Checker) checkLogin(ctx context.Context, volume string) Login {
	login := Login{Status: LoginFailed}
	unable := func(reason any) Login {
		login.Message = fmt.Sprintf("Unable to execute Codex login status for volume '%s': %v", volume, reason)
		return login
	}
	switch {
	case !volumeName.MatchString(volume):
		return unable("it is no name of a docker volume")
	case c.config.Containers == nil:
		return unable("the worker has no docker engine: set " + c.config.SettingName("DOCKER_HOST") + " to one, or unset " + c.config.SettingName("CODEX_VOLUME_NAME"))
	}
	limited, cancel := context.WithTimeout(ctx, c.config.LoginTimeout)
	defer cancel()
	result, err := c.config.Containers.RunOneOff(limited, compose.OneOff{
		Image: c.config.Image, Command: []string{"bash", "-lc", "codex login status"}, Environ: []string{"HOME=/home/app"},
		Volume: volume, Target: "/home/app/.codex", Purpose: loginPurpose,
	})
	login.Output = c.config.Redact(strings.TrimSpace(first(result.Stderr, result.Stdout)))
	summary := oneLine(login.Output, summaryLimit)
	switch {
	case errors.Is(err, context.DeadlineExceeded) && limited.Err() != nil:
		login.Message = fmt.Sprintf("Codex login status check timed out after %d seconds for volume '%s'.", int(c.config.LoginTimeout.Seconds()), volume)
		if summary != "" {
			login.Message += " Details: " + summary
		}
		return login
	case errors.Is(err, compose.ErrNotFound):
		return unable(fmt.Sprintf("%v. Make the volume with `codex login` in it, and pull the image, on the worker's docker engine", err))
	case err != nil:
		return unable(err)
	}
	login.ExitCode = &result.ExitCode
	if result.ExitCode != 0 {
		login.Message = fmt.Sprintf("Codex login status failed for volume '%s'. Re-authenticate this shard using `codex login` and retry.", volume)
		if summary != "" {
			login.Message += " Details: " + summary
		}
		return login
	}
	login.Status, login.Message = LoginPassed, "Codex login status check passed."
	if summary != "" {
		login.Message = summary
	}
	return login
}
