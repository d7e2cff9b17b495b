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

// Broker is the address of one broker, as kombu reads it: every missing part
// has kombu's default.
type Broker struct {
	TLS      bool
	User     string
	Password secret.String
	Host     string
	Port     int
	VHost    string
	// CAFile, CertFile and KeyFile are for TLS; empty means the system's
	// authorities, and no certificate of our own.
	CAFile, CertFile, KeyFile string
	// Heartbeat is zero where the address says nothing.
	Heartbeat time.Duration
	// Hidden says that the address is shown as its scheme only, because an
	// unescaped @ stands behind its host: what is read as host or virtual host
	// may be meant as a part of the password.
	Hidden bool

	scheme string
	// These say that Port is not the default, that the address has a heartbeat,
	// and that options of it ask for TLS.
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

// Place is host:port/vhost, for messages.
func (b Broker) Place() string {
	if b.Hidden {
		return b.scheme + "://" + secret.Mask
	}
	return b.Address() + "/" + b.VHost
}

// Masked is the address with every part that is in effect, and without the
// password.
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

// ParseBrokers reads addresses as kombu does: one or several, separated by
// semicolons, to be tried in turn; one that names no port or no virtual host
// has those of the one before it. A semicolon in a password is written as
// %3B. Errors show nothing of an address but its scheme and names of options.
func ParseBrokers(text string) ([]Broker, error) {
	if !utf8.ValidString(text) {
		return nil, errNotUTF8
	}
	var brokers []Broker
	for part := range strings.SplitSeq(text, ";") {
		if strings.TrimSpace(part) == "" {
			continue
		}
		// Python reads nonsense where a blank stands first; behind a semicolon
		// people write one. One at the end belongs to the virtual host.
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

// inherit takes what the address leaves out from those before it, as kombu does
// when it goes on to the next one: options from the first, port and virtual
// host from the last.
func (b *Broker) inherit(first, last Broker) {
	b.Hidden = b.Hidden || last.Hidden // for the virtual host
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

// MaskBrokers shows a text that ParseBrokers reads, or its schemes only when
// it cannot be read in one way: a part of a password may then stand anywhere.
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

// parseBroker leaves Port and VHost empty where the text does.
func parseBroker(text string) (Broker, error) {
	b := Broker{User: brokerUser, Password: secret.New(brokerPassword), Host: brokerHost}
	// urllib takes these out, wherever they stand.
	text = strings.NewReplacer("\t", "", "\r", "", "\n", "").Replace(text)
	before, rest, found := strings.Cut(text, "://")
	if !found {
		// kombu takes a bare word for the name of a transport or of a host,
		// depending on its version.
		return b, errors.New("it has no scheme; write amqp://user:password@host:port/vhost")
	}
	switch b.scheme = strings.ToLower(before); b.scheme {
	case "amqp", "pyamqp":
	case "amqps":
		b.TLS = true
	default:
		if !scheme.MatchString(before) {
			return b, errors.New("its scheme is none; write amqp://user:password@host:port/vhost")
		}
		return b, fmt.Errorf("transport %q is not supported: this program speaks to RabbitMQ by amqp://, pyamqp:// or amqps://", before)
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
		// What AMQP can carry: longer ones, Python cannot send either.
		if len(part) > 255 || strings.Contains(part, "\x00") {
			return b, fmt.Errorf("its %s is longer than 255 bytes or holds NUL", what)
		}
	}
	if err := b.readOptions(query); err != nil {
		return b, err
	}
	b.portGiven = b.Port != 0
	return b, nil
}

// hostName is what a resolver may be asked for; containers have underscores.
var hostName = regexp.MustCompile(`^[A-Za-z0-9_.-]+$`)

// readHostPort reads host:port, [address]:port and either alone. A port of 0
// counts as none, as for kombu.
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
		return errors.New("its host is neither a name nor an address")
	}
	if b.Host == "localhost" {
		// As kombu does: RabbitMQ may not listen on ::1.
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
		// Not quoted: with an unescaped / in a password, this is part of it.
		return errors.New("its port is not a number up to 65535; write %2F, %3F or %23 for / ? # in a password")
	}
	return nil
}

// optionName is a name that may be shown.
var optionName = regexp.MustCompile(`^[A-Za-z0-9_.-]{1,63}$`)

// showOption is the name of an option as errors may show it.
func showOption(name string, hidden bool) string {
	if hidden || !optionName.MatchString(name) {
		return "an option behind its ?"
	}
	return "option " + name
}

// readOptions reads the query of the address, in kombu's names.
func (b *Broker) readOptions(query string) error {
	given := map[string]string{}
	for _, p := range parseQuery(query) {
		given[p.name] = p.value // the last one counts, as in Python
	}
	for _, name := range slices.Sorted(maps.Keys(given)) {
		value := given[name]
		if name == "ssl" || strings.HasPrefix(name, "ssl_") {
			b.TLS, b.tlsOptions = true, true
		}
		switch name {
		case "ssl":
			// For kombu every value means yes, also "false".
			switch strings.ToLower(value) {
			case "true", "1", "yes", "on":
			default:
				return errors.New("option ssl is neither true nor absent: write amqps:// for TLS, or leave it out")
			}
		case "ssl_ca_certs":
			b.CAFile = value
		case "ssl_certfile":
			b.CertFile = value
		case "ssl_keyfile":
			b.KeyFile = value
		case "ssl_cert_reqs":
			if !strings.EqualFold(value, "required") && !strings.EqualFold(value, "CERT_REQUIRED") {
				return errors.New("option ssl_cert_reqs must be CERT_REQUIRED: a broker's certificate is always checked; name its authority by ssl_ca_certs")
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
		case "insist": // nothing reads it, in Python neither
		default:
			return fmt.Errorf("%s is not supported", showOption(name, b.Hidden))
		}
	}
	if (b.CertFile == "") != (b.KeyFile == "") {
		return errors.New("ssl_certfile and ssl_keyfile go together")
	}
	return nil
}

// TLSConfig reads the files that the address names. It is nil where there are
// none, or no TLS.
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
