package orchestrator

import (
	"bufio"
	"encoding/base64"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"
)

// The vectors are what httpx makes of URLs; the script beside them says how they
// were made. A path that begins with two slashes is sent with the whole URL.
func TestURLsAreReadAsHTTPXDoes(t *testing.T) {
	t.Parallel()
	data, err := os.ReadFile("testdata/httpx_vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	var vectors []struct {
		URL, Error, Scheme, Host, Target, Header, Authorization string
		Port                                                    *int
	}
	if err := json.Unmarshal(data, &vectors); err != nil {
		t.Fatal(err)
	}
	sent := 0
	for _, v := range vectors {
		u, err := parseHTTPX(v.URL)
		switch {
		case v.Error != "" && (err == nil || err.Error() != v.Error):
			t.Errorf("%q: %v, want the error %s", v.URL, err, v.Error)
		case v.Error != "":
			continue
		case err != nil:
			t.Errorf("%q: %v", v.URL, err)
			continue
		}
		authorization := ""
		if u.username != "" || u.password != "" {
			authorization = "Basic " + base64.StdEncoding.EncodeToString([]byte(u.username+":"+u.password))
		}
		if u.scheme != v.Scheme || u.host != v.Host || u.target != v.Target || u.netloc() != v.Header || authorization != v.Authorization {
			t.Errorf("%q:\n%+v, %s, %s\nwant %+v", v.URL, u, u.netloc(), authorization, v)
		}
		// What is sent is the target as it is.
		if !strings.HasPrefix(v.URL, "http://host/") {
			continue
		}
		sent++
		for _, proxied := range []bool{false, true} {
			want := v.Target
			if proxied || strings.HasPrefix(want, "//") {
				want = "http://" + v.Header + want
			}
			if got := requestLine(t, u, proxied); got != want {
				t.Errorf("%q, through a proxy %t: sends %q, want %q", v.URL, proxied, got, want)
			}
		}
	}
	if len(vectors) < 500 || sent < 50 {
		t.Errorf("only %d vectors, %d of them sent", len(vectors), sent)
	}
}

// requestLine returns the target that is sent for a URL. A server of package http
// would refuse some of them.
func requestLine(t *testing.T, u httpxURL, proxied bool) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	line := make(chan string, 1)
	go func() {
		conn, err := listener.Accept()
		if err != nil {
			line <- err.Error()
			return
		}
		defer conn.Close()
		in := bufio.NewReader(conn)
		text, _ := in.ReadString('\n')
		line <- text
		for text != "\r\n" && text != "" {
			text, _ = in.ReadString('\n')
		}
		_, _ = io.WriteString(conn, "HTTP/1.1 204 No Content\r\n\r\n")
	}()
	address, environ := "http://"+u.netloc()+u.target, []string{"HTTP_PROXY=http://" + listener.Addr().String()}
	if !proxied {
		address, environ = "http://"+listener.Addr().String()+u.target, nil
	}
	if answer, err := newHealthClient(environ).ask(t.Context(), "GET", address, time.Minute); err != nil || answer.status != http.StatusNoContent {
		t.Errorf("%s: %+v, %v", address, answer, err)
	}
	text := strings.TrimSuffix(strings.TrimPrefix(<-line, "GET "), " HTTP/1.1\r\n")
	return strings.Replace(text, listener.Addr().String(), u.netloc(), 1)
}
