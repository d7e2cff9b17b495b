package orchestrator

import (
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

func TestProxiesAreChosenAsHTTPXDoes(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		environ string
		want    map[string]string
	}{
		{"HTTP_PROXY=http://p:1", map[string]string{"http://a/": "http://p:1", "https://a/": "", "http://localhost/": "http://p:1", "http://127.0.0.1/": "http://p:1"}},
		{"HTTP_PROXY=http://upper:1 http_proxy=http://lower:1", map[string]string{"http://a/": "http://lower:1"}},
		{"HTTP_PROXY=http://upper:1 http_proxy=", map[string]string{"http://a/": ""}},
		{"https_proxy=p:1 ALL_PROXY=http://all:1", map[string]string{"http://a/": "http://all:1", "https://a/": "http://p:1"}},
		{"ALL_PROXY=http://all:1 NO_PROXY=*", map[string]string{"http://a/": ""}},
		{"ALL_PROXY=http://all:1 NO_PROXY=example.test,localhost,10.0.0.1,.dot.test,https://only.test,port.test:8080,[::1]", map[string]string{
			"http://example.test/":     "",
			"http://sub.example.test/": "",
			"http://notexample.test/":  "http://all:1",
			"http://localhost/":        "",
			"http://sub.localhost/":    "http://all:1",
			"http://10.0.0.1:99/":      "",
			"http://10.0.0.2/":         "http://all:1",
			"http://dot.test/":         "http://all:1",
			"http://a.dot.test/":       "",
			"http://only.test/":        "http://all:1",
			"https://only.test/":       "",
			"http://port.test/":        "http://all:1",
			"http://port.test:8080/":   "",
			"http://[::1]/":            "",
		}},
	} {
		p := newProxies(strings.Fields(test.environ))
		for target, want := range test.want {
			parsed, err := parseHTTPX(target)
			if err != nil {
				t.Fatal(err)
			}
			got := ""
			if proxy := p.proxyOf(parsed); proxy != nil {
				got = proxy.String()
			}
			if got != want {
				t.Errorf("%s: %s through %q, want %q", test.environ, target, got, want)
			}
		}
	}
}

func TestHealthChecksGoThroughTheProxyAndFollowNoRedirect(t *testing.T) {
	t.Parallel()
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, password, _ := parseProxyAuth(r); user != "u" || password != "p" || r.URL.Host != "api:5000" {
			t.Errorf("the proxy got %s with %v", r.URL, r.Header)
		}
		http.Redirect(w, r, "http://elsewhere/", http.StatusFound)
	}))
	defer proxy.Close()
	client := newHealthClient([]string{"HTTP_PROXY=" + strings.Replace(proxy.URL, "http://", "http://u:p@", 1)})
	answer, err := client.ask(t.Context(), "GET", "http://api:5000/health", time.Minute)
	if answer.status != http.StatusFound || !answer.proxy || err != nil {
		t.Errorf("%+v, %v", answer, err)
	}
}

func parseProxyAuth(r *http.Request) (user, password string, ok bool) {
	r = &http.Request{Header: http.Header{"Authorization": r.Header["Proxy-Authorization"]}}
	return r.BasicAuth()
}

func TestErrorsOfRequestsReadAsPythons(t *testing.T) {
	t.Parallel()
	slow := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
	defer slow.Close()
	closed := httptest.NewServer(nil)
	closed.Close()
	secure := httptest.NewUnstartedServer(http.NotFoundHandler())
	secure.Config.ErrorLog = log.New(io.Discard, "", 0)
	secure.StartTLS()
	defer secure.Close()
	for address, want := range map[string]string{
		slow.URL:                       "timed out",
		closed.URL:                     "[Errno 111] Connection refused",
		"http://no-such-host.invalid/": "[Errno -2] Name or service not known",
		"None":                         "Request URL is missing an 'http://' or 'https://' protocol.",
		"ftp://x/":                     "Request URL has an unsupported protocol 'ftp://'.",
		secure.URL:                     "[SSL: CERTIFICATE_VERIFY_FAILED]",
		"http://[::1":                  "Invalid port: ':1'",
	} {
		limit := time.Minute // more than a busy machine needs
		if address == slow.URL {
			limit = 300 * time.Millisecond
		}
		_, err := newHealthClient(nil).ask(t.Context(), "GET", address, limit)
		if !strings.HasPrefix(fmt.Sprint(err), want) {
			t.Errorf("%s: %v, want %s", address, err, want)
		}
	}
}
