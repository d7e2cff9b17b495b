package orchestrator

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"net/url"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/address"
)

// bodyLimit bounds how much of an answer's body is read, in bytes. Only the
// status matters.
const bodyLimit = 1 << 20

// A healthClient makes requests as httpx does by default: it follows no
// redirects, verifies TLS, uses the proxies of the environment, sends a user and
// password in the URL as basic authentication, and has one limit for each wait.
type healthClient struct{ proxies proxies }

func newHealthClient(environ []string) healthClient {
	return healthClient{proxies: newProxies(environ)}
}

// An httpAnswer is the answer to a request.
type httpAnswer struct {
	status int
	// from is where the connection leads to, the zero value if that is not known.
	from netip.AddrPort
	// proxy says that this is a proxy.
	proxy bool
}

// ask makes one request. limit bounds connecting, the TLS handshake, and each wait
// for more of the answer, as httpx's timeout does. ctx bounds the whole.
func (c healthClient) ask(ctx context.Context, method, asked string, limit time.Duration) (httpAnswer, error) {
	var answer httpAnswer
	target, err := parseHTTPX(asked)
	if err != nil {
		return answer, err
	}
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(info httptrace.GotConnInfo) {
		if tcp, is := info.Conn.RemoteAddr().(*net.TCPAddr); is {
			answer.from = tcp.AddrPort()
		}
	}})
	proxy := c.proxies.proxyOf(target)
	answer.proxy = proxy != nil
	dialer := net.Dialer{Timeout: limit}
	transport := &http.Transport{
		Proxy: http.ProxyURL(proxy),
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := dialer.DialContext(ctx, network, address)
			if err != nil {
				return nil, err
			}
			return impatientConn{conn, limit}, nil
		},
		TLSHandshakeTimeout: limit,
		DisableCompression:  true, // only the status counts
	}
	defer transport.CloseIdleConnections()
	request := (&http.Request{
		Method: method, URL: target.request(proxy != nil), Host: target.netloc(),
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: http.Header{"Accept": {"*/*"}, "Accept-Encoding": {"gzip, deflate"}, "Connection": {"keep-alive"}, "User-Agent": {"mm-orchestrator"}},
	}).WithContext(ctx)
	if target.username != "" || target.password != "" {
		request.SetBasicAuth(target.username, target.password)
	}
	response, err := transport.RoundTrip(request)
	if err != nil {
		return answer, requestError(err)
	}
	defer response.Body.Close()
	if received, err := io.Copy(io.Discard, io.LimitReader(response.Body, bodyLimit)); err != nil {
		if errors.Is(err, io.ErrUnexpectedEOF) {
			return answer, cutShort(received, response.ContentLength)
		}
		return answer, requestError(err)
	}
	answer.status = response.StatusCode
	return answer, nil
}

// An impatientConn is a connection that limits the wait for each read.
type impatientConn struct {
	net.Conn
	limit time.Duration
}

func (c impatientConn) Read(p []byte) (int, error) {
	if err := c.SetReadDeadline(time.Now().Add(c.limit)); err != nil {
		return 0, err
	}
	return c.Conn.Read(p)
}

// shownURL is the plan's URL of a health check as rows and logs show it: as the Python
// worker does, but without its password. The plan itself is there to be read with its
// query; a URL of the configuration is shown by [healthCheck.shown].
func shownURL(text string) string {
	if !strings.Contains(text, "@") {
		return text
	}
	if u, err := url.Parse(text); err == nil && u.User == nil {
		return text
	}
	return address.MaskURL(text)
}

func unwrapURL(err error) error {
	var wrapped *url.Error
	if errors.As(err, &wrapped) {
		return wrapped.Err
	}
	return err
}

// pythonText is an error with the text that httpx has for it, for verify.log.
type pythonText string

func (t pythonText) Error() string { return string(t) }

// requestError says why there was no answer, for common reasons with the text of
// httpx.
func requestError(err error) error {
	var network net.Error
	var dns *net.DNSError
	var errno syscall.Errno
	var authority x509.UnknownAuthorityError
	switch {
	case errors.As(err, &dns) && dns.IsNotFound:
		return pythonText("[Errno -2] Name or service not known")
	case errors.Is(err, context.DeadlineExceeded), errors.As(err, &network) && network.Timeout(), errors.Is(err, os.ErrDeadlineExceeded):
		return pythonText("timed out")
	case errors.As(err, &errno):
		return pythonErrno(errno)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return pythonText("Server disconnected without sending a response.")
	case errors.As(err, &authority):
		return pythonText("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: " + authority.Error())
	}
	return unwrapURL(err)
}

// cutShort is the error of an answer whose body ends before the length in its head, which
// is negative for a body in chunks.
func cutShort(received, length int64) pythonText {
	how := "incomplete chunked read"
	if length >= 0 {
		how = fmt.Sprintf("received %d bytes, expected %d", received, length)
	}
	return pythonText("peer closed connection without sending complete message body (" + how + ")")
}

// pythonErrno is an OSError as Python prints it: the C library's text starts
// with a capital.
func pythonErrno(errno syscall.Errno) pythonText {
	text := errno.Error()
	return pythonText("[Errno " + strconv.Itoa(int(errno)) + "] " + strings.ToUpper(text[:1]) + text[1:])
}
