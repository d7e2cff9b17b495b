package main

import (
	"errors"
	"fmt"
	"io/fs"
	"syscall"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/worker"
)

func TestExitCodes(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		err  error
		want int
	}{
		{nil, 0},
		{errors.New("whatever"), 1},
		{store.ErrNotFound, 1},
		{&usageError{"x"}, 2},
		{&configError{"x"}, 78},
		{worker.ErrUnreachable, 69},
		{worker.ErrCredentials, 77},
		{worker.ErrVhost, 77},
		{worker.ErrPermission, 77},
		{&worker.MismatchError{}, 78},
		{(&configuration{}).cureBroker(&worker.MismatchError{}), 78},
		{&store.Error{Kind: store.ErrUnavailable}, 69},
		{&store.Error{Kind: store.ErrRefused}, 77},
		{&store.Error{Kind: store.ErrSchema}, 78},
		{compose.ErrUnreachable, 69},
		{fmt.Errorf("%w: %w", compose.ErrUnreachable, syscall.EACCES), 69}, // of the engine's socket
		{&fs.PathError{Op: "open", Path: "/root/run.zip", Err: syscall.EACCES}, 1},
		{errors.Join(worker.ErrUnreachable, worker.ErrCredentials), 77},
	} {
		wrapped := tt.err
		if wrapped != nil {
			wrapped = &curedError{fmt.Errorf("while starting: %w", tt.err), "Do this"}
		}
		if got := exitCode(wrapped); got != tt.want {
			t.Errorf("%v: exit code %d, want %d", tt.err, got, tt.want)
		}
		listed := false
		for _, e := range exitCodes {
			listed = listed || e.code == tt.want
		}
		if !listed {
			t.Errorf("exit code %d is not explained", tt.want)
		}
	}
}
