package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
)

// brokerURL is one broker, as kombu reads it from a URL: every missing part
// has kombu's default.
type brokerURL struct {
	TLS      bool
	User     string
	Password secret.String
	Host     string
	Port     int
	VHost    string
	// CAFile, CertFile and KeyFile are for TLS; empty means the system's
	// authorities, and no certificate of our own.
	CAFile, CertFile, KeyFile string
	// Heartbeat is zero where the URL says nothing.
	Heartbeat time.Duration
}

// Address is host:port.
func (b brokerURL) Address() string { return net.JoinHostPort(b.Host, strconv.Itoa(b.Port)) }

// Redacted is the URL with every part and without the password, as kombu
// prints it.
func (b brokerURL) Redacted() string { return b.text(secret.Mask) }

// AMQP is the URL with every part, for a connection.
func (b brokerURL) AMQP() secret.String {
	return secret.New(b.text(url.QueryEscape(b.Password.Reveal())))
}

func (b brokerURL) text(password string) string {
	scheme := "amqp"
	if b.TLS {
		scheme = "amqps"
	}
	// QueryEscape writes a space as +, which a user part keeps as it is.
	escape := func(s string) string { return strings.ReplaceAll(url.QueryEscape(s), "+", "%20") }
	password = strings.ReplaceAll(password, "+", "%20")
	return scheme + "://" + escape(b.User) + ":" + password + "@" + b.Address() + "/" + escape(b.VHost)
}

// Kombu's defaults for the parts that a URL leaves out.
const (
	brokerUser     = "guest"
	brokerPassword = "guest"
	brokerHost     = "127.0.0.1"
	brokerPort     = 5672
	brokerTLSPort  = 5671
	brokerVHost    = "/"
)

// parseBrokerURLs reads broker URLs as kombu does: one or several of them,
// separated by semicolons, to be tried in turn. The error shows no password.
func parseBrokerURLs(text string) ([]brokerURL, error) {
	var brokers []brokerURL
	for part := range strings.SplitSeq(text, ";") {
		if part = strings.TrimSpace(part); part == "" {
			continue
		}
		broker, err := parseBrokerURL(part)
		if err != nil {
			return nil, err
		}
		brokers = append(brokers, broker)
	}
	if len(brokers) == 0 {
		return nil, errors.New("no broker is named; write amqp://user:password@host:port/vhost")
	}
	return brokers, nil
}

func parseBrokerURL(text string) (brokerURL, error) {
	b := brokerURL{User: brokerUser, Password: secret.New(brokerPassword), Host: brokerHost, Port: brokerPort, VHost: brokerVHost}
	scheme, rest, found := strings.Cut(text, "://")
	if !found {
		// kombu takes a bare word for the name of a transport or of a host,
		// depending on its version.
		return b, errors.New("it has no scheme; write amqp://user:password@host:port/vhost")
	}
	switch strings.ToLower(scheme) {
	case "amqp", "pyamqp":
	case "amqps":
		b.TLS, b.Port = true, brokerTLSPort
	default:
		return b, fmt.Errorf("transport %q is not supported: this program speaks to RabbitMQ by amqp://, pyamqp:// or amqps://", scheme)
	}

	rest, fragment, _ := strings.Cut(rest, "#")
	rest, query, _ := strings.Cut(rest, "?")
	if fragment != "" {
		return b, errors.New("it has a #; write %23 for a # in the password")
	}
	authority, path, _ := strings.Cut(rest, "/")
	// The last @ ends the credentials, so that an unescaped @ in a password
	// does no harm, as with Python.
	if at := strings.LastIndex(authority, "@"); at >= 0 {
		user, password, _ := strings.Cut(authority[:at], ":")
		authority = authority[at+1:]
		if user != "" {
			plain, err := unescape("user", user)
			if err != nil {
				return b, err
			}
			b.User = plain
		}
		if password != "" {
			plain, err := unescape("password", password)
			if err != nil {
				return b, err
			}
			b.Password = secret.New(plain)
		}
	}
	host, port, err := splitHostPort(authority)
	if err != nil {
		return b, err
	}
	if host != "" {
		if b.Host, err = unescape("host", strings.ToLower(host)); err != nil {
			return b, err
		}
	}
	if _, err := netip.ParseAddr(b.Host); (err != nil && !hostName.MatchString(b.Host)) || strings.Contains(b.Host, "%") {
		return b, errors.New("its host is neither a name nor an address")
	}
	if b.Host == "localhost" {
		// As kombu does: RabbitMQ may not listen on ::1.
		b.Host = brokerHost
	}
	if port != "" {
		if b.Port, err = strconv.Atoi(port); err != nil || b.Port < 1 || b.Port > 65535 {
			// Not quoted: with an unescaped / in a password, this is part of it.
			return b, errors.New("its port is not a number from 1 to 65535; write %2F for a / in a password")
		}
	}
	if path != "" {
		if b.VHost, err = unescape("virtual host", path); err != nil {
			return b, err
		}
	}
	return b, b.readOptions(query)
}

// hostName is what a resolver may be asked for; containers have underscores.
var hostName = regexp.MustCompile(`^[A-Za-z0-9_.-]+$`)

// splitHostPort also takes a host without a port, and [::1].
func splitHostPort(authority string) (host, port string, err error) {
	if strings.HasPrefix(authority, "[") {
		inside, rest, found := strings.Cut(authority[1:], "]")
		if !found || (rest != "" && !strings.HasPrefix(rest, ":")) {
			return "", "", errors.New("its host is not of the form [address]:port")
		}
		return inside, strings.TrimPrefix(rest, ":"), nil
	}
	host, port, _ = strings.Cut(authority, ":")
	if strings.Contains(port, ":") {
		return "", "", errors.New("its host has two colons; write an IPv6 address in brackets")
	}
	return host, port, nil
}

// unescape resolves percent-encoding. Python leaves a stray % as it is, and so
// must a drop-in.
func unescape(what, text string) (string, error) {
	var out strings.Builder
	for i := 0; i < len(text); i++ {
		if text[i] == '%' && i+2 < len(text) {
			if code, err := strconv.ParseUint(text[i+1:i+3], 16, 8); err == nil {
				out.WriteByte(byte(code))
				i += 2
				continue
			}
		}
		out.WriteByte(text[i])
	}
	plain := out.String()
	if strings.ContainsAny(plain, "\x00\r\n") || len(plain) > 255 {
		return "", fmt.Errorf("its %s is longer than 255 bytes or holds a control character", what)
	}
	return plain, nil
}

// readOptions reads the query of the URL, in kombu's names.
func (b *brokerURL) readOptions(query string) error {
	if query == "" {
		return nil
	}
	given, err := url.ParseQuery(query)
	if err != nil {
		return errors.New("what follows its ? is not of the form name=value&name=value")
	}
	for _, name := range slices.Sorted(maps.Keys(given)) {
		value := given.Get(name)
		switch name {
		case "ssl_ca_certs":
			b.CAFile = value
		case "ssl_certfile":
			b.CertFile = value
		case "ssl_keyfile":
			b.KeyFile = value
		case "ssl_cert_reqs":
			if !strings.EqualFold(value, "required") && !strings.EqualFold(value, "CERT_REQUIRED") {
				return fmt.Errorf("option ssl_cert_reqs=%s is refused: a broker's certificate is always checked; name its authority by ssl_ca_certs", value)
			}
		case "heartbeat":
			seconds, err := strconv.Atoi(value)
			if err != nil || seconds < 1 || seconds > 3600 {
				return errors.New("option heartbeat is not a number of seconds from 1 to 3600")
			}
			b.Heartbeat = time.Duration(seconds) * time.Second
		default:
			return fmt.Errorf("option %q is not supported", name)
		}
	}
	if !b.TLS && (b.CAFile != "" || b.CertFile != "" || b.KeyFile != "") {
		return errors.New("it has ssl_ options, but no TLS; write amqps://")
	}
	if (b.CertFile == "") != (b.KeyFile == "") {
		return errors.New("ssl_certfile and ssl_keyfile go together")
	}
	return nil
}

// brokerTLS reads the files that the URLs name. All brokers of one list share
// one TLS configuration.
func brokerTLS(brokers []brokerURL) (*tls.Config, error) {
	var first *brokerURL
	for i, b := range brokers {
		switch {
		case !b.TLS:
		case first == nil:
			first = &brokers[i]
		case b.CAFile != first.CAFile || b.CertFile != first.CertFile || b.KeyFile != first.KeyFile:
			return nil, &configError{"the broker URL names brokers with different ssl_ options: give all of them the same"}
		}
	}
	if first == nil || (first.CAFile == "" && first.CertFile == "") {
		return nil, nil
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if first.CAFile != "" {
		pem, err := os.ReadFile(first.CAFile)
		if err != nil {
			return nil, &configError{fmt.Sprintf("ssl_ca_certs of the broker URL cannot be read: %v", err)}
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(pem) {
			return nil, &configError{fmt.Sprintf("ssl_ca_certs of the broker URL, %s, has no certificate in PEM form", first.CAFile)}
		}
	}
	if first.CertFile != "" {
		pair, err := tls.LoadX509KeyPair(first.CertFile, first.KeyFile)
		if err != nil {
			return nil, &configError{fmt.Sprintf("ssl_certfile and ssl_keyfile of the broker URL cannot be used: %v", err)}
		}
		config.Certificates = []tls.Certificate{pair}
	}
	return config, nil
}
