package address

import (
	"errors"
	"net/url"
	"strings"
)

// ParseServer parses the base address of an HTTP server to which a credential is sent:
// https, or http to this machine only, without a login, a query or a fragment. Slashes at
// the end are removed. Errors do not have the address, in which a credential may be.
func ParseServer(text string) (*url.URL, error) {
	base, err := url.Parse(strings.TrimSpace(text))
	switch {
	case err != nil || base.Host == "" || base.Hostname() == "" || base.Scheme != "https" && base.Scheme != "http":
		return nil, errors.New("it must be an address that begins with https://")
	case base.User != nil:
		return nil, errors.New("it must not have a login: credentials have settings of their own")
	case base.RawQuery != "" || base.ForceQuery || base.Fragment != "":
		return nil, errors.New("it must not have a query or a fragment")
	case base.Scheme == "http" && !IsLoopback(base.Hostname()):
		return nil, errors.New("it must begin with https://, because a token is sent there; http:// is for this machine only")
	}
	base.Path, base.RawPath = strings.TrimRight(base.Path, "/"), ""
	return base, nil
}

// IsLoopback reports whether the host of an address is this machine.
func IsLoopback(host string) bool {
	return host == "localhost" || host == "127.0.0.1" || host == "::1"
}
