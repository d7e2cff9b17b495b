package address

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// treatment is how this program treats a keyword.
type treatment int

const (
	// byDriver: the database driver implements it as libpq does.
	byDriver treatment = iota + 1
	// byStore: package store implements it as libpq does.
	byStore
	// ignored: it has no effect here, which is reported unless the value is
	// harmless.
	ignored
	// refused: it is an error unless the value is harmless, because ignoring it
	// would violate what the operator asked for.
	refused
)

// keyword is a keyword of libpq or of the database driver.
type keyword struct {
	treatment treatment
	// harmless are values, in lower case, that match the behaviour without the
	// option.
	harmless []string
	// why is the reason, and for a refused one the alternative. It continues
	// "option x has no effect: " or "option x is not supported: ".
	why string
	// check, if not nil, returns "" for a valid value, else what it must be.
	check func(value string) string
}

// keywords are all keywords of libpq 18, and those of the driver.
var keywords = map[string]keyword{
	// Server, user and database.
	"service":     {treatment: byDriver},
	"servicefile": {treatment: byDriver},
	"host":        {treatment: byDriver},
	"hostaddr":    {treatment: byStore},
	"port":        {treatment: byDriver},
	"dbname":      {treatment: byDriver},
	"database":    {treatment: byDriver},
	"user":        {treatment: byDriver},
	"password":    {treatment: byDriver},
	"passfile":    {treatment: byDriver},

	// Choice of a server among several.
	"target_session_attrs": {treatment: byDriver, check: oneOf("any", "read-write", "read-only", "primary", "standby", "prefer-standby")},
	"load_balance_hosts":   {treatment: byStore, check: oneOf("disable", "random")},

	// The connection.
	"connect_timeout":     {treatment: byStore, check: number},
	"keepalives":          {treatment: byStore, check: number},
	"keepalives_idle":     {treatment: byStore, check: number},
	"keepalives_interval": {treatment: byStore, check: number},
	"keepalives_count":    {treatment: byStore, check: number},
	"tcp_user_timeout":    {treatment: byStore, check: number},
	"requirepeer":         {treatment: byStore},

	// TLS.
	"sslmode":                  {treatment: byDriver, check: oneOf("disable", "allow", "prefer", "require", "verify-ca", "verify-full")},
	"ssl":                      {treatment: byStore, check: oneOf("true")}, // libpq takes ssl=true, in URLs only, for sslmode=require
	"sslnegotiation":           {treatment: byDriver, check: oneOf("postgres", "direct")},
	"sslcert":                  {treatment: byDriver},
	"sslkey":                   {treatment: byDriver},
	"sslpassword":              {treatment: byDriver},
	"sslcertmode":              {treatment: byDriver, check: oneOf("disable", "allow", "require")},
	"sslrootcert":              {treatment: byDriver},
	"sslsni":                   {treatment: byDriver, check: oneOf("0", "1")},
	"ssl_min_protocol_version": {treatment: byStore, check: tlsVersionName},
	"ssl_max_protocol_version": {treatment: byStore, check: tlsVersionName},
	"sslcrl":                   {treatment: byStore},
	"sslcrldir":                {treatment: byStore},
	"sslcompression":           {treatment: ignored, harmless: []string{"0"}, why: "TLS is never compressed, nor is it in libpq since OpenSSL 1.1"},
	"sslkeylogfile":            {treatment: ignored, why: "the keys of TLS sessions are never written to a file"},

	// Authentication.
	"channel_binding":     {treatment: byDriver, check: oneOf("disable", "prefer", "require")},
	"require_auth":        {treatment: byDriver},
	"gssencmode":          {treatment: refused, harmless: []string{"disable", "prefer"}, why: "GSSAPI is not supported; write gssencmode=prefer, and sslmode=verify-full for an encrypted connection"},
	"krbsrvname":          {treatment: ignored, why: "Kerberos is not supported, only passwords and certificates"},
	"krbspn":              {treatment: ignored, why: "Kerberos is not supported, only passwords and certificates"},
	"gsslib":              {treatment: ignored, why: "Kerberos is not supported, only passwords and certificates"},
	"gssdelegation":       {treatment: ignored, harmless: []string{"0"}, why: "Kerberos is not supported, only passwords and certificates"},
	"scram_client_key":    {treatment: refused, why: "SCRAM keys are not supported; give the password instead"},
	"scram_server_key":    {treatment: refused, why: "SCRAM keys are not supported; give the password instead"},
	"oauth_issuer":        {treatment: ignored, why: "OAuth is not supported, only passwords and certificates"},
	"oauth_client_id":     {treatment: ignored, why: "OAuth is not supported, only passwords and certificates"},
	"oauth_client_secret": {treatment: ignored, why: "OAuth is not supported, only passwords and certificates"},
	"oauth_scope":         {treatment: ignored, why: "OAuth is not supported, only passwords and certificates"},

	// The session.
	"options":                   {treatment: byDriver},
	"application_name":          {treatment: byDriver},
	"fallback_application_name": {treatment: byStore},
	"client_encoding":           {treatment: ignored, harmless: []string{"utf8", "utf-8", "unicode", "auto"}, why: "the client encoding is always UTF-8"},
	"replication":               {treatment: refused, harmless: []string{"false", "off", "no", "0"}, why: "a replication session accepts no SQL statements; remove the option"},
	"min_protocol_version":      {treatment: byDriver, check: oneOf("3.0", "3.2", "latest")},
	"max_protocol_version":      {treatment: byDriver, check: oneOf("3.0", "3.2", "latest")},

	// The driver's keywords.
	"default_query_exec_mode":       {treatment: byDriver, check: oneOf("cache_statement", "cache_describe", "describe_exec", "exec", "simple_protocol")},
	"statement_cache_capacity":      {treatment: byDriver, check: number},
	"description_cache_capacity":    {treatment: byDriver, check: number},
	"pool_max_conns":                {treatment: ignored, why: "the concurrency determines the number of connections"},
	"pool_min_conns":                {treatment: ignored, why: "the concurrency determines the number of connections"},
	"pool_min_idle_conns":           {treatment: ignored, why: "the concurrency determines the number of connections"},
	"pool_max_conn_lifetime":        {treatment: ignored, why: "connections are kept as long as they work"},
	"pool_max_conn_lifetime_jitter": {treatment: ignored, why: "connections are kept as long as they work"},
	"pool_max_conn_idle_time":       {treatment: ignored, why: "connections are kept as long as they work"},
	"pool_health_check_period":      {treatment: ignored, why: "connections are kept as long as they work"},
	"pool_ping_timeout":             {treatment: ignored, why: "connections are kept as long as they work"},
}

// serverParameters are server parameters whose values may be shown. Other names are
// accepted too; the server validates them all.
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

// TLSVersions maps the names of TLS versions in ssl_min_protocol_version and
// ssl_max_protocol_version, in lower case, to their numbers.
var TLSVersions = map[string]uint16{"tlsv1": 0x0301, "tlsv1.1": 0x0302, "tlsv1.2": 0x0303, "tlsv1.3": 0x0304}

func tlsVersionName(value string) string {
	if TLSVersions[strings.ToLower(value)] == 0 {
		return "TLSv1, TLSv1.1, TLSv1.2 or TLSv1.3"
	}
	return ""
}

// CheckOption checks an option of a database address. It returns the reason if the
// option has no effect, else "", and an error if the option is refused or its value
// invalid. Unknown names pass: they may be server parameters, which the server
// validates.
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
	switch k.treatment {
	case ignored:
		return k.why, nil
	case refused:
		return "", fmt.Errorf("option %s is not supported: %s", name, k.why)
	}
	return "", nil
}

// ForDriver reports whether an option is to be passed to the database driver: the
// options that it implements, and server parameters.
func ForDriver(name, value string) bool {
	k, known := keywords[name]
	return !known || k.treatment == byDriver || (name == "client_encoding" && slices.Contains(k.harmless[:3], strings.ToLower(value)))
}

// checkOptions checks all options, and their combination.
func (d *Database) checkOptions() error {
	for _, name := range slices.Sorted(maps.Keys(d.Options)) {
		if _, known := keywords[name]; !known && !optionName.MatchString(name) {
			return errors.New("an option after its ? is not a valid name of an option; write %3F for a ? in a password")
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

// Ignored is an option without effect, and the reason.
type Ignored struct{ Option, Why string }

// Ignored lists the options that have no effect and whose value is not harmless.
func (d Database) Ignored() []Ignored {
	var found []Ignored
	for _, name := range slices.Sorted(maps.Keys(d.Options)) {
		if why, err := CheckOption(name, d.Options[name]); err == nil && why != "" {
			found = append(found, Ignored{name, why})
		}
	}
	return found
}

// Known reports whether a name is a keyword of libpq or the driver.
func Known(name string) bool { _, known := keywords[name]; return known }
