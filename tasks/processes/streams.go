//go:build unix

package processes

import (
	"errors"
	"io"
	"os"
	"os/exec"
	"time"
)

// streams copy the two outputs of a program to their writers. Package exec would
// do that too, but its Wait returns only when the output is closed, and a child
// of the program may keep that open after the program's end.
type streams struct {
	// writeEnds of the pipes are the program's. They are closed here as soon as
	// it has its copies.
	writeEnds []*os.File
	readEnds  []*os.File
	to        []io.Writer
	done      chan error
}

// pipe replaces the command's writers that are not files by pipes.
func pipe(cmd *exec.Cmd) (*streams, error) {
	s := &streams{}
	for _, writer := range []*io.Writer{&cmd.Stdout, &cmd.Stderr} {
		if *writer == nil {
			continue
		}
		if _, isFile := (*writer).(*os.File); isFile {
			continue
		}
		read, write, err := os.Pipe()
		if err != nil {
			for _, file := range s.writeEnds {
				file.Close()
			}
			s.close()
			return nil, err
		}
		s.writeEnds, s.readEnds, s.to = append(s.writeEnds, write), append(s.readEnds, read), append(s.to, *writer)
		*writer = write
	}
	return s, nil
}

// begin starts copying. Call it after the program was started or failed to start.
func (s *streams) begin() {
	for _, file := range s.writeEnds {
		file.Close()
	}
	s.done = make(chan error, len(s.readEnds))
	for i, read := range s.readEnds {
		go func() {
			_, err := io.Copy(s.to[i], read)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				err = nil // a child keeps it open, and end has given up waiting
			}
			s.done <- err
		}()
	}
}

// end waits until the output is complete, for timeout at most: a child may keep
// it open. After that it writes to no writer any more.
func (s *streams) end(timeout time.Duration) error {
	deadline := time.Now().Add(timeout)
	var first error
	for _, read := range s.readEnds {
		// Pipes support deadlines on every system that this is built for.
		_ = read.SetReadDeadline(deadline)
	}
	for range s.readEnds {
		if err := <-s.done; first == nil {
			first = err
		}
	}
	s.close()
	return first
}

func (s *streams) close() {
	for _, read := range s.readEnds {
		read.Close()
	}
}
