package address

import (
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
)

// Database is the address of a PostgreSQL database, as SQLAlchemy parses it and
// passes it to libpq.
type Database struct {
	User     string
	Password secret.String
	// Host and Port are lists separated by commas, as in libpq. A host that begins
	// with a slash is the directory of a Unix socket. Empty means the default.
	Host, Port string
	Name       string
	// Options are libpq's other keywords, and server parameters.
	Options map[string]string
	// Hidden: the address is shown only by its scheme, because an unescaped @
	// follows its host, so that host or name may be a part of the password.
	Hidden bool

	// prefix is the scheme with which the address is shown.
	prefix string
	// text is the parsed text.
	text string
}

// NewDatabase makes an address from its parts.
func NewDatabase(user string, password secret.String, host, port, name string) Database {
	return Database{User: user, Password: password, Host: host, Port: port, Name: name, prefix: "postgresql"}
}

// databaseForm is SQLAlchemy's own expression. A user name ends at a colon, or at
// the last @ before one; a password ends at the first @. All other characters in
// them are literal.
var databaseForm = regexp.MustCompile(`^([\w+]+)://` +
	`(?:([^:/]*)(:[^@]*)?@)?` +
	`(?:(?:\[([^/?]+)\]|([^/:?]+))?(?::([^/?]*))?)?` +
	`(?:/([^?]*))?` +
	`(?:\?(.*))?`)

// portForm matches what Python's int() accepts as a positive number.
var portForm = regexp.MustCompile(`^\+?[0-9]+(_[0-9]+)*$`)

const databaseExample = "postgresql://user:password@host:port/database"

// ParseDatabase parses the address of a result backend or a database:
// db+postgresql://…, postgresql://…, postgres://…, optionally with the name of a
// Python driver after a +. Errors contain only the scheme and names of options of
// the address.
func ParseDatabase(text string) (Database, error) {
	d := Database{prefix: "postgresql", text: text}
	if !utf8.ValidString(text) {
		return d, errNotUTF8
	}
	text = strings.TrimLeft(text, " \t\r\n")
	before, rest, found := strings.Cut(text, "://")
	if !found {
		return d, fmt.Errorf("it has no scheme; write %s", databaseExample)
	}
	dialect, _, _ := strings.Cut(strings.TrimPrefix(before, "db+"), "+")
	if dialect != "postgresql" && dialect != "postgres" {
		if !scheme.MatchString(before) {
			return d, fmt.Errorf("its scheme is invalid; write %s", databaseExample)
		}
		return d, fmt.Errorf("%s:// is not supported, only PostgreSQL is; write %s", before, databaseExample)
	}
	if strings.HasPrefix(before, "db+") {
		d.prefix = "db+postgresql"
	}
	m := databaseForm.FindStringSubmatch("postgresql://" + rest)
	user, password, ipv6, host, port, name, query := m[2], strings.TrimPrefix(m[3], ":"), m[4], m[5], m[6], m[7], m[8]
	d.Hidden = strings.Contains(name, "@") || strings.Contains(strings.TrimPrefix("postgresql://"+rest, m[0]), "@")

	// For SQLAlchemy the host begins after the first @. But no host contains an @,
	// so here the password extends to the last one.
	hostPort := host
	if port != "" {
		hostPort += ":" + port
	}
	if at := strings.LastIndex(hostPort, "@"); at >= 0 {
		password += "@" + hostPort[:at]
		ipv6, host, port = "", hostPort[at+1:], ""
		if inside, found := strings.CutPrefix(host, "["); found {
			if ipv6, port, found = strings.Cut(inside, "]"); !found {
				return d, errHost
			}
			host, port = "", strings.TrimPrefix(port, ":")
		} else {
			host, port, _ = strings.Cut(host, ":")
		}
	}
	d.User, d.Password, d.Name = unquote(user), secret.New(unquote(password)), unquote(name)
	if d.Host, d.Port = ipv6, port; ipv6 == "" {
		// As in libpq. Python does not decode it, and finds no such host.
		d.Host = unquote(host)
	}
	if err := d.readPort(); err != nil {
		return d, err
	}
	if err := d.readQuery(query); err != nil {
		return d, err
	}
	for host := range strings.SplitSeq(d.Host, ",") {
		if !databaseHost.MatchString(host) {
			return d, errHost
		}
	}
	for _, part := range []string{d.User, d.Password.Reveal(), d.Host, d.Name} {
		if strings.Contains(part, "\x00") {
			return d, errors.New("it contains a NUL byte")
		}
	}
	return d, d.checkOptions()
}

// databaseHost matches a name, an address, or the directory of a Unix socket.
var databaseHost = regexp.MustCompile(`^(/.*|[\pL\pN._:%~-]*)$`)

var errHost = errors.New("its host is neither a name nor an address; write %40 for an @ and %5B for a [ in a password")

var errPort = errors.New("its port is not a number from 1 to 65535; write %40 for an @ and %3A for a : in a password or a user's name")

// readPort validates the port after the host. It also accepts libpq's list of hosts
// with ports, h1:p1,h2:p2, which Python does not.
func (d *Database) readPort() error {
	if !strings.Contains(d.Port, ",") {
		return normalPort(&d.Port)
	}
	var hosts, ports []string
	for part := range strings.SplitSeq(d.Host+":"+d.Port, ",") {
		host, port, _ := strings.Cut(part, ":")
		if inside, found := strings.CutPrefix(part, "["); found {
			host, port, _ = strings.Cut(inside, "]")
			port = strings.TrimPrefix(port, ":")
		}
		if err := normalPort(&port); err != nil {
			return err
		}
		hosts, ports = append(hosts, host), append(ports, port)
	}
	d.Host, d.Port = strings.Join(hosts, ","), strings.Join(ports, ",")
	return nil
}

// normalPort rewrites a port as a plain number, or as empty for the default.
func normalPort(port *string) error {
	text := strings.TrimSpace(*port)
	if *port == "" {
		return nil
	}
	if !portForm.MatchString(text) {
		return errPort
	}
	text = strings.TrimLeft(strings.ReplaceAll(strings.TrimPrefix(text, "+"), "_", ""), "0")
	if len(text) > 5 || (len(text) == 5 && text > "65535") {
		return errPort
	}
	*port = text // empty for 0: as in Python, port 0 is no port
	return nil
}

// readQuery parses the query. Its options override the parts before the ?.
func (d *Database) readQuery(query string) error {
	given := map[string][]string{}
	for _, p := range parseQuery(query) {
		given[p.name] = append(given[p.name], p.value)
		if strings.Contains(p.name, "@") {
			d.Hidden = true
		}
	}
	// An unescaped @ is harmless in the value of a known option. Anywhere else it
	// may be the end of a password.
	for part := range strings.SplitSeq(query, "&") {
		name, value, _ := strings.Cut(part, "=")
		if strings.Contains(value, "@") && keywords[unquote(name)].treatment == 0 || strings.Contains(name, "@") {
			d.Hidden = true
		}
	}
	if err := d.readHosts(given["host"], given["port"]); err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(given)) {
		values := given[name]
		if name == "host" || name == "port" {
			continue
		}
		if len(values) > 1 {
			return fmt.Errorf("%s is given twice", showOption(name, d.Hidden))
		}
		if strings.Contains(values[0], "\x00") || strings.Contains(name, "\x00") {
			return errors.New("it contains a NUL byte")
		}
		switch name {
		case "user":
			d.User = values[0]
		case "password":
			d.Password = secret.New(values[0])
		case "dbname", "database":
			d.Name = values[0]
		default:
			if d.Options == nil {
				d.Options = map[string]string{}
			}
			d.Options[name] = values[0]
		}
	}
	return nil
}

// singleHost matches SQLAlchemy's form of an option host that includes a port.
var singleHost = regexp.MustCompile(`^([a-zA-Z0-9\-.]*):([0-9]*)$`)

// readHosts parses the options host and port: either one list in each, or one
// option host=h1:p1 for every host.
func (d *Database) readHosts(hosts, ports []string) error {
	withPorts := len(hosts) > 1
	if len(hosts) == 1 && len(ports) == 0 && singleHost.MatchString(hosts[0]) {
		withPorts = true
	}
	if withPorts && len(ports) > 0 {
		return errors.New("options host and port mix two forms: write host=h1,h2&port=p1,p2 or host=h1:p1&host=h2:p2")
	}
	if withPorts {
		for i, token := range hosts {
			name, port, _ := strings.Cut(token, ":")
			hosts[i] = name
			ports = append(ports, port)
		}
	} else if len(hosts) == 1 {
		hosts = strings.Split(hosts[0], ",")
	}
	if len(ports) == 1 {
		ports = strings.Split(ports[0], ",")
	}
	for i := range ports {
		if err := normalPort(&ports[i]); err != nil {
			return errors.New("option port is not a number from 1 to 65535, or a list of them")
		}
	}
	switch {
	case len(ports) > 1 && len(hosts) == 0, len(ports) > 0 && len(hosts) > 0 && len(ports) != len(hosts):
		return errors.New("options host and port do not have the same number of parts")
	case len(hosts) > 1 && len(ports) == 0:
		ports = make([]string, len(hosts)) // the port before the ? does not apply
	}
	if len(hosts) > 0 {
		d.Host = strings.Join(hosts, ",")
	}
	if joined := strings.Join(ports, ","); joined != "" {
		d.Port = joined
	}
	return nil
}

// IsZero reports whether d is the zero value: no address.
func (d Database) IsZero() bool { return d.prefix == "" }

// Equal reports whether two addresses have the same server, database, user,
// password and options.
func (d Database) Equal(other Database) bool {
	port := func(d Database) string {
		if d.Port == "" {
			return "5432"
		}
		return d.Port
	}
	return d.User == other.User && d.Password == other.Password && d.Host == other.Host && port(d) == port(other) && d.Name == other.Name &&
		maps.Equal(d.Options, other.Options)
}

// Masked is the address with its secrets masked; only the scheme if Hidden.
func (d Database) Masked() string {
	switch {
	case d.IsZero():
		return ""
	case d.Hidden:
		return d.prefix + "://" + secret.Mask
	}
	password := ""
	if !d.Password.IsZero() {
		password = ":" + secret.Mask
	}
	return d.write(d.prefix, password, func(name, value string) string {
		if k := keywords[name]; k.treatment == 0 && !serverParameters[name] || secretOptions[name] {
			return secret.Mask
		}
		return quoteExcept(value, "/:, ")
	})
}

// URL is the whole address, with its secrets. [ParseDatabase] parses it to an equal
// Database.
func (d Database) URL() secret.String {
	switch {
	case d.IsZero():
		return secret.String{}
	case d.Hidden:
		// Rewritten, it would no longer be recognized as ambiguous.
		return secret.New(d.text)
	}
	password := ""
	if !d.Password.IsZero() {
		password = ":" + quote(d.Password.Reveal())
	}
	return secret.New(d.write("postgresql", password, func(_, value string) string { return quote(value) }))
}

// Secrets returns the parts of the address that must not be shown. For a hidden
// address these include the parts that may belong to the password.
func (d Database) Secrets() []string {
	all := []string{d.Password.Reveal()}
	for name, value := range d.Options {
		if secretOptions[name] {
			all = append(all, value)
		}
	}
	if d.Hidden {
		all = append(all, d.Host, d.Name)
	}
	return unique(all...)
}

func (d Database) write(prefix, password string, show func(name, value string) string) string {
	var out strings.Builder
	out.WriteString(prefix + "://")
	if d.User != "" || password != "" {
		out.WriteString(quote(d.User) + password + "@")
	}
	options := maps.Clone(d.Options)
	if options == nil {
		options = map[string]string{}
	}
	if hosts := strings.Count(d.Host, ","); strings.Contains(d.Host, "/") || strings.Contains(d.Port, ",") || (hosts > 0 && strings.Contains(d.Host, ":")) {
		options["host"] = d.Host
		if options["port"] = d.Port; d.Port == "" {
			delete(options, "port")
		} else if !strings.Contains(d.Port, ",") {
			options["port"] += strings.Repeat(","+d.Port, hosts)
		}
	} else {
		host := quoteExcept(d.Host, ",")
		if strings.Contains(d.Host, ":") {
			host = "[" + d.Host + "]"
		}
		out.WriteString(host)
		if d.Port != "" {
			out.WriteString(":" + d.Port)
		}
	}
	if d.Name != "" {
		out.WriteString("/" + quote(d.Name))
	}
	for i, name := range slices.Sorted(maps.Keys(options)) {
		value := show(name, options[name])
		if name == "host" || name == "port" {
			value = quoteExcept(options[name], "/,")
		}
		out.WriteString(separator(i) + quote(name) + "=" + value)
	}
	return out.String()
}

// MaskDatabase masks the secrets in a text for ParseDatabase. Of an invalid or
// ambiguous text it returns only the scheme.
func MaskDatabase(text string) string {
	d, err := ParseDatabase(text)
	if err != nil {
		return SchemeOnly(strings.TrimLeft(text, " \t\r\n"))
	}
	return d.Masked()
}
