package store

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
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/url"
	"os"
	"os/user"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/moonladderstudios/mm-orchestrator/internal/address"
	"github.com/moonladderstudios/mm-orchestrator/internal/database"
	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
)

// openURL opens a database and returns what was logged.
func openURL(t *testing.T, text string) (*Store, string, error) {
	t.Helper()
	var logged bytes.Buffer
	s, err := Open(t.Context(), Config{URL: secret.New(text), Logger: slog.New(slog.NewTextHandler(&logged, nil))})
	if err == nil {
		t.Cleanup(s.Close)
	}
	return s, logged.String(), err
}

// with adds options to a URL.
func with(base, options string) string {
	separator := "?"
	if strings.Contains(base, "?") {
		separator = "&"
	}
	return base + separator + options
}

func lines(t *testing.T, path string) []string {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for line := range strings.Lines(string(content)) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
			found = append(found, line)
		}
	}
	return found
}

// The addresses of bug reports: users and passwords with everything in them,
// written as people write them. Python logs in with each.
func TestPasswordsAsPeopleWriteThem(t *testing.T) {
	t.Parallel()
	base := devenv.Database(t)
	u, err := url.Parse(base)
	if err != nil {
		t.Fatal(err)
	}
	suffix := strings.TrimPrefix(u.Path, "/")
	for _, tt := range []struct{ user, password, written string }{
		{"admin@srv", "Geheim99", "admin@srv%s:Geheim99"},
		{"admin1", "Geheim 99", "admin1%s:Geheim 99"},
		{"admin2", "Geheim#99", "admin2%s:Geheim#99"},
		{"admin3", "Geheim99%", "admin3%s:Geheim99%%"},
		{"admin4", "a/b?c[d^e'f\\g", "admin4%s:a/b?c[d^e'f\\g"},
		{"admin5", "Ge@heim/88 w", "admin5%s:Ge%%40heim%%2F88%%20w"},
		{"admin6", "p@ss", "admin6%s:p@ss"}, // Python wants %40
		{"ü ser", "ü:ß", "ü ser%s:ü:ß"},
	} {
		role := tt.user + suffix
		devenv.Role(t, base, role, tt.password)
		login := strings.ReplaceAll(strings.Replace(tt.written, "%s", suffix, 1), "%%", "%")
		s, _, err := openURL(t, "db+postgresql+psycopg2://"+login+"@"+u.Host+u.Path)
		if err != nil {
			t.Errorf("%s: %v", tt.written, err)
			continue
		}
		var got string
		if err := s.pool.QueryRow(t.Context(), `SELECT current_user`).Scan(&got); err != nil || got != role {
			t.Errorf("%s: logged in as %q, %v; want %q", tt.written, got, err, role)
		}
	}
}

// Options of bug reports, with each of which psycopg2 connects.
func TestOptionsOfBugReportsConnect(t *testing.T) {
	t.Parallel()
	base := devenv.Database(t)
	for _, options := range lines(t, "testdata/libpq_options.txt") {
		if _, logged, err := openURL(t, with(base, options)); err != nil || logged != "" {
			t.Errorf("%s: %v, logged %q", options, err, logged)
		}
	}
}

// Every option of libpq 18 is applied, has no effect and is logged, or is refused by
// name with the right cure.
func TestEveryKeywordOfLibpq(t *testing.T) {
	t.Parallel()
	base := devenv.Database(t)
	u, err := url.Parse(base)
	if err != nil {
		t.Fatal(err)
	}
	password, _ := u.User.Password()
	passfile := filepath.Join(t.TempDir(), "passfile")
	if err := os.WriteFile(passfile, []byte("*:*:*:*:"+password+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	const (
		connects = "connects"
		ignored  = "ignored"
		refused  = "refused"
	)
	for keyword, tt := range map[string]struct{ value, want string }{
		"service": {"", connects}, "user": {u.User.Username(), connects}, "password": {password, connects},
		"passfile": {passfile, connects}, "channel_binding": {"prefer", connects}, "connect_timeout": {"3", connects},
		"dbname": {strings.TrimPrefix(u.Path, "/"), connects}, "host": {u.Hostname(), connects}, "hostaddr": {"127.0.0.1", connects}, "port": {u.Port(), connects},
		"client_encoding": {"latin1", ignored}, "options": {"-csearch_path=public", connects}, "application_name": {"me", connects}, "fallback_application_name": {"me", connects},
		"keepalives": {"1", connects}, "keepalives_idle": {"30", connects}, "keepalives_interval": {"10", connects}, "keepalives_count": {"5", connects},
		"tcp_user_timeout": {"3000", connects},
		"sslmode":          {"prefer", connects}, "sslnegotiation": {"postgres", connects}, "sslcompression": {"1", ignored}, "sslcert": {"/nowhere.crt", refused}, "sslkey": {"/nowhere.key", refused},
		"sslcertmode": {"allow", connects}, "sslpassword": {"x", connects}, "sslrootcert": {"/nowhere.pem", refused}, "sslcrl": {"/nowhere.crl", refused}, "sslcrldir": {"/nowhere", refused},
		"sslsni": {"0", connects}, "requirepeer": {"postgres", connects}, "require_auth": {"scram-sha-256,md5,password,none", connects},
		"min_protocol_version": {"3.0", connects}, "max_protocol_version": {"3.2", connects}, "ssl_min_protocol_version": {"TLSv1.2", connects}, "ssl_max_protocol_version": {"TLSv1.3", connects},
		"gssencmode": {"require", refused}, "krbsrvname": {"postgres", ignored}, "gsslib": {"gssapi", ignored}, "gssdelegation": {"1", ignored},
		"replication": {"database", refused}, "target_session_attrs": {"read-write", connects}, "load_balance_hosts": {"random", connects},
		"scram_client_key": {"x", refused}, "scram_server_key": {"x", refused},
		"oauth_issuer": {"https://issuer", ignored}, "oauth_client_id": {"x", ignored}, "oauth_client_secret": {"x", ignored}, "oauth_scope": {"x", ignored},
		"sslkeylogfile": {"/nowhere.log", ignored},
	} {
		text := with(base, keyword+"="+url.QueryEscape(tt.value))
		if keyword == "passfile" {
			text = strings.Replace(text, ":"+url.QueryEscape(password)+"@", "@", 1)
		}
		_, logged, err := openURL(t, text)
		got := connects
		switch {
		case err != nil:
			got = refused
		case strings.Contains(logged, "has no effect") && strings.Contains(logged, keyword):
			got = ignored
		}
		if got != tt.want {
			t.Errorf("%s: %s, want %s; %v; logged %q", keyword, got, tt.want, err, logged)
		}
		if err != nil && (strings.Contains(err.Error(), "migrate") || !errors.Is(err, ErrInvalid)) {
			t.Errorf("%s: %v", keyword, err)
		}
	}
	for _, keyword := range lines(t, "../internal/address/testdata/libpq_18_keywords.txt") {
		if !address.Known(keyword) {
			t.Errorf("%s is not known", keyword)
		}
	}
}

// The error names a parameter that the server refuses, with the right cure.
func TestParametersThatTheServerRefuses(t *testing.T) {
	t.Parallel()
	base := devenv.Database(t)
	for options, want := range map[string]string{
		"surprise=1":             `"surprise"`,
		"statement_timeout=x":    `"statement_timeout"`,
		"server_version=1":       `"server_version"`,
		"sslmode=sometimes":      "option sslmode must be",
		"target_session_attrs=x": "option target_session_attrs must be",
		"hostaddr=a.name":        "names belong into the host",
		"hostaddr=::1,::1":       "one for each host",
		"require_auth=x":         "require_auth",
		"keepalives=on":          "option keepalives must be a whole number",
	} {
		_, _, err := openURL(t, with(base, options))
		if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "migrate") {
			t.Errorf("%s: got %v, want one with %s", options, err, want)
		}
	}
}

func TestHostsAndTheirAddresses(t *testing.T) {
	t.Parallel()
	base := devenv.Database(t)
	u, err := url.Parse(base)
	if err != nil {
		t.Fatal(err)
	}
	for _, host := range []string{
		"nowhere.invalid:" + u.Port() + u.Path + "?hostaddr=" + u.Hostname(),
		":" + u.Port() + u.Path + "?hostaddr=" + u.Hostname(),
		u.Path + "?host=127.0.0.1:1&host=" + u.Host,
		u.Path + "?host=127.0.0.1," + u.Hostname() + "&port=1," + u.Port() + "&load_balance_hosts=random",
		"127.0.0.1:1," + u.Host + u.Path,
	} {
		if _, _, err := openURL(t, "postgresql://"+u.User.String()+"@"+host); err != nil {
			t.Errorf("%s: %v", host, err)
		}
	}

	d, err := address.ParseDatabase("postgresql:///d?host=h1,h2,h3&port=1,2,3&load_balance_hosts=random&sslmode=prefer")
	if err != nil {
		t.Fatal(err)
	}
	c, err := database.NewConnection(d, database.Options{Connections: 1, ConnectTimeout: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	first := map[string]bool{}
	for range 200 {
		connect := c.Pool.ConnConfig.Copy()
		c.Balance(connect)
		first[connect.Host] = true
		var order []string
		all := append([]*pgconn.FallbackConfig{{Host: connect.Host, Port: connect.Port}}, connect.Fallbacks...)
		for _, way := range all {
			order = append(order, way.Host+string(rune('0'+way.Port)))
		}
		if slices.Sort(order); !slices.Equal(order, []string{"h11", "h11", "h22", "h22", "h33", "h33"}) || connect.TLSConfig == nil {
			t.Fatalf("%q became %q", "h1,h2,h3", order)
		}
	}
	if len(first) != 3 {
		t.Errorf("of three hosts only %v come first", first)
	}
}

// Options of a service file are treated like those of an address.
func TestServiceFile(t *testing.T) {
	t.Parallel()
	base := devenv.Database(t)
	u, err := url.Parse(base)
	if err != nil {
		t.Fatal(err)
	}
	password, _ := u.User.Password()
	file := filepath.Join(t.TempDir(), "pg_service.conf")
	common := "host=" + u.Hostname() + "\nport=" + u.Port() + "\nuser=" + u.User.Username() + "\npassword=" + password + "\ndbname=" + strings.TrimPrefix(u.Path, "/") + "\n"
	if err := os.WriteFile(file, []byte("[good]\n"+common+"keepalives_idle=33\ngssencmode=prefer\nkrbsrvname=x\n[bad]\n"+common+"gssencmode=require\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s, logged, err := openURL(t, "postgresql://?servicefile="+file+"&service=good")
	if err != nil || !strings.Contains(logged, "krbsrvname") {
		t.Errorf("%v, logged %q", err, logged)
	} else if s.Place() != u.Host+u.Path {
		t.Errorf("place %q", s.Place())
	}
	if _, _, err = openURL(t, "postgresql://?servicefile="+file+"&service=bad"); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "gssencmode=prefer") {
		t.Errorf("got %v", err)
	}
}

// relay passes connections on to a server, after what front does with each.
func relay(t *testing.T, listener net.Listener, server string, front func(net.Conn) (net.Conn, error)) {
	t.Helper()
	var group sync.WaitGroup
	group.Go(func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			group.Go(func() {
				defer client.Close()
				inner, err := front(client)
				if err != nil {
					return
				}
				behind, err := net.Dial("tcp", server)
				if err != nil {
					return
				}
				defer behind.Close()
				done := make(chan struct{}, 2)
				pass := func(to, from net.Conn) {
					_, _ = io.Copy(to, from)
					done <- struct{}{}
				}
				go pass(behind, inner)
				go pass(inner, behind)
				<-done
				_, _ = behind.Close(), client.Close()
				<-done
			})
		}
	})
	t.Cleanup(func() { _ = listener.Close(); group.Wait() })
}

func TestRequirePeer(t *testing.T) {
	t.Parallel()
	if runtime.GOOS != "linux" {
		t.Skip("not on this system")
	}
	u, err := url.Parse(devenv.Database(t))
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "mm-peer") // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	listener, err := net.Listen("unix", filepath.Join(dir, ".s.PGSQL.5432"))
	if err != nil {
		t.Fatal(err)
	}
	relay(t, listener, u.Host, func(c net.Conn) (net.Conn, error) { return c, nil })
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	base := "postgresql://" + u.User.String() + "@" + u.Path + "?host=" + dir + "&requirepeer="
	if _, _, err := openURL(t, base+me.Username); err != nil {
		t.Errorf("as %s: %v", me.Username, err)
	}
	if _, _, err := openURL(t, base+"somebody-else"); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "requirepeer") {
		t.Errorf("as somebody else: %v", err)
	}
}

// authority signs certificates for 127.0.0.1 and revokes them.
type authority struct {
	t           *testing.T
	dir         string
	key         *ecdsa.PrivateKey
	certificate *x509.Certificate
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, SubjectKeyId: []byte{1}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	a := &authority{t: t, dir: t.TempDir(), key: key}
	if a.certificate, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	a.write("ca.pem", "CERTIFICATE", der)
	return a
}

func (a *authority) write(name, kind string, der []byte) string {
	path := filepath.Join(a.dir, name)
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		a.t.Fatal(err)
	}
	return path
}

func (a *authority) server(serial int64) tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: "server"}, NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	der, err := x509.CreateCertificate(rand.Reader, template, a.certificate, &key.PublicKey, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func (a *authority) list(name string, until time.Time, serials ...int64) string {
	template := &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: time.Now().Add(-2 * time.Hour), NextUpdate: until}
	for _, serial := range serials {
		template.RevokedCertificateEntries = append(template.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: big.NewInt(serial), RevocationTime: time.Now()})
	}
	der, err := x509.CreateRevocationList(rand.Reader, template, a.certificate, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	return a.write(name, "X509 CRL", der)
}

// The TLS versions and revocation lists of an address are in force on the
// connection.
func TestTLSOptions(t *testing.T) {
	t.Parallel()
	u, err := url.Parse(devenv.Database(t))
	if err != nil {
		t.Fatal(err)
	}
	a := newAuthority(t)
	certificate := a.server(7)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var spoken uint16
	relay(t, listener, u.Host, func(c net.Conn) (net.Conn, error) {
		request := make([]byte, 8)
		if _, err := io.ReadFull(c, request); err != nil {
			return nil, err
		}
		if _, err := c.Write([]byte("S")); err != nil {
			return nil, err
		}
		secure := tls.Server(c, &tls.Config{Certificates: []tls.Certificate{certificate}})
		if err := secure.HandshakeContext(context.Background()); err != nil {
			return nil, err
		}
		mu.Lock()
		spoken = secure.ConnectionState().Version
		mu.Unlock()
		return secure, nil
	})
	base := "postgresql://" + u.User.String() + "@" + listener.Addr().String() + u.Path + "?sslmode=verify-full&sslrootcert=" + filepath.Join(a.dir, "ca.pem")
	for _, tt := range []struct {
		options string
		version uint16
		problem string
	}{
		{"", tls.VersionTLS13, ""},
		{"&ssl_max_protocol_version=TLSv1.2", tls.VersionTLS12, ""},
		{"&ssl_min_protocol_version=tlsv1.3", tls.VersionTLS13, ""},
		{"&sslcrl=" + a.list("other.crl", time.Now().Add(time.Hour), 8), tls.VersionTLS13, ""},
		{"&sslcrl=" + a.list("revoked.crl", time.Now().Add(time.Hour), 8, 7), 0, "is revoked"},
		{"&sslcrldir=" + a.dir, 0, "is revoked"},
		{"&sslcrl=" + a.list("old.crl", time.Now().Add(-time.Hour)), 0, "has expired"},
		{"&sslcrl=" + filepath.Join(a.dir, "ca.pem"), 0, "no list of revoked certificates"},
		{"&sslcrl=" + newAuthority(t).list("foreign.crl", time.Now().Add(time.Hour)), tls.VersionTLS13, ""}, // of an authority of the same name
	} {
		_, _, err := openURL(t, base+tt.options)
		mu.Lock()
		version := spoken
		mu.Unlock()
		switch {
		case tt.problem == "" && (err != nil || version != tt.version):
			t.Errorf("%s: %v, spoke %x, want %x", tt.options, err, version, tt.version)
		case tt.problem != "" && (err == nil || !strings.Contains(err.Error(), tt.problem)):
			t.Errorf("%s: got %v, want %s", tt.options, err, tt.problem)
		}
	}
}

// No error shows the host of an address if another @ follows it.
func TestAnAddressThatMayHoldItsPasswordElsewhere(t *testing.T) {
	t.Parallel()
	u, err := url.Parse(devenv.Database(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{
		"postgresql://user:x@127.0.0.1:1/Geheim99@h/d",
		"postgresql://us/er:Geheim99@127.0.0.1:1/d",
		"postgresql://user:x@nowhere.invalid/Geheim99@h/d",
		"postgresql://" + u.User.String() + "@" + u.Host + "/Geheim99@h/d",
	} {
		_, _, err := openURL(t, text)
		if err == nil || strings.Contains(err.Error(), "Geheim") || !strings.Contains(err.Error(), "%40") {
			t.Errorf("%s: %v", text, err)
		}
	}
}
