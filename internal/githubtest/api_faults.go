package githubtest

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"time"
)

// A Fault answers a request to the REST API, or of git, in place of the server. do is the
// server's own answer.
type Fault func(w http.ResponseWriter, r *http.Request, do http.HandlerFunc)

// scripted is a fault for some requests, of which so many have met it.
type scripted struct {
	text       string
	times, met int
	fault      Fault
}

// Fail answers the next requests with a fault whose method, path and User-Agent contain
// the text, such as "POST /api/v3/repos/octo/widgets/pulls", or "GET
// /octo/widgets.git/info/refs?service=git-receive-pack mm-orchestrator git" for git and not
// the preflight. They must have a valid token. met counts those that have met the fault.
func (s *Server) Fail(text string, times int, fault Fault) (met func() int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := &scripted{text: text, times: times, fault: fault}
	s.api.faults = append(s.api.faults, f)
	return func() int {
		s.mu.Lock()
		defer s.mu.Unlock()
		return f.met
	}
}

func (s *Server) nextFault(r *http.Request) Fault {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range s.api.faults {
		if f.times > 0 && strings.Contains(r.Method+" "+r.URL.RequestURI()+" "+r.UserAgent(), f.text) {
			f.times--
			f.met++
			return f.fault
		}
	}
	return nil
}

// SecondaryLimit is GitHub's secondary rate limit, which some answers explain by their
// message only: retryAfter is then 0.
func SecondaryLimit(status int, retryAfter time.Duration) Fault {
	return func(w http.ResponseWriter, _ *http.Request, _ http.HandlerFunc) {
		if retryAfter > 0 {
			w.Header().Set("Retry-After", strconv.Itoa(int(retryAfter.Seconds())))
		}
		writeError(w, status, "You have exceeded a secondary rate limit. Please wait a few minutes before you try again.")
	}
}

// Status answers with a status and a message, as JSON.
func Status(status int, message string) Fault {
	return func(w http.ResponseWriter, _ *http.Request, _ http.HandlerFunc) { writeError(w, status, message) }
}

func writeError(w http.ResponseWriter, status int, message string) {
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string]string{"message": message, "documentation_url": docs, "status": strconv.Itoa(status)})
}

// Text answers with a status and a page that is no JSON, as a proxy does.
func Text(status int, text string) Fault {
	return func(w http.ResponseWriter, _ *http.Request, _ http.HandlerFunc) {
		w.Header().Set("Content-Type", "text/html")
		w.WriteHeader(status)
		fmt.Fprint(w, text)
	}
}

// Header adds a header to the server's own answer, or to that of another fault.
func Header(name, value string, other Fault) Fault {
	return func(w http.ResponseWriter, r *http.Request, do http.HandlerFunc) {
		w.Header().Set(name, value)
		if other == nil {
			do(w, r)
			return
		}
		other(w, r, do)
	}
}

// RedirectTo redirects to an address.
func RedirectTo(status int, address string) Fault {
	return func(w http.ResponseWriter, _ *http.Request, _ http.HandlerFunc) {
		w.Header().Set("Location", address)
		w.WriteHeader(status)
	}
}

// LoseAnswer does what is asked, and cuts the connection before the answer.
func LoseAnswer() Fault {
	return func(_ http.ResponseWriter, r *http.Request, do http.HandlerFunc) {
		do(httptest.NewRecorder(), r)
		panic(http.ErrAbortHandler)
	}
}

// Cut cuts the connection, and does nothing.
func Cut() Fault {
	return func(http.ResponseWriter, *http.Request, http.HandlerFunc) { panic(http.ErrAbortHandler) }
}

// Late is the server's own answer, after a while.
func Late(pause time.Duration) Fault {
	return func(w http.ResponseWriter, r *http.Request, do http.HandlerFunc) {
		select {
		case <-r.Context().Done():
		case <-time.After(pause):
			do(w, r)
		}
	}
}

// NoAnswer never answers. The client has to end it.
func NoAnswer() Fault {
	return func(_ http.ResponseWriter, r *http.Request, _ http.HandlerFunc) { <-r.Context().Done() }
}

// Slow begins an answer that is valid, and sends one byte of it after another for ever.
func Slow() Fault {
	return func(w http.ResponseWriter, r *http.Request, _ http.HandlerFunc) {
		w.WriteHeader(http.StatusOK)
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-r.Context().Done():
				return
			case <-tick.C:
			}
			if _, err := w.Write([]byte(" ")); err != nil {
				return
			}
			w.(http.Flusher).Flush()
		}
	}
}

// Huge answers with so many bytes of JSON, without saying so before.
func Huge(size int) Fault {
	return func(w http.ResponseWriter, _ *http.Request, _ http.HandlerFunc) {
		w.Header().Set("Content-Type", "application/json; charset=utf-8")
		line := strings.Repeat("[", 1<<16)
		for sent := 0; sent < size; sent += len(line) {
			if _, err := w.Write([]byte(line)); err != nil {
				return
			}
		}
	}
}
