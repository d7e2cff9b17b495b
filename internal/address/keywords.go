package address

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// treatment says what becomes of a keyword.
type treatment int

const (
	// byDriver: the database driver does what libpq does.
	byDriver treatment = iota + 1
	// byStore: package store does what libpq does.
	byStore
	// mayBeIgnored: it has no effect here, which is said wherever that can make
	// a difference.
	mayBeIgnored
	// mayBeRefused: to go on without it would not be what was asked for.
	mayBeRefused
)

// keyword is one of libpq's, or of the driver's own.
type keyword struct {
	does treatment
	// harmless are values, in lower case, that ask for what is done anyway.
	harmless []string
	// why says why it has no effect, or how to do without it, as the end of
	// "option x has no effect: …" and "option x is not supported: …".
	why string
	// check judges a value, if given: what it should be, or "".
	check func(value string) string
}

// keywords are all of libpq 18, and a few of the driver's.
var keywords = map[string]keyword{
	// Where, and as whom.
	"service":     {does: byDriver},
	"servicefile": {does: byDriver},
	"host":        {does: byDriver},
	"hostaddr":    {does: byStore},
	"port":        {does: byDriver},
	"dbname":      {does: byDriver},
	"database":    {does: byDriver},
	"user":        {does: byDriver},
	"password":    {does: byDriver},
	"passfile":    {does: byDriver},

	// Which server of several.
	"target_session_attrs": {does: byDriver, check: oneOf("any", "read-write", "read-only", "primary", "standby", "prefer-standby")},
	"load_balance_hosts":   {does: byStore, check: oneOf("disable", "random")},

	// The connection.
	"connect_timeout":     {does: byStore, check: number},
	"keepalives":          {does: byStore, check: number},
	"keepalives_idle":     {does: byStore, check: number},
	"keepalives_interval": {does: byStore, check: number},
	"keepalives_count":    {does: byStore, check: number},
	"tcp_user_timeout":    {does: byStore, check: number},
	"requirepeer":         {does: byStore},

	// TLS.
	"sslmode":                  {does: byDriver, check: oneOf("disable", "allow", "prefer", "require", "verify-ca", "verify-full")},
	"ssl":                      {does: byStore, check: oneOf("true")}, // libpq takes ssl=true, in URLs only, for sslmode=require
	"sslnegotiation":           {does: byDriver, check: oneOf("postgres", "direct")},
	"sslcert":                  {does: byDriver},
	"sslkey":                   {does: byDriver},
	"sslpassword":              {does: byDriver},
	"sslcertmode":              {does: byDriver, check: oneOf("disable", "allow", "require")},
	"sslrootcert":              {does: byDriver},
	"sslsni":                   {does: byDriver, check: oneOf("0", "1")},
	"ssl_min_protocol_version": {does: byStore, check: tlsVersionName},
	"ssl_max_protocol_version": {does: byStore, check: tlsVersionName},
	"sslcrl":                   {does: byStore},
	"sslcrldir":                {does: byStore},
	"sslcompression":           {does: mayBeIgnored, harmless: []string{"0"}, why: "TLS is never compressed, with libpq neither since OpenSSL 1.1"},
	"sslkeylogfile":            {does: mayBeIgnored, why: "the keys of a TLS session are written nowhere"},

	// How to prove who one is.
	"channel_binding":     {does: byDriver, check: oneOf("disable", "prefer", "require")},
	"require_auth":        {does: byDriver},
	"gssencmode":          {does: mayBeRefused, harmless: []string{"disable", "prefer"}, why: "there is no GSSAPI here; write gssencmode=prefer, and sslmode=verify-full for an encrypted connection"},
	"krbsrvname":          {does: mayBeIgnored, why: "there is no login by Kerberos here, only by password or certificate"},
	"krbspn":              {does: mayBeIgnored, why: "there is no login by Kerberos here, only by password or certificate"},
	"gsslib":              {does: mayBeIgnored, why: "there is no login by Kerberos here, only by password or certificate"},
	"gssdelegation":       {does: mayBeIgnored, harmless: []string{"0"}, why: "there is no login by Kerberos here, only by password or certificate"},
	"scram_client_key":    {does: mayBeRefused, why: "there is no login by SCRAM keys here; give the password instead"},
	"scram_server_key":    {does: mayBeRefused, why: "there is no login by SCRAM keys here; give the password instead"},
	"oauth_issuer":        {does: mayBeIgnored, why: "there is no login by OAuth here, only by password or certificate"},
	"oauth_client_id":     {does: mayBeIgnored, why: "there is no login by OAuth here, only by password or certificate"},
	"oauth_client_secret": {does: mayBeIgnored, why: "there is no login by OAuth here, only by password or certificate"},
	"oauth_scope":         {does: mayBeIgnored, why: "there is no login by OAuth here, only by password or certificate"},

	// The session.
	"options":                   {does: byDriver},
	"application_name":          {does: byDriver},
	"fallback_application_name": {does: byStore},
	"client_encoding":           {does: mayBeIgnored, harmless: []string{"utf8", "utf-8", "unicode", "auto"}, why: "texts are exchanged as UTF-8"},
	"replication":               {does: mayBeRefused, harmless: []string{"false", "off", "no", "0"}, why: "a session for replication takes no statements; leave it out"},
	"min_protocol_version":      {does: byDriver, check: oneOf("3.0", "3.2", "latest")},
	"max_protocol_version":      {does: byDriver, check: oneOf("3.0", "3.2", "latest")},

	// The driver's own.
	"default_query_exec_mode":       {does: byDriver, check: oneOf("cache_statement", "cache_describe", "describe_exec", "exec", "simple_protocol")},
	"statement_cache_capacity":      {does: byDriver, check: number},
	"description_cache_capacity":    {does: byDriver, check: number},
	"pool_max_conns":                {does: mayBeIgnored, why: "the number of connections follows the concurrency"},
	"pool_min_conns":                {does: mayBeIgnored, why: "the number of connections follows the concurrency"},
	"pool_min_idle_conns":           {does: mayBeIgnored, why: "the number of connections follows the concurrency"},
	"pool_max_conn_lifetime":        {does: mayBeIgnored, why: "connections are kept as long as they work"},
	"pool_max_conn_lifetime_jitter": {does: mayBeIgnored, why: "connections are kept as long as they work"},
	"pool_max_conn_idle_time":       {does: mayBeIgnored, why: "connections are kept as long as they work"},
	"pool_health_check_period":      {does: mayBeIgnored, why: "connections are kept as long as they work"},
	"pool_ping_timeout":             {does: mayBeIgnored, why: "connections are kept as long as they work"},
}

// serverParameters are parameters of the server whose values may be shown. It
// takes others too, and judges all.
var serverParameters = map[string]bool{
	"search_path": true, "statement_timeout": true, "lock_timeout": true, "idle_in_transaction_session_timeout": true,
	"timezone": true, "TimeZone": true, "datestyle": true, "DateStyle": true, "role": true,
}

func oneOf(values ...string) func(string) string {
	return func(value string) string {
		if slices.Contains(values, value) {
			return ""
		}
		if len(values) == 1 {
			return values[0]
		}
		return strings.Join(values[:len(values)-1], ", ") + " or " + values[len(values)-1]
	}
}

func number(value string) string {
	if _, err := strconv.ParseInt(strings.TrimSpace(value), 10, 32); err != nil {
		return "a whole number"
	}
	return ""
}

// TLSVersions are the names of TLS versions in ssl_min_protocol_version and
// ssl_max_protocol_version, in lower case, with their numbers.
var TLSVersions = map[string]uint16{"tlsv1": 0x0301, "tlsv1.1": 0x0302, "tlsv1.2": 0x0303, "tlsv1.3": 0x0304}

func tlsVersionName(value string) string {
	if TLSVersions[strings.ToLower(value)] == 0 {
		return "TLSv1, TLSv1.1, TLSv1.2 or TLSv1.3"
	}
	return ""
}

// CheckOption judges one option of a database's address: why it has no effect,
// or "", or what to do about it. A name that is not known may be that of a
// parameter, which the server judges.
func CheckOption(name, value string) (noEffect string, err error) {
	k, known := keywords[name]
	switch {
	case !known || slices.Contains(k.harmless, strings.ToLower(value)):
		return "", nil
	case k.check != nil:
		if want := k.check(value); want != "" {
			return "", fmt.Errorf("option %s must be %s", name, want)
		}
	}
	switch k.does {
	case mayBeIgnored:
		return k.why, nil
	case mayBeRefused:
		return "", fmt.Errorf("option %s is not supported: %s", name, k.why)
	}
	return "", nil
}

// ForDriver says that the database driver is to see an option: those that it
// knows, and parameters of the server.
func ForDriver(name, value string) bool {
	k, known := keywords[name]
	return !known || k.does == byDriver || (name == "client_encoding" && slices.Contains(k.harmless[:3], strings.ToLower(value)))
}

// checkOptions judges all options, and what they say together.
func (d *Database) checkOptions() error {
	for _, name := range slices.Sorted(maps.Keys(d.Options)) {
		if _, known := keywords[name]; !known && !optionName.MatchString(name) {
			return errors.New("an option behind its ? has no name that PostgreSQL could know; write %3F for a ? in a password")
		}
		if _, err := CheckOption(name, d.Options[name]); err != nil {
			return err
		}
	}
	oldest, newest := TLSVersions[strings.ToLower(d.Options["ssl_min_protocol_version"])], TLSVersions[strings.ToLower(d.Options["ssl_max_protocol_version"])]
	if newest != 0 && oldest > newest {
		return errors.New("option ssl_min_protocol_version is above ssl_max_protocol_version")
	}
	return nil
}

// Ignored is an option that has no effect.
type Ignored struct{ Option, Why string }

// Ignored lists the options that have no effect, where that can make a
// difference.
func (d Database) Ignored() []Ignored {
	var found []Ignored
	for _, name := range slices.Sorted(maps.Keys(d.Options)) {
		if why, err := CheckOption(name, d.Options[name]); err == nil && why != "" {
			found = append(found, Ignored{name, why})
		}
	}
	return found
}

// Known says that a name is one of the table's.
func Known(name string) bool { _, known := keywords[name]; return known }
