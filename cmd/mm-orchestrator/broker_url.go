package main

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"strconv"
	"strings"

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
	// Options are the query of the URL in the words of package amqp091.
	Options url.Values
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
	text := scheme + "://" + escape(b.User) + ":" + password + "@" + b.Address() + "/" + escape(b.VHost)
	if len(b.Options) > 0 {
		text += "?" + b.Options.Encode()
	}
	return text
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
	b.Options, err = brokerOptions(query)
	return b, err
}

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

// brokerOptionNames leads from kombu's options to those of package amqp091.
var brokerOptionNames = map[string]string{
	"ssl_ca_certs":       "cacertfile",
	"ssl_certfile":       "certfile",
	"ssl_keyfile":        "keyfile",
	"heartbeat":          "heartbeat",
	"connection_timeout": "connection_timeout",
}

func brokerOptions(query string) (url.Values, error) {
	if query == "" {
		return nil, nil
	}
	given, err := url.ParseQuery(query)
	if err != nil {
		return nil, errors.New("what follows its ? is not of the form name=value&name=value")
	}
	options := url.Values{}
	for name := range given {
		value := given.Get(name)
		switch {
		case brokerOptionNames[name] != "":
			options.Set(brokerOptionNames[name], value)
		case name == "ssl_cert_reqs" && (strings.EqualFold(value, "required") || strings.EqualFold(value, "CERT_REQUIRED")):
		case name == "ssl_cert_reqs":
			return nil, fmt.Errorf("option ssl_cert_reqs=%s is refused: a broker's certificate is always checked; name its authority by ssl_ca_certs", value)
		default:
			return nil, fmt.Errorf("option %q is not supported", name)
		}
	}
	return options, nil
}
