package database

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/moonladderstudios/mm-orchestrator/internal/address"
)

// dialTimeout bounds one TCP connection. It is short, so that a network that works
// again is noticed soon. Options.ConnectTimeout also covers the handshake.
const dialTimeout = 2 * time.Second

// Connection is how to connect to a database.
type Connection struct {
	// Pool is the configuration of the driver.
	Pool *pgxpool.Config
	// Balance puts the hosts of a configuration into random order if
	// load_balance_hosts asks for it.
	Balance func(*pgx.ConnConfig)
	// Place is host, port and name of the database, without user and password.
	Place string
	// Ignored are options that have no effect.
	Ignored []address.Ignored

	// unprepared: connections that Pool opens from now on prepare no statements.
	unprepared atomic.Bool
}

// Options are what a program adds to an address.
type Options struct {
	// ApplicationName is the name in pg_stat_activity, unless the address has one.
	ApplicationName string
	// Connections is the most connections that are open at the same time.
	Connections int
	// ConnectTimeout bounds one attempt to connect, unless the address says
	// otherwise by connect_timeout.
	ConnectTimeout time.Duration
}

// NewConnection turns an address into a configuration of the driver. Options of
// libpq that the driver does not know are applied here.
func NewConnection(d address.Database, config Options) (*Connection, error) {
	d.Options = withoutTLS(d.Options)
	parsed, err := pgxpool.ParseConfig(driverText(d))
	if err != nil {
		return nil, Failure(ErrInvalid, "the database address %s cannot be used: %s", d.Masked(), driverReason(err))
	}
	c := &Connection{Pool: parsed, Balance: func(*pgx.ConnConfig) {}}
	connect := parsed.ConnConfig
	options := maps.Clone(d.Options)
	if options == nil {
		options = map[string]string{}
	}
	// The driver takes options of a service file for parameters of the server.
	for name, value := range connect.RuntimeParams {
		if address.ForDriver(name, value) {
			continue
		}
		delete(connect.RuntimeParams, name)
		if _, given := options[name]; given {
			continue
		}
		if _, err := address.CheckOption(name, value); err != nil {
			return nil, Failure(ErrInvalid, "the service file of database address %s cannot be used: %s", d.Masked(), err)
		}
		options[name] = value
	}
	if connect.KerberosSrvName != "" {
		options["krbsrvname"] = connect.KerberosSrvName
	}
	c.Ignored = address.Database{Options: options}.Ignored()

	parsed.MaxConns = int32(config.Connections)
	parsed.MinConns = 0
	parsed.AfterConnect = pinSettings
	parsed.BeforeConnect = func(_ context.Context, connect *pgx.ConnConfig) error {
		if c.unprepared.Load() {
			connect.DefaultQueryExecMode = pgx.QueryExecModeExec
		}
		c.Balance(connect)
		return nil
	}
	connect.ConnectTimeout = config.ConnectTimeout
	if seconds := parsedInt(options["connect_timeout"]); seconds > 0 {
		connect.ConnectTimeout = time.Duration(seconds) * time.Second
	}
	if connect.RuntimeParams["application_name"] == "" {
		connect.RuntimeParams["application_name"] = config.ApplicationName
		if name := options["fallback_application_name"]; name != "" {
			connect.RuntimeParams["application_name"] = name
		}
	}
	if err := c.applyHosts(options); err != nil {
		return nil, err
	}
	if connect.DialFunc, err = dialer(options); err != nil {
		return nil, Failure(ErrInvalid, "the database address %s cannot be used: %s", d.Masked(), err)
	}
	if err := applyTLS(connect, options); err != nil {
		return nil, Failure(ErrInvalid, "the database address %s cannot be used: %s", d.Masked(), err)
	}
	c.Place = Place(connect.Host, connect.Port, connect.Database)
	if d.Hidden {
		c.Place = d.Masked()
	}
	return c, nil
}

// withoutTLS leaves out the files that TLS needs if there is to be none: libpq does not
// look for them then.
func withoutTLS(options map[string]string) map[string]string {
	if options["sslmode"] != "disable" {
		return options
	}
	options = maps.Clone(options)
	maps.DeleteFunc(options, func(name, value string) bool {
		return slices.Contains([]string{"sslrootcert", "sslcert", "sslkey", "sslcrl", "sslcrldir"}, name) && value != "system"
	})
	return options
}

// driverText is an address in the driver's key=value form, without the options
// that the driver does not know.
func driverText(d address.Database) string {
	var out strings.Builder
	add := func(name, value string) {
		if value != "" {
			value = strings.ReplaceAll(strings.ReplaceAll(value, `\`, `\\`), `'`, `\'`)
			fmt.Fprintf(&out, "%s='%s' ", name, value)
		}
	}
	host := d.Host
	if host == "" {
		host = d.Options["hostaddr"]
	}
	add("host", host)
	add("port", d.Port)
	add("user", d.User)
	add("password", d.Password.Reveal())
	add("dbname", d.Name)
	for _, name := range slices.Sorted(maps.Keys(d.Options)) {
		if address.ForDriver(name, d.Options[name]) {
			add(name, d.Options[name])
		}
	}
	if d.Options["ssl"] == "true" && d.Options["sslmode"] == "" {
		add("sslmode", "require")
	}
	return out.String()
}

// driverReason is the reason in an error of the driver about an address. The error
// itself repeats the address, masked in the driver's own way, which may show a
// part of the password.
func driverReason(err error) string {
	var parse *pgconn.ParseConfigError
	if errors.As(err, &parse) {
		if inner := errors.Unwrap(parse); inner != nil {
			return OneLine(inner.Error())
		}
		// "cannot parse `…`: reason"
		if i := strings.LastIndex(parse.Error(), "`: "); i >= 0 {
			return OneLine(parse.Error()[i+3:])
		}
	}
	return "it needs the form postgresql://user:password@host:port/database"
}

// parsedInt parses a number that was validated before; 0 if there is none.
func parsedInt(text string) int {
	n, _ := strconv.Atoi(strings.TrimSpace(text))
	return n
}

// applyHosts applies hostaddr, the IP addresses of the hosts, and
// load_balance_hosts.
func (c *Connection) applyHosts(options map[string]string) error {
	connect := c.Pool.ConnConfig
	var hosts []string
	all := destinations(connect)
	for i, destination := range all {
		// A host may be there twice, with and without TLS.
		if i == 0 || !sameHost(all[i-1], destination) {
			hosts = append(hosts, destination.Host)
		}
	}
	lookup := connect.LookupFunc
	if list := options["hostaddr"]; list != "" {
		addresses := strings.Split(list, ",")
		if len(addresses) != len(hosts) {
			return Failure(ErrInvalid, "the database's address has %d hosts, and option hostaddr has %d addresses: give one for each host", len(hosts), len(addresses))
		}
		known := map[string][]string{}
		for i, host := range hosts {
			if addresses[i] == "" {
				continue
			}
			if net.ParseIP(addresses[i]) == nil {
				return Failure(ErrInvalid, "option hostaddr of the database's address is no IP address: names belong into the host")
			}
			known[host] = append(known[host], addresses[i])
		}
		byName := lookup
		lookup = func(ctx context.Context, host string) ([]string, error) {
			if found := known[host]; len(found) > 0 {
				return found, nil
			}
			return byName(ctx, host)
		}
	}
	if options["load_balance_hosts"] == "random" {
		inOrder := lookup
		lookup = func(ctx context.Context, host string) ([]string, error) {
			found, err := inOrder(ctx, host)
			found = slices.Clone(found)
			rand.Shuffle(len(found), func(i, j int) { found[i], found[j] = found[j], found[i] })
			return found, err
		}
		c.Balance = shuffleHosts
	}
	connect.LookupFunc = lookup
	return nil
}

// shuffleHosts puts the hosts into random order. The destinations of one host, with
// and without TLS, stay together in the order that sslmode gives them.
func shuffleHosts(connect *pgx.ConnConfig) {
	all := destinations(connect)
	var hosts [][]*pgconn.FallbackConfig
	for i, destination := range all {
		if i == 0 || !sameHost(all[i-1], destination) {
			hosts = append(hosts, nil)
		}
		hosts[len(hosts)-1] = append(hosts[len(hosts)-1], destination)
	}
	rand.Shuffle(len(hosts), func(i, j int) { hosts[i], hosts[j] = hosts[j], hosts[i] })
	all = slices.Concat(hosts...)
	connect.Host, connect.Port, connect.TLSConfig, connect.Fallbacks = all[0].Host, all[0].Port, all[0].TLSConfig, all[1:]
}

// destinations are all that the driver tries, in its order.
func destinations(connect *pgx.ConnConfig) []*pgconn.FallbackConfig {
	return append([]*pgconn.FallbackConfig{{Host: connect.Host, Port: connect.Port, TLSConfig: connect.TLSConfig}}, connect.Fallbacks...)
}

func sameHost(a, b *pgconn.FallbackConfig) bool { return a.Host == b.Host && a.Port == b.Port }

// dialer returns a dial function that applies libpq's options of the socket:
// keepalives, tcp_user_timeout, and requirepeer for a Unix socket.
func dialer(options map[string]string) (pgconn.DialFunc, error) {
	// The driver resolves names, so the dialer gets one IP address.
	d := &net.Dialer{Timeout: dialTimeout, KeepAlive: -1}
	if value, given := options["keepalives"]; !given || parsedInt(value) != 0 {
		d.KeepAlive = 0
		d.KeepAliveConfig = net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 15 * time.Second}
		if n := parsedInt(options["keepalives_idle"]); n > 0 {
			d.KeepAliveConfig.Idle = time.Duration(n) * time.Second
		}
		if n := parsedInt(options["keepalives_interval"]); n > 0 {
			d.KeepAliveConfig.Interval = time.Duration(n) * time.Second
		}
		if n := parsedInt(options["keepalives_count"]); n > 0 {
			d.KeepAliveConfig.Count = n
		}
	}
	if n := parsedInt(options["tcp_user_timeout"]); n > 0 {
		d.Control = userTimeout(n)
	}
	peer := options["requirepeer"]
	if peer == "" {
		return d.DialContext, nil
	}
	if peerName == nil {
		return nil, errors.New("option requirepeer needs Linux")
	}
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := d.DialContext(ctx, network, address)
		unix, isUnix := conn.(*net.UnixConn)
		if err != nil || !isUnix {
			return conn, err
		}
		name, err := peerName(unix)
		if err == nil && name != peer {
			err = &peerError{got: name, want: peer}
		}
		if err != nil {
			_ = conn.Close()
			return nil, err
		}
		return conn, nil
	}, nil
}

// peerError says that the server's user is not that of option requirepeer.
type peerError struct{ got, want string }

func (e *peerError) Error() string {
	return fmt.Sprintf("the server is run by user %q, and option requirepeer asks for %q", e.got, e.want)
}

// Place is host, port and name of a database, for logs and errors. It has neither
// user nor password.
func Place(host string, port uint16, database string) string {
	if strings.HasPrefix(host, "/") {
		return host + "/" + database
	}
	return net.JoinHostPort(host, strconv.Itoa(int(port))) + "/" + database
}

// HideAddress keeps the host of an address out of an error if another @ follows
// it: what looks like the host may then be a part of the password.
func HideAddress(d address.Database, err error) error {
	var own *Error
	if !d.Hidden || !errors.As(err, &own) {
		return err
	}
	why := "it cannot be reached"
	if own.Kind != ErrUnavailable {
		why = "it refuses"
	}
	return &Error{Kind: own.Kind, Code: own.Code,
		text: fmt.Sprintf("cannot connect to the database %s: %s; its address has an @ behind its host, so that no more is shown: write %%40 for an @, %%2F for a / in a password", d.Masked(), why)}
}
