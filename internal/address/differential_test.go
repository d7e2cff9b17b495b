package address_test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/internal/address"
	"github.com/moonladderstudios/mm-orchestrator/internal/address/addresstest"
	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
)

// reference is a Python process that parses addresses with kombu and SQLAlchemy.
type reference struct {
	mu  sync.Mutex
	in  io.WriteCloser
	out *bufio.Reader
}

type reading struct {
	Brokers  [][]any           `json:"brokers"`
	Database map[string]string `json:"database"`
	Error    string            `json:"error"`
}

func startReference(t testing.TB, celery string) *reference {
	t.Helper()
	cmd := exec.Command(devenv.Celery(t, celery), "testdata/reference.py")
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = in.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("reference.py: %v", err)
		}
	})
	return &reference{in: in, out: bufio.NewReader(out)}
}

func (r *reference) ask(t testing.TB, kind, text string) reading {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	question, err := json.Marshal(map[string]string{"kind": kind, "text": text})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Fprintf(r.in, "%s\n", question); err != nil {
		t.Fatal(err)
	}
	line, err := r.out.ReadBytes('\n')
	if err != nil {
		t.Fatalf("reference.py ended at %q: %v", text, err)
	}
	var answer reading
	if err := json.Unmarshal(line, &answer); err != nil {
		t.Fatal(err)
	}
	return answer
}

// verdict is the result of a comparison: agreement, the class of an intended
// difference, or a fault.
type verdict struct{ class, fault string }

// compareBroker compares our result with kombu's.
func compareBroker(text string, python reading) verdict {
	ours, err := address.ParseBrokers(text)
	switch {
	case python.Error != "" && err != nil:
		return verdict{class: "both refuse"}
	case python.Error != "":
		return verdict{class: "only Python refuses"}
	case err != nil:
		return verdict{class: brokerRefusal(text, err, python), fault: fmt.Sprintf("ours refuses: %v; kombu reads %v", err, python.Brokers)}
	}
	python.Brokers = withoutEmpty(text, python.Brokers)
	if len(ours) != len(python.Brokers) {
		return verdict{fault: fmt.Sprintf("got %d brokers, kombu has %v", len(ours), python.Brokers)}
	}
	for i, b := range ours {
		got := fmt.Sprintf("%q", []any{b.TLS, b.User, b.Password.Reveal(), b.Host, float64(b.Port), b.VHost, b.Heartbeat.Seconds()})
		if want := fmt.Sprintf("%q", python.Brokers[i]); got != want && oddScheme(text) {
			return verdict{class: oddSchemeClass}
		} else if got != want {
			return verdict{fault: "\n got " + got + "\nwant " + want}
		}
	}
	return verdict{class: "same"}
}

// withoutEmpty drops what kombu reads from an empty part between semicolons.
func withoutEmpty(text string, brokers [][]any) [][]any {
	var kept [][]any
	for i, part := range strings.Split(text, ";") {
		if strings.TrimSpace(part) != "" && i < len(brokers) {
			kept = append(kept, brokers[i])
		}
	}
	return kept
}

var (
	amqpScheme = regexp.MustCompile(`(?is)^(py)?amqps?://`)
)

const oddSchemeClass = "invalid scheme, with which kombu reads nothing"

// oddScheme reports whether kombu reads a space, a tab or more as a part of a scheme.
func oddScheme(text string) bool {
	for i, part := range strings.Split(text, ";") {
		if i > 0 {
			part = strings.TrimSpace(part)
		}
		if part != "" && !amqpScheme.MatchString(part) {
			return true
		}
	}
	return false
}

var name = regexp.MustCompile(`^[A-Za-z0-9_.-]+$`)

// brokerRefusal is the class of an address that kombu accepts and this package
// refuses. A connection to none of them is possible.
func brokerRefusal(text string, err error, python reading) string {
	if strings.Contains(err.Error(), "option ") {
		return "option that AMQP does not have, or only Python"
	}
	if oddScheme(text) {
		return oddSchemeClass
	}
	for _, b := range python.Brokers {
		host, _ := b[3].(string)
		if addr, err := netip.ParseAddr(host); (err != nil || addr.Zone() != "") && !name.MatchString(host) {
			return "host that no resolver can resolve"
		}
		for _, i := range []int{1, 2, 5} {
			if part, _ := b[i].(string); len(part) > 255 || strings.Contains(part, "\x00") {
				return "longer than AMQP allows"
			}
		}
	}
	return ""
}

// compareDatabase compares our result with what SQLAlchemy passes to libpq.
func compareDatabase(text string, python reading) verdict {
	d, err := address.ParseDatabase(text)
	switch {
	case python.Error != "" && err != nil:
		return verdict{class: "both refuse"}
	case python.Error != "":
		return verdict{class: "only Python refuses"}
	case err != nil:
		return verdict{class: databaseRefusal(python.Database), fault: fmt.Sprintf("ours refuses: %v; SQLAlchemy reads %v", err, python.Database)}
	}
	got := map[string]string{"user": d.User, "password": d.Password.Reveal(), "host": d.Host, "port": d.Port, "dbname": d.Name}
	maps.Copy(got, d.Options)
	maps.DeleteFunc(got, func(_, value string) bool { return value == "" })
	want := maps.Clone(python.Database)
	maps.DeleteFunc(want, func(_, value string) bool { return value == "" }) // the default, for libpq too
	// libpq parses an option as a number with any prefix, and refuses 0.
	ports := strings.Split(want["port"], ",")
	for i, port := range ports {
		ports[i] = strings.TrimLeft(strings.ReplaceAll(strings.TrimSpace(port), "_", ""), "+0")
	}
	if want["port"] = strings.Join(ports, ","); strings.Trim(want["port"], ",") == "" && got["port"] == "" {
		delete(want, "port")
	}
	switch {
	case maps.Equal(got, want):
		return verdict{class: "same"}
	case strings.ContainsAny(want["host"], "@%"):
		return verdict{class: "host that libpq cannot resolve, where this package extends the password"}
	}
	return verdict{fault: fmt.Sprintf("\n got %q\nwant %q", got, want)}
}

// databaseRefusal is the class of an address that SQLAlchemy and libpq accept and
// this package refuses.
func databaseRefusal(python map[string]string) string {
	for host := range strings.SplitSeq(python["host"], ",") {
		if !regexp.MustCompile(`^(/.*|[\pL\pN._:-]*)$`).MatchString(host) {
			return "host that no resolver can resolve"
		}
	}
	for port := range strings.SplitSeq(python["port"], ",") {
		if strings.HasPrefix(port, "-") || len(port) > 4 && (len(port) > 5 || port > "65535") {
			return "port out of range"
		}
	}
	for option, value := range python {
		if strings.Contains(option+value, "\x00") {
			return "NUL, where libpq stops reading"
		}
		if strings.ContainsAny(option, " \t") {
			return "option whose name contains a space"
		}
		if strings.HasPrefix(value, "(") {
			return "option given twice, for which libpq gets the text of a tuple"
		}
		if _, err := address.CheckOption(option, value); err != nil {
			return "option that is refused"
		}
	}
	return ""
}

// rounds is the number of generated addresses. The fuzz target tries others.
const rounds = 1000

// The reference are the libraries of the oldest and the newest Celery that may share
// a queue with a worker.
func TestAddressesAreParsedAsInPython(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{"broker", "database"} {
		for _, version := range []string{"5.4.0", "5.7.0"} {
			t.Run(kind+" "+version, func(t *testing.T) {
				t.Parallel()
				python := startReference(t, version)
				classes := map[string]int{}
				try := func(text string) {
					v := compare(kind, text, python.ask(t, kind, text))
					classes[v.class]++
					if v.class == "" {
						t.Errorf("%q: %s", text, v.fault)
					}
				}
				for _, text := range fixtures(t, kind) {
					try(text)
				}
				g := addresstest.New(7)
				for i := range rounds {
					text := generate(g, kind)
					if i%4 == 3 {
						text = g.Mutate(text)
					}
					try(text)
				}
				t.Logf("%v", classes)
				if classes["same"] < rounds/4 {
					t.Errorf("only %d of %d addresses could be compared: %v", classes["same"], rounds, classes)
				}
			})
		}
	}
}

func compare(kind, text string, python reading) verdict {
	if kind == "broker" {
		return compareBroker(text, python)
	}
	return compareDatabase(text, python)
}

func generate(g *addresstest.Generator, kind string) string {
	if kind == "broker" {
		return g.Broker().Text
	}
	return g.Database("db+postgresql").Text
}

// fixtures returns addresses from bug reports, and forms that were once parsed
// wrongly.
func fixtures(t testing.TB, kind string) []string {
	t.Helper()
	content, err := os.ReadFile("testdata/" + kind + "_addresses.txt")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for line := range strings.Lines(string(content)) {
		if line = strings.TrimSuffix(line, "\n"); line != "" && !strings.HasPrefix(line, "# ") {
			found = append(found, line)
		}
	}
	return found
}

// FuzzAddressesAsPython is the same comparison with other seeds, and with texts that
// the generator does not make. It needs Python.
func FuzzAddressesAsPython(f *testing.F) {
	for _, kind := range []string{"broker", "database"} {
		for _, text := range fixtures(f, kind) {
			f.Add(kind == "broker", text, uint64(0))
		}
		for seed := range uint64(20) {
			f.Add(kind == "broker", "", seed)
		}
	}
	python := startReference(f, "5.7.0")
	f.Fuzz(func(t *testing.T, broker bool, text string, seed uint64) {
		kind := "database"
		if broker {
			kind = "broker"
		}
		if text == "" {
			g := addresstest.New(seed)
			for range 1 + seed%16 {
				text = generate(g, kind)
			}
		} else if scheme := map[bool]string{true: "amqp://", false: "db+postgresql://"}[broker]; !strings.Contains(text, "://") {
			text = scheme + text
		}
		text = strings.ToValidUTF8(text, "")
		if len(text) > 500 || kind == "broker" && oddScheme(text) {
			return // kombu loads whatever a scheme names
		}
		if v := compare(kind, text, python.ask(t, kind, text)); v.class == "" {
			t.Errorf("%q: %s", text, v.fault)
		}
	})
}
