package store

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
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/moonladderstudios/mm-orchestrator/internal/address"
)

// dialTime is short, so that a path which is there again is found soon: see
// reachTime. Config.ConnectTimeout also has to do for the handshake.
const dialTime = 2 * time.Second

// connection is how a database is connected to.
type connection struct {
	pool *pgxpool.Config
	// balance puts the hosts of a configuration into another order, for
	// load_balance_hosts.
	balance func(*pgx.ConnConfig)
	place   string
	// ignored are options that have no effect.
	ignored []address.Ignored
}

// newConnection reads an address and honours what libpq would of it: what the
// driver does not know is done here.
func newConnection(d address.Database, config Config) (*connection, error) {
	parsed, err := pgxpool.ParseConfig(driverText(d))
	if err != nil {
		return nil, failure(ErrInvalid, "the database address %s cannot be used: %s", d.Masked(), driverReason(err))
	}
	c := &connection{pool: parsed, balance: func(*pgx.ConnConfig) {}}
	connect := parsed.ConnConfig
	options := maps.Clone(d.Options)
	if options == nil {
		options = map[string]string{}
	}
	// What a service file says arrives among the server's parameters.
	for name, value := range connect.RuntimeParams {
		if address.ForDriver(name, value) {
			continue
		}
		delete(connect.RuntimeParams, name)
		if _, given := options[name]; given {
			continue
		}
		if _, err := address.CheckOption(name, value); err != nil {
			return nil, failure(ErrInvalid, "the service file of database address %s cannot be used: %s", d.Masked(), err)
		}
		options[name] = value
	}
	if connect.KerberosSrvName != "" {
		options["krbsrvname"] = connect.KerberosSrvName
	}
	c.ignored = address.Database{Options: options}.Ignored()

	parsed.MaxConns = int32(config.Connections)
	parsed.MinConns = 0
	parsed.AfterConnect = pinSettings
	connect.ConnectTimeout = config.ConnectTimeout
	if seconds := whole(options["connect_timeout"]); seconds > 0 {
		connect.ConnectTimeout = time.Duration(seconds) * time.Second
	}
	if connect.RuntimeParams["application_name"] == "" {
		connect.RuntimeParams["application_name"] = applicationName(config.Worker)
		if name := options["fallback_application_name"]; name != "" {
			connect.RuntimeParams["application_name"] = name
		}
	}
	if err := c.honourHosts(options); err != nil {
		return nil, err
	}
	if connect.DialFunc, err = dialer(options); err != nil {
		return nil, failure(ErrInvalid, "the database address %s cannot be used: %s", d.Masked(), err)
	}
	if err := honourTLS(connect, options); err != nil {
		return nil, failure(ErrInvalid, "the database address %s cannot be used: %s", d.Masked(), err)
	}
	c.place = place(connect.Host, connect.Port, connect.Database)
	if d.Hidden {
		c.place = d.Masked()
	}
	return c, nil
}

// driverText is an address in the driver's own form, without what it does not
// know.
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

// driverReason is why the driver does not take an address, without the address,
// which its error repeats with a masking of its own.
func driverReason(err error) string {
	var parse *pgconn.ParseConfigError
	if errors.As(err, &parse) {
		if inner := errors.Unwrap(parse); inner != nil {
			return oneLine(inner.Error())
		}
		// "cannot parse `…`: reason"
		if i := strings.LastIndex(parse.Error(), "`: "); i >= 0 {
			return oneLine(parse.Error()[i+3:])
		}
	}
	return "it needs the form postgresql://user:password@host:port/database"
}

// whole reads a number that has been judged before; 0 is none.
func whole(text string) int {
	n, _ := strconv.Atoi(strings.TrimSpace(text))
	return n
}

// honourHosts sees to hostaddr, the addresses of the hosts so that no name has
// to be resolved, and to load_balance_hosts.
func (c *connection) honourHosts(options map[string]string) error {
	connect := c.pool.ConnConfig
	var hosts []string
	all := ways(connect)
	for i, way := range all {
		// Each host stands there once with and once without TLS.
		if i == 0 || !sameHost(all[i-1], way) {
			hosts = append(hosts, way.Host)
		}
	}
	lookup := connect.LookupFunc
	if list := options["hostaddr"]; list != "" {
		addresses := strings.Split(list, ",")
		if len(addresses) != len(hosts) {
			return failure(ErrInvalid, "the database's address has %d hosts, and option hostaddr has %d addresses: give one for each host", len(hosts), len(addresses))
		}
		known := map[string][]string{}
		for i, host := range hosts {
			if addresses[i] == "" {
				continue
			}
			if net.ParseIP(addresses[i]) == nil {
				return failure(ErrInvalid, "option hostaddr of the database's address is no IP address: names belong into the host")
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
		c.balance = shuffleHosts
		c.pool.BeforeConnect = func(_ context.Context, connect *pgx.ConnConfig) error {
			shuffleHosts(connect)
			return nil
		}
	}
	connect.LookupFunc = lookup
	return nil
}

// shuffleHosts puts hosts into a random order, each with all its ways to
// connect, with TLS and without, in the order that sslmode gives them.
func shuffleHosts(connect *pgx.ConnConfig) {
	all := ways(connect)
	var hosts [][]*pgconn.FallbackConfig
	for i, way := range all {
		if i == 0 || !sameHost(all[i-1], way) {
			hosts = append(hosts, nil)
		}
		hosts[len(hosts)-1] = append(hosts[len(hosts)-1], way)
	}
	rand.Shuffle(len(hosts), func(i, j int) { hosts[i], hosts[j] = hosts[j], hosts[i] })
	all = slices.Concat(hosts...)
	connect.Host, connect.Port, connect.TLSConfig, connect.Fallbacks = all[0].Host, all[0].Port, all[0].TLSConfig, all[1:]
}

// ways are everything that the driver tries in turn.
func ways(connect *pgx.ConnConfig) []*pgconn.FallbackConfig {
	return append([]*pgconn.FallbackConfig{{Host: connect.Host, Port: connect.Port, TLSConfig: connect.TLSConfig}}, connect.Fallbacks...)
}

func sameHost(a, b *pgconn.FallbackConfig) bool { return a.Host == b.Host && a.Port == b.Port }

// dialer makes connections with the options of the socket: libpq's keepalives
// and tcp_user_timeout, and requirepeer for a Unix socket.
func dialer(options map[string]string) (pgconn.DialFunc, error) {
	// The driver resolves names itself, so this is one address each time.
	d := &net.Dialer{Timeout: dialTime, KeepAlive: -1}
	if value, given := options["keepalives"]; !given || whole(value) != 0 {
		d.KeepAlive = 0
		d.KeepAliveConfig = net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 15 * time.Second}
		if n := whole(options["keepalives_idle"]); n > 0 {
			d.KeepAliveConfig.Idle = time.Duration(n) * time.Second
		}
		if n := whole(options["keepalives_interval"]); n > 0 {
			d.KeepAliveConfig.Interval = time.Duration(n) * time.Second
		}
		if n := whole(options["keepalives_count"]); n > 0 {
			d.KeepAliveConfig.Count = n
		}
	}
	if n := whole(options["tcp_user_timeout"]); n > 0 {
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

// peerError says that a server is run by another user than option requirepeer
// asks for.
type peerError struct{ got, want string }

func (e *peerError) Error() string {
	return fmt.Sprintf("the server is run by user %q, and option requirepeer asks for %q", e.got, e.want)
}

// place says where a database is, for logs and errors: host, port, name, and
// never the user or the password.
func place(host string, port uint16, database string) string {
	if strings.HasPrefix(host, "/") {
		return host + "/" + database
	}
	return net.JoinHostPort(host, strconv.Itoa(int(port))) + "/" + database
}

// hideAddress keeps what stands in an address with another @ behind its host
// out of an error: it may be a part of the password.
func hideAddress(d address.Database, err error) error {
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
