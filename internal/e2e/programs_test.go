package e2e

import (
	"bufio"
	"encoding/base64"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// programs are the programs that plans run in place of docker when a test must
// count a command's executions, delay its end, or control its output.
var programs = map[string]func(args []string) int{
	"record": recordCommand,
	"flood":  flood,
	"leak":   leak,
}

// record FILE NAME [GATE] appends the line NAME to FILE in one write, and then
// waits until the file GATE exists. A repeated execution adds a second line.
func recordCommand(args []string) int {
	file, err := os.OpenFile(args[0], os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err == nil {
		_, err = file.WriteString(args[1] + "\n")
		file.Close()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if len(args) > 2 {
		for {
			if _, err := os.Stat(args[2]); err == nil {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	fmt.Println(args[1], "done")
	return 0
}

// flood BYTES CODE [NAME…] prints at least BYTES bytes, half to each output, and
// exits with CODE. The lines contain the values of the named environment
// variables, each as it is, in base64 and form-encoded, at varying offsets.
func flood(args []string) int {
	size, _ := strconv.Atoi(args[0])
	code, _ := strconv.Atoi(args[1])
	var texts []string
	for _, name := range args[2:] {
		value := os.Getenv(name)
		texts = append(texts, value, base64.StdEncoding.EncodeToString([]byte(value)), url.QueryEscape(value))
	}
	const filler = "Step 3/7 : downloading and compiling a package with a rather long name; "
	for _, out := range []*os.File{os.Stdout, os.Stderr} {
		w := bufio.NewWriterSize(out, 4099) // prime, so that writes end at varying places in the texts
		for written, n := 0, 0; written < size/2; n++ {
			line := filler[:n%len(filler)] + strings.Join(texts, " ") + filler + filler + "\n"
			if _, err := w.WriteString(line); err != nil {
				return 1
			}
			written += len(line)
		}
		if w.Flush() != nil {
			return 1
		}
	}
	return code
}

// leak FILE CODE [WORD…] prints FILE to each output, and exits with CODE. It writes the
// first bytes one by one, and the two outputs in turn.
func leak(args []string) int {
	text, err := os.ReadFile(args[0])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	code, _ := strconv.Atoi(args[1])
	rest := [][]byte{text, text}
	for i := 0; len(rest[0])+len(rest[1]) > 0; i++ {
		for which, out := range []*os.File{os.Stdout, os.Stderr} {
			n := 1
			if i > 3000 {
				n = 4099
			}
			n = min(n, len(rest[which]))
			if _, err := out.Write(rest[which][:n]); err != nil {
				return 2
			}
			rest[which] = rest[which][n:]
		}
	}
	fmt.Fprintln(os.Stderr, "\nleak was called with", args[2:])
	return code
}

// linkPrograms creates a folder for PATH, in which the programs' names are links
// to this test binary.
func linkPrograms(t *testing.T) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	folder := t.TempDir()
	for name := range programs {
		if err := os.Symlink(self, filepath.Join(folder, name)); err != nil {
			t.Fatal(err)
		}
	}
	return folder
}
