//go:build unix

package processes

import (
	"errors"
	"io"
	"os"
	"os/exec"
	"time"
)

// streams are the two outputs of a program on their way to their writers. They
// are piped here rather than by package exec, whose Wait tells of the end of
// a program only when its output is closed: a child of it may hold that open.
type streams struct {
	// theirs are the program's ends, which are closed once it has them.
	theirs []*os.File
	ours   []*os.File
	to     []io.Writer
	done   chan error
}

// pipe gives the program pipes in place of writers that are not files.
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
			for _, file := range s.theirs {
				file.Close()
			}
			s.close()
			return nil, err
		}
		s.theirs, s.ours, s.to = append(s.theirs, write), append(s.ours, read), append(s.to, *writer)
		*writer = write
	}
	return s, nil
}

// begin takes in the output, once the program was started or could not be.
func (s *streams) begin() {
	for _, file := range s.theirs {
		file.Close()
	}
	s.done = make(chan error, len(s.ours))
	for i, read := range s.ours {
		go func() {
			_, err := io.Copy(s.to[i], read)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				err = nil // held open by a child, and given up
			}
			s.done <- err
		}()
	}
}

// end waits until the output is complete, or for so long if somebody still
// holds it open. After that no writer is written to.
func (s *streams) end(patience time.Duration) error {
	deadline := time.Now().Add(patience)
	var first error
	for _, read := range s.ours {
		// Pipes have deadlines on every system that this is built for.
		_ = read.SetReadDeadline(deadline)
	}
	for range s.ours {
		if err := <-s.done; first == nil {
			first = err
		}
	}
	s.close()
	return first
}

func (s *streams) close() {
	for _, read := range s.ours {
		read.Close()
	}
}
