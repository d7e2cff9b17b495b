package compose

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/moby/moby/api/pkg/stdcopy"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/client"

	"github.com/moonladderstudios/mm-orchestrator/internal/excerpt"
)

// A OneOff is a container that runs one command to its end and is then removed.
type OneOff struct {
	// Image is its image. It is not pulled.
	Image string
	// Command replaces the image's command and entrypoint. Environ are variables.
	Command, Environ []string
	// Volume is mounted read-only at Target. It must exist.
	Volume, Target string
	// Purpose is the value of the label by which containers are found that a killed
	// worker has left. Required.
	Purpose string
}

// A OneOffResult is how a OneOff has ended.
type OneOffResult struct {
	ExitCode int
	// Stdout and Stderr are the last 64 KiB of each.
	Stdout, Stderr string
}

// labelToEnd has the purpose of a OneOff.
const labelToEnd = "mm-orchestrator.one-off"

// oneOffAge is the age from which a container of a OneOff was left by a worker that is
// gone.
const oneOffAge = 10 * time.Minute

// RunOneOff runs a command in a container of its own.
//
//   - Its output is read before the container is removed.
//   - At the end of the context the container is stopped, killed after 5 s, and the result
//     has what it had printed; the error is then the context's cause.
//   - ErrNotFound if there is no such image or volume: neither is made.
func (e *Engine) RunOneOff(ctx context.Context, task OneOff) (result OneOffResult, err error) {
	e.removeOldOneOffs(ctx, task.Purpose)
	inspecting, cancel := context.WithTimeout(ctx, e.timeout)
	defer cancel()
	if _, err := e.client.ImageInspect(inspecting, task.Image); err != nil {
		return result, e.failed("find image "+task.Image, err)
	}
	if _, err := e.client.VolumeInspect(inspecting, task.Volume, client.VolumeInspectOptions{}); err != nil {
		return result, e.failed("find volume "+task.Volume, err)
	}
	created, err := e.client.ContainerCreate(inspecting, client.ContainerCreateOptions{
		Config: &container.Config{
			Image: task.Image, Entrypoint: task.Command, Env: task.Environ, Labels: map[string]string{labelToEnd: task.Purpose},
			Healthcheck: &container.HealthConfig{Test: []string{"NONE"}},
		},
		HostConfig: &container.HostConfig{
			Mounts:    []mount.Mount{{Type: mount.TypeVolume, Source: task.Volume, Target: task.Target, ReadOnly: true}},
			LogConfig: container.LogConfig{Type: "json-file", Config: map[string]string{"max-size": "1m"}},
		},
	})
	if err != nil {
		return result, e.failed("create a container of image "+task.Image, err)
	}
	// From here on the container is removed, also if the context ends.
	ending, cancelEnding := context.WithTimeout(context.WithoutCancel(ctx), time.Hour)
	defer cancelEnding()
	defer func() {
		removing, cancel := context.WithTimeout(ending, e.timeout)
		defer cancel()
		if removeErr := e.removeContainer(removing, created.ID, client.ContainerRemoveOptions{Force: true, RemoveVolumes: true}); removeErr != nil {
			err = errors.Join(err, removeErr)
		}
	}()
	wait := e.client.ContainerWait(ctx, created.ID, client.ContainerWaitOptions{Condition: container.WaitConditionNextExit})
	if err := e.StartContainer(ctx, created.ID); err != nil {
		return result, err
	}
	var waitErr error
	select {
	case ended := <-wait.Result:
		result.ExitCode = int(ended.StatusCode)
		if ended.Error != nil {
			waitErr = fmt.Errorf("container of image %s: %s", task.Image, ended.Error.Message)
		}
	case waitErr = <-wait.Error:
		waitErr = e.failed("wait for a container of image "+task.Image, waitErr)
	}
	if ctx.Err() != nil {
		waitErr = context.Cause(ctx)
		stopping, cancel := context.WithTimeout(ending, 5*time.Second+e.timeout)
		defer cancel()
		grace := 5
		if _, err := e.client.ContainerStop(stopping, created.ID, client.ContainerStopOptions{Timeout: &grace}); err != nil {
			return result, errors.Join(waitErr, e.failed("stop container "+created.ID, err))
		}
	}
	reading, cancelReading := context.WithTimeout(ending, e.timeout)
	defer cancelReading()
	logs, err := e.client.ContainerLogs(reading, created.ID, client.ContainerLogsOptions{ShowStdout: true, ShowStderr: true})
	if err != nil {
		return result, errors.Join(waitErr, e.failed("read log of container "+created.ID, err))
	}
	defer logs.Close()
	stdout, stderr := &excerpt.Tail{Limit: logTailLimit}, &excerpt.Tail{Limit: logTailLimit}
	_, err = stdcopy.StdCopy(stdout, stderr, logs)
	result.Stdout, result.Stderr = stdout.Words(), stderr.Words()
	return result, errors.Join(waitErr, e.failed("read log of container "+created.ID, err))
}

// removeOldOneOffs removes what workers that were killed have left. A failure is no
// reason not to go on: the next call does it again.
func (e *Engine) removeOldOneOffs(ctx context.Context, purpose string) {
	ctx, cancel := context.WithTimeout(ctx, e.timeout)
	defer cancel()
	list, err := e.client.ContainerList(ctx, client.ContainerListOptions{All: true, Filters: client.Filters{}.Add("label", labelToEnd+"="+purpose)})
	if err != nil {
		return
	}
	for _, item := range list.Items {
		if time.Since(time.Unix(item.Created, 0)) > oneOffAge {
			_ = e.removeContainer(ctx, item.ID, client.ContainerRemoveOptions{Force: true, RemoveVolumes: true})
		}
	}
}
