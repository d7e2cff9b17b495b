package address

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
)

// Broker is the address of one broker, as kombu parses it. Missing parts have
// kombu's defaults.
type Broker struct {
	TLS      bool
	User     string
	Password secret.String
	Host     string
	Port     int
	VHost    string
	// CAFile, CertFile and KeyFile are for TLS. Empty means the system's
	// certificate authorities and no client certificate.
	CAFile, CertFile, KeyFile string
	// Heartbeat is zero if the address has no heartbeat option.
	Heartbeat time.Duration
	// Hidden: the address is shown only by its scheme, because an unescaped @
	// follows its host, so that host or virtual host may be a part of the password.
	Hidden bool

	scheme string
	// written is the host as it is in the address: Host is 127.0.0.1 for localhost.
	written string
	// portGiven: Port is not the default. heartbeatGiven: there is a heartbeat
	// option. tlsOptions: there are options about TLS.
	portGiven, heartbeatGiven, tlsOptions bool
}

// Kombu's defaults for the parts that an address leaves out.
const (
	brokerUser     = "guest"
	brokerPassword = "guest"
	brokerHost     = "127.0.0.1"
	brokerPort     = 5672
	brokerTLSPort  = 5671
	brokerVHost    = "/"
)

// Address is host:port.
func (b Broker) Address() string { return net.JoinHostPort(b.Host, strconv.Itoa(b.Port)) }

// ServerNames are the names that the server's certificate may be for: the host as it is
// written, and 127.0.0.1 for localhost, as this is where the connection goes.
func (b Broker) ServerNames() []string {
	if b.written != "" && b.written != b.Host {
		return []string{b.written, b.Host}
	}
	return []string{b.Host}
}

// Place is host:port/vhost, for messages; only the scheme if Hidden.
func (b Broker) Place() string {
	if b.Hidden {
		return b.scheme + "://" + secret.Mask
	}
	return b.Address() + "/" + b.VHost
}

// Masked is the address with all effective parts, and with its password masked;
// only the scheme if Hidden.
func (b Broker) Masked() string {
	if b.Hidden {
		return b.scheme + "://" + secret.Mask
	}
	return b.text(secret.Mask)
}

func (b Broker) text(password string) string {
	var out strings.Builder
	out.WriteString(b.scheme + "://" + quote(b.User) + ":" + password + "@" + b.Address() + "/" + quoteExcept(b.VHost, "/"))
	n := 0
	option := func(name, value string) {
		if value != "" {
			out.WriteString(separator(n) + name + "=" + quoteExcept(value, "/"))
			n++
		}
	}
	option("ssl_ca_certs", b.CAFile)
	option("ssl_certfile", b.CertFile)
	option("ssl_keyfile", b.KeyFile)
	if b.TLS && b.scheme != "amqps" && n == 0 {
		option("ssl", "true")
	}
	if b.Heartbeat > 0 {
		option("heartbeat", strconv.FormatFloat(b.Heartbeat.Seconds(), 'f', -1, 64))
	}
	return out.String()
}

var errNotUTF8 = errors.New("it is not UTF-8; write every other byte as % and two hexadecimal digits")

// ParseBrokers parses one or several addresses, separated by semicolons, as kombu
// does. An address without port or virtual host has those of the address before
// it. A semicolon in a password is written as %3B. Errors contain only the scheme
// and names of options of an address.
func ParseBrokers(text string) ([]Broker, error) {
	if !utf8.ValidString(text) {
		return nil, errNotUTF8
	}
	var brokers []Broker
	for part := range strings.SplitSeq(text, ";") {
		if strings.TrimSpace(part) == "" {
			continue
		}
		// People write a space after a semicolon, with which Python misreads the
		// address. A space at the end belongs to the virtual host.
		broker, err := parseBroker(strings.TrimLeft(part, " \t\r\n"))
		if err != nil {
			return nil, err
		}
		if len(brokers) > 0 {
			broker.inherit(brokers[0], brokers[len(brokers)-1])
		}
		if broker.VHost == "" {
			broker.VHost = brokerVHost
		}
		if broker.Port == 0 {
			broker.Port = brokerPort
			if broker.TLS {
				broker.Port = brokerTLSPort
			}
		}
		brokers = append(brokers, broker)
	}
	if len(brokers) == 0 {
		return nil, errors.New("no broker is named; write amqp://user:password@host:port/vhost")
	}
	return brokers, nil
}

// inherit fills in missing parts from earlier addresses, as kombu does when it
// tries the next one: options from the first address, port and virtual host from
// the previous one.
func (b *Broker) inherit(first, last Broker) {
	b.Hidden = b.Hidden || last.Hidden // the virtual host may be inherited
	if b.VHost == "" {
		b.VHost = last.VHost
	}
	if b.Port == 0 && last.portGiven {
		b.Port, b.portGiven = last.Port, true
	}
	if !b.heartbeatGiven {
		b.Heartbeat = first.Heartbeat
	}
	if !b.tlsOptions && first.tlsOptions {
		b.TLS, b.tlsOptions = true, true
		b.CAFile, b.CertFile, b.KeyFile = first.CAFile, first.CertFile, first.KeyFile
	}
}

// MaskBrokers masks the passwords in a text for ParseBrokers. Of an invalid or
// ambiguous text it returns only the first scheme, because any part of it may
// belong to a password.
func MaskBrokers(text string) string {
	brokers, err := ParseBrokers(text)
	masked := make([]string, 0, len(brokers))
	for _, b := range brokers {
		if b.Hidden {
			err = errors.New("hidden")
		}
		masked = append(masked, b.Masked())
	}
	if err == nil {
		return strings.Join(masked, ";")
	}
	return SchemeOnly(strings.TrimLeft(text, " \t\r\n;"))
}

// parseBroker parses one address. Missing Port and VHost stay empty.
func parseBroker(text string) (Broker, error) {
	b := Broker{User: brokerUser, Password: secret.New(brokerPassword), Host: brokerHost}
	// urllib removes these characters everywhere.
	text = strings.NewReplacer("\t", "", "\r", "", "\n", "").Replace(text)
	before, rest, found := strings.Cut(text, "://")
	if !found {
		// Depending on its version, kombu takes a bare word for the name of a
		// transport or of a host.
		return b, errors.New("it has no scheme; write amqp://user:password@host:port/vhost")
	}
	switch b.scheme = strings.ToLower(before); b.scheme {
	case "amqp", "pyamqp":
	case "amqps":
		b.TLS = true
	default:
		if !scheme.MatchString(before) {
			return b, errors.New("its scheme is invalid; write amqp://user:password@host:port/vhost")
		}
		return b, fmt.Errorf("transport %q is not supported: use RabbitMQ, with amqp://, pyamqp:// or amqps://", before)
	}

	authority, rest := rest, ""
	if end := strings.IndexAny(authority, "/?#"); end >= 0 {
		authority, rest = authority[:end], authority[end:]
	}
	b.Hidden = strings.Contains(rest, "@")
	rest, _, _ = strings.Cut(rest, "#")
	path, query, _ := strings.Cut(rest, "?")

	if at := strings.LastIndex(authority, "@"); at >= 0 {
		user, password, _ := strings.Cut(authority[:at], ":")
		authority = authority[at+1:]
		if user = unquote(user); user != "" {
			b.User = user
		}
		if password = unquote(password); password != "" {
			b.Password = secret.New(password)
		}
	}
	if err := b.readHostPort(authority); err != nil {
		return b, err
	}
	if path = unquote(strings.TrimPrefix(path, "/")); path != "" {
		b.VHost = path
	}
	for what, part := range map[string]string{"user": b.User, "password": b.Password.Reveal(), "virtual host": b.VHost} {
		// The limits of AMQP, which apply to Python too.
		if len(part) > 255 || strings.Contains(part, "\x00") {
			return b, fmt.Errorf("its %s is longer than 255 bytes or contains NUL", what)
		}
	}
	if err := b.readOptions(query); err != nil {
		return b, err
	}
	b.portGiven = b.Port != 0
	return b, nil
}

// hostName matches host names. Names of containers contain underscores.
var hostName = regexp.MustCompile(`^[A-Za-z0-9_.-]+$`)

// readHostPort parses host:port or [address]:port; both parts are optional. As in
// kombu, port 0 counts as missing.
func (b *Broker) readHostPort(text string) error {
	host, port, bracketed := "", "", false
	if _, inside, found := strings.Cut(text, "["); found {
		bracketed = true
		host, port, found = strings.Cut(inside, "]")
		if !found {
			return errors.New("its host is not of the form [address]:port; write %5B for a [ in a password")
		}
		_, port, _ = strings.Cut(port, ":")
	} else {
		host, port, _ = strings.Cut(text, ":")
	}
	if name, zone, found := strings.Cut(host, "%"); found {
		host = strings.ToLower(name) + "%" + zone
	} else {
		host = strings.ToLower(host)
	}
	if host = unquote(host); host != "" {
		b.Host = host
	}
	_, err := netip.ParseAddr(b.Host)
	if (err != nil && (bracketed || !hostName.MatchString(b.Host))) || strings.Contains(b.Host, "%") {
		return errors.New("its host is neither a name nor an address; write %2F, %3F or %23 for / ? # in a password")
	}
	b.written = b.Host
	if b.Host == "localhost" {
		// As in kombu, since RabbitMQ may not listen on ::1.
		b.Host = brokerHost
	}
	if port == "" {
		return nil
	}
	b.Port, err = strconv.Atoi(port)
	if err != nil || b.Port > 65535 || port[0] == '+' || port[0] == '-' {
		if strings.Contains(port, ":") {
			return errors.New("its host has two colons; write an IPv6 address in brackets, and %2F for a / in a password")
		}
		// The error does not quote port: if a password contains an unescaped /, port
		// is a part of that password.
		return errors.New("its port is not a number up to 65535; write %2F, %3F or %23 for / ? # in a password")
	}
	return nil
}

// optionName matches names of options that errors may show.
var optionName = regexp.MustCompile(`^[A-Za-z0-9_.-]{1,63}$`)

// showOption returns an option's name as errors may show it.
func showOption(name string, hidden bool) string {
	if hidden || !optionName.MatchString(name) {
		return "an option after its ?"
	}
	return "option " + name
}

// readOptions parses the query of the address, with kombu's names of options.
func (b *Broker) readOptions(query string) error {
	given := map[string]string{}
	for _, p := range parseQuery(query) {
		given[p.name] = p.value // the last one wins, as in Python
	}
	for _, name := range slices.Sorted(maps.Keys(given)) {
		value := given[name]
		if name == "ssl" || strings.HasPrefix(name, "ssl_") {
			b.TLS, b.tlsOptions = true, true
		}
		switch name {
		case "ssl":
			// kombu takes any value for true, even "false".
			switch strings.ToLower(value) {
			case "true", "1", "yes", "on":
			default:
				return errors.New("option ssl must be true: write amqps:// for TLS, or remove the option")
			}
		case "ssl_ca_certs":
			b.CAFile = value
		case "ssl_certfile":
			b.CertFile = value
		case "ssl_keyfile":
			b.KeyFile = value
		case "ssl_cert_reqs":
			if !strings.EqualFold(value, "required") && !strings.EqualFold(value, "CERT_REQUIRED") {
				return errors.New("option ssl_cert_reqs must be CERT_REQUIRED: a broker's certificate is always checked; set ssl_ca_certs to its certificate authority")
			}
		case "ssl_check_hostname":
			if strings.EqualFold(value, "false") {
				return errors.New("option ssl_check_hostname must be true: the name in a broker's certificate is always checked")
			}
		case "heartbeat":
			seconds, err := strconv.ParseFloat(value, 64)
			if err != nil || !(seconds >= 0 && seconds <= 3600) {
				return errors.New("option heartbeat is not a number of seconds up to 3600")
			}
			b.heartbeatGiven = true
			b.Heartbeat = time.Duration(seconds * float64(time.Second))
		case "login_method":
			if !strings.EqualFold(value, "PLAIN") {
				return errors.New("option login_method must be PLAIN: this program logs in by user and password")
			}
		case "insist": // Python ignores it too
		default:
			return fmt.Errorf("%s is not supported", showOption(name, b.Hidden))
		}
	}
	if (b.CertFile == "") != (b.KeyFile == "") {
		return errors.New("options ssl_certfile and ssl_keyfile need each other")
	}
	return nil
}

// TLSConfig reads the files that the address names. It returns nil if the address
// names none, or uses no TLS.
func (b Broker) TLSConfig() (*tls.Config, error) {
	if !b.TLS || (b.CAFile == "" && b.CertFile == "") {
		return nil, nil
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if b.CAFile != "" {
		pem, err := os.ReadFile(b.CAFile)
		if err != nil {
			return nil, fmt.Errorf("ssl_ca_certs of the broker URL cannot be read: %w", err)
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("ssl_ca_certs of the broker URL, %s, has no certificate in PEM form", b.CAFile)
		}
	}
	if b.CertFile != "" {
		pair, err := tls.LoadX509KeyPair(b.CertFile, b.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("ssl_certfile and ssl_keyfile of the broker URL cannot be used: %w", err)
		}
		config.Certificates = []tls.Certificate{pair}
	}
	return config, nil
}
