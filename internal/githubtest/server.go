package githubtest

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/cgi"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// A Server answers for GitHub. [Start] makes one, [New] one for a test. Its methods may
// be called by several goroutines.
type Server struct {
	// URL is the address without a path: repositories are at URL/owner/name.git, the API
	// at URL/api/v3.
	URL string
	// CAFile has the certificate that clients must trust.
	CAFile string

	dir     string
	backend string // the program git-http-backend
	http    *http.Server
	done    chan struct{}

	mu           sync.Mutex
	tokens       map[string]*Token
	repositories map[string]*repository
	requests     []Request
	intercept    func(http.ResponseWriter, *http.Request) bool
	api          apiState
}

// A Token is what an account uses in place of a password.
type Token struct {
	// Login is the account's name.
	Login string
	// Scopes are those of a classic token; nil means a fine-grained one.
	Scopes []string
	// ReadOnly tokens may fetch and look, and not push and open pull requests.
	ReadOnly bool
	// NoPullRequests is a fine-grained token without the permission to open them.
	NoPullRequests bool
	// Repositories are those that the token sees, as owner/name; nil means all.
	Repositories []string
	// Expires is when it ends, zero for never.
	Expires time.Time
}

// A Request is one that the server has got.
type Request struct {
	Method, Path string
	// Body is the whole body of a request to the API, nil for git.
	Body []byte
	// Status is that of the answer.
	Status int
	Header http.Header
}

// New starts a server that is closed at the end of the test.
func New(t testing.TB) *Server {
	t.Helper()
	s, err := Start(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// Start starts a server that keeps its files in dir.
func Start(dir string) (*Server, error) {
	execPath, err := exec.Command("git", "--exec-path").Output()
	if err != nil {
		return nil, fmt.Errorf("find git-http-backend: %w", err)
	}
	s := &Server{
		dir: dir, backend: filepath.Join(strings.TrimSpace(string(execPath)), "git-http-backend"),
		done: make(chan struct{}), tokens: map[string]*Token{}, repositories: map[string]*repository{},
	}
	certificate, err := s.certificate()
	if err != nil {
		return nil, err
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	s.URL = "https://" + listener.Addr().String()
	s.http = &http.Server{
		Handler: http.HandlerFunc(s.serve), TLSConfig: &tls.Config{Certificates: []tls.Certificate{certificate}},
		ReadHeaderTimeout: time.Minute,
	}
	s.http.ErrorLog = log.New(io.Discard, "", 0) // tests also connect without trusting it
	go func() {
		defer close(s.done)
		_ = s.http.ServeTLS(listener, "", "")
	}()
	return s, nil
}

// Close ends the server and its connections.
func (s *Server) Close() error {
	err := s.http.Close()
	<-s.done
	return err
}

// certificate makes one for 127.0.0.1, and writes it to CAFile.
func (s *Server) certificate() (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "githubtest"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(48 * time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, BasicConstraintsValid: true, IsCA: true,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return tls.Certificate{}, err
	}
	s.CAFile = filepath.Join(s.dir, "ca.pem")
	if err := os.WriteFile(s.CAFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		return tls.Certificate{}, err
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}

// Client returns a client that trusts the server. The caller closes its idle
// connections.
func (s *Server) Client() (*http.Client, error) {
	text, err := os.ReadFile(s.CAFile)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(text) {
		return nil, errors.New("the server's certificate cannot be read")
	}
	return &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}}, nil
}

// SetToken makes a token valid, or changes what it may do.
func (s *Server) SetToken(token string, is Token) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tokens[token] = &is
}

// RevokeToken makes a token invalid.
func (s *Server) RevokeToken(token string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.tokens, token)
}

// Intercept calls f before each request. If f returns true, it has answered.
func (s *Server) Intercept(f func(http.ResponseWriter, *http.Request) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.intercept = f
}

// FailRequests answers the next n requests whose path contains the text with 502.
func (s *Server) FailRequests(text string, n int) {
	var mu sync.Mutex
	s.Intercept(func(w http.ResponseWriter, r *http.Request) bool {
		mu.Lock()
		defer mu.Unlock()
		if n == 0 || !strings.Contains(r.URL.RequestURI(), text) {
			return false
		}
		n--
		http.Error(w, "Bad Gateway", http.StatusBadGateway)
		return true
	})
}

// Requests returns the requests so far whose method and path contain the text.
func (s *Server) Requests(text string) (list []Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.requests {
		if strings.Contains(r.Method+" "+r.Path, text) {
			list = append(list, r)
		}
	}
	return list
}

// statusWriter remembers the status of an answer.
type statusWriter struct {
	http.ResponseWriter
	status int
}

func (w *statusWriter) WriteHeader(status int) {
	w.status = status
	w.ResponseWriter.WriteHeader(status)
}

func (w *statusWriter) Flush() {
	if f, can := w.ResponseWriter.(http.Flusher); can {
		f.Flush()
	}
}

func (s *Server) serve(writer http.ResponseWriter, r *http.Request) {
	w := &statusWriter{writer, http.StatusOK}
	isAPI := strings.HasPrefix(r.URL.Path, "/api/")
	entry := Request{Method: r.Method, Path: r.URL.RequestURI(), Header: r.Header.Clone()}
	if isAPI {
		body, err := io.ReadAll(io.LimitReader(r.Body, 1<<20))
		if err != nil {
			return
		}
		entry.Body = body
		r.Body = io.NopCloser(bytes.NewReader(body))
	}
	defer func() {
		entry.Status = w.status
		s.mu.Lock()
		s.requests = append(s.requests, entry)
		s.mu.Unlock()
	}()
	s.mu.Lock()
	intercept := s.intercept
	s.mu.Unlock()
	switch {
	case intercept != nil && intercept(w, r):
	case isAPI:
		s.serveAPI(w, r)
	default:
		s.serveGit(w, r)
	}
}

// serveGit answers for git, by git's own server.
func (s *Server) serveGit(w http.ResponseWriter, r *http.Request) {
	_, password, has := r.BasicAuth()
	token := s.token(password)
	if !has || token == nil {
		w.Header().Set("WWW-Authenticate", `Basic realm="GitHub"`)
		http.Error(w, "Invalid username or token.", http.StatusUnauthorized)
		return
	}
	name, _, found := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), ".git/")
	repo := s.find(name)
	if !found || repo == nil || !s.sees(token, repo) {
		http.Error(w, "Repository not found.", http.StatusNotFound)
		return
	}
	pushes := r.URL.Query().Get("service") == "git-receive-pack" || strings.HasSuffix(r.URL.Path, "/git-receive-pack")
	if pushes && (token.ReadOnly || s.settings(repo).Archived) {
		http.Error(w, fmt.Sprintf("Permission to %s.git denied to %s.", name, token.Login), http.StatusForbidden)
		return
	}
	// CGI puts headers into the environment, where tests look for tokens of the worker.
	r.Header.Del("Authorization")
	// CGI needs the length of a body, which git does not send with a large one.
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	r.Body, r.ContentLength, r.TransferEncoding = io.NopCloser(bytes.NewReader(body)), int64(len(body)), nil
	answer := func(w http.ResponseWriter, r *http.Request) { s.gitBackend(w, r, token) }
	if fault := s.nextFault(r); fault != nil {
		fault(w, r, answer)
		return
	}
	answer(w, r)
}

// gitBackend lets git's own server answer.
func (s *Server) gitBackend(w http.ResponseWriter, r *http.Request, token *Token) {
	handler := cgi.Handler{
		Path: s.backend, Stderr: io.Discard,
		Env: []string{
			"GIT_PROJECT_ROOT=" + filepath.Join(s.dir, "repositories"), "GIT_HTTP_EXPORT_ALL=1", "REMOTE_USER=" + token.Login,
			"GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL=/dev/null", "HOME=" + s.dir, "GIT_PROTOCOL=" + r.Header.Get("Git-Protocol"),
		},
	}
	handler.ServeHTTP(w, r)
}

// token returns a token that is valid.
func (s *Server) token(text string) *Token {
	s.mu.Lock()
	defer s.mu.Unlock()
	token := s.tokens[text]
	if token == nil || !token.Expires.IsZero() && time.Now().After(token.Expires) {
		return nil
	}
	return token
}

// Git runs git in a repository of the server, and returns its output.
func (s *Server) Git(ctx context.Context, name string, args ...string) (string, error) {
	return run(s.command(ctx, name, args...))
}

// command is git in a repository of the server.
func (s *Server) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "git", args...)
	cmd.Dir = filepath.Join(s.dir, "repositories", filepath.FromSlash(name)+".git")
	return cmd
}

// run runs git with no settings but the repository's.
func run(cmd *exec.Cmd) (string, error) {
	cmd.Env = append(os.Environ(), "GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL=/dev/null",
		"GIT_AUTHOR_NAME=Somebody", "GIT_AUTHOR_EMAIL=somebody@example.com", "GIT_COMMITTER_NAME=Somebody", "GIT_COMMITTER_EMAIL=somebody@example.com")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("git %s: %w: %s", strings.Join(cmd.Args[1:], " "), err, stderr.String())
	}
	return strings.TrimRight(string(out), "\n"), nil
}
