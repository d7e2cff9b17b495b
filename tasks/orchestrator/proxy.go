package orchestrator

import (
	"net"
	"net/url"
	"strings"
)

// proxies are the proxy variables of an environment as httpx reads them
// (docs/moonmind.md#verify). Unlike Go's package http, httpx prefers lower-case
// names, honours ALL_PROXY, and does not treat localhost specially. An entry of
// NO_PROXY is a host, a domain with its subdomains, or a whole origin, never a
// network.
type proxies struct {
	byScheme map[string]*url.URL
	except   []exception
}

// exception is an entry of NO_PROXY.
type exception struct {
	// scheme is "" for every scheme, port "" for every port.
	scheme string
	host   string
	port   string
	// subdomains says that the entry covers those of host; notHost says that it
	// does not cover host itself.
	subdomains, notHost bool
}

func newProxies(environ []string) proxies {
	p := proxies{byScheme: map[string]*url.URL{}}
	none := proxyVariable(environ, "no")
	for entry := range strings.SplitSeq(none, ",") {
		entry = strings.TrimSpace(entry)
		if entry == "*" {
			return proxies{}
		}
		if entry != "" {
			p.except = append(p.except, parseException(entry))
		}
	}
	for _, scheme := range []string{"http", "https", "all"} {
		text := proxyVariable(environ, scheme)
		if text == "" {
			continue
		}
		if !strings.Contains(text, "://") {
			text = "http://" + text
		}
		if proxy, err := url.Parse(text); err == nil {
			p.byScheme[scheme] = proxy
		}
	}
	return p
}

// proxyVariable returns the value of name_proxy in lower case, else in any other
// case.
func proxyVariable(environ []string, name string) string {
	name += "_proxy"
	value := ""
	for _, variable := range environ {
		key, text, _ := strings.Cut(variable, "=")
		if key == name {
			return text
		}
		if strings.EqualFold(key, name) {
			value = text
		}
	}
	return value
}

func parseException(entry string) exception {
	var e exception
	if scheme, rest, found := strings.Cut(entry, "://"); found {
		e.scheme, entry = strings.ToLower(scheme), rest
		if e.scheme == "all" {
			e.scheme = ""
		}
	}
	host := strings.ToLower(entry)
	if ip := net.ParseIP(strings.Trim(host, "[]")); ip != nil {
		e.host = strings.Trim(host, "[]")
		return e
	}
	host, _, _ = strings.Cut(host, "/")
	if name, port, err := net.SplitHostPort(host); err == nil {
		host, e.port = name, port
	}
	e.host = host
	switch {
	case e.scheme != "" || net.ParseIP(host) != nil || host == "localhost":
	case strings.HasPrefix(host, "."):
		e.host, e.subdomains, e.notHost = host[1:], true, true
	default:
		e.subdomains = true
	}
	return e
}

func (e exception) covers(target httpxURL) bool {
	if e.scheme != "" && e.scheme != target.scheme {
		return false
	}
	if e.port != "" && e.port != target.port {
		return false
	}
	if e.subdomains && strings.HasSuffix(target.host, "."+e.host) {
		return true
	}
	return !e.notHost && target.host == e.host
}

// proxyOf returns the proxy for a URL, nil for none.
func (p proxies) proxyOf(target httpxURL) *url.URL {
	for _, e := range p.except {
		if e.covers(target) {
			return nil
		}
	}
	if proxy := p.byScheme[target.scheme]; proxy != nil {
		return proxy
	}
	return p.byScheme["all"]
}
