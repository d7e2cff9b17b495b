// Package addresstest generates addresses for tests: in the forms that people
// write, with passwords that contain characters with a meaning in URLs.
package addresstest

import (
	"fmt"
	"math/rand/v2"
	"net/url"
	"strings"
)

// Sample is a generated address.
type Sample struct {
	Text string
	// Words are the parts of its secrets, none of which may be shown.
	Words []string
}

// Generator generates samples, the same ones for the same seed.
type Generator struct {
	rand *rand.Rand
	n    int
}

// New returns a generator for a seed.
func New(seed uint64) *Generator { return &Generator{rand: rand.New(rand.NewPCG(seed, 1))} }

// special are separators between the words of a password: with a meaning in URLs, or
// problematic in texts for other reasons.
var special = []string{
	"@", ":", "/", "?", "#", "%", "[", "]", "^", " ", "+", "&", "=", ";", ",", "\\", "\"", "'", "`", "$", "{", "}", "|", "~", "<", ">", "!", "*", "(", ")",
	"%2", "%zz", "%40", "%25", "ü", "é", "💡", "\t", "//", "://", "@@", "::", "a://",
}

func pick[T any](g *Generator, list []T) T { return list[g.rand.IntN(len(list))] }

// chance is true once in n times.
func (g *Generator) chance(n int) bool { return g.rand.IntN(n) == 0 }

// Password returns a password as it is written in an address (literally, percent-encoded
// by one of the usual functions, or mixed), and the words in it.
func (g *Generator) Password() (written string, words []string) {
	word := func() string {
		g.n++
		w := fmt.Sprintf("%s%04dx", pick(g, []string{"Geheim", "Sesam", "Parole"}), g.n)
		words = append(words, w)
		return w
	}
	plain := word()
	for range g.rand.IntN(3) {
		plain += pick(g, special)
		if !g.chance(4) {
			plain += word()
		}
	}
	if g.chance(8) {
		plain = pick(g, special) + plain
	}
	switch g.rand.IntN(5) {
	case 0:
		return strings.ReplaceAll(url.QueryEscape(plain), "+", "%20"), words
	case 1:
		return url.PathEscape(plain), words
	case 2:
		return strings.ReplaceAll(plain, "@", "%40"), words
	}
	return plain, words
}

var users = []string{"admin", "admin@srv", "us er", "guest", "", "a%40b", "üser", "user-1", "user.name", "%75"}

func (g *Generator) login(s *Sample) string {
	switch {
	case g.chance(12):
		return ""
	case g.chance(12):
		return pick(g, users) + "@"
	}
	password, words := g.Password()
	s.Words = append(s.Words, words...)
	return pick(g, users) + ":" + password + "@"
}

// Broker returns an address of one broker, or now and then of several. Empty
// hosts means hosts of all kinds.
func (g *Generator) Broker(hosts ...string) Sample {
	var s Sample
	s.Text = g.broker(&s, hosts)
	for g.chance(8) {
		s.Text += ";" + g.broker(&s, hosts)
	}
	return s
}

func (g *Generator) broker(s *Sample, hosts []string) string {
	if len(hosts) == 0 {
		hosts = []string{"127.0.0.1", "127.0.0.1:5673", "localhost", "localhost:1", "[::1]", "[::1]:5672", "RabbitMQ", "rabbit_mq:5672", "a.b-c.example:5671", "", ":5679", "host:", "host:0"}
	}
	text := pick(g, []string{"amqp", "amqp", "amqp", "pyamqp", "amqps", "AMQP"}) + "://" + g.login(s) + pick(g, hosts)
	text += pick(g, []string{"", "/", "//", "/prod", "//prod", "/%2F", "/%2Fprod", "/v host", "/v%20host", "/a/b", "/ü", "/%C3%BC", "/%ff", "/a%zz"})
	if g.chance(6) {
		text += pick(g, []string{"?heartbeat=30", "?heartbeat=7.5", "?heartbeat=", "?", "?heartbeat=30&heartbeat=60", "?login_method=PLAIN", "?ssl_check_hostname=true", "#fragment", "?heartbeat=10#x", "?ssl=true"})
	}
	return text
}

// Database returns an address of a database. Empty hosts means hosts of all
// kinds.
func (g *Generator) Database(scheme string, hosts ...string) Sample {
	var s Sample
	if len(hosts) == 0 {
		hosts = []string{"127.0.0.1", "127.0.0.1:5433", "localhost", "[::1]", "[::1]:5432", "DB.example", "api-db:5432", "", ":5433", "h1,h2", "h1,h2:5433", "host:", "host: 5432", "host:0", "host:05432"}
	}
	text := scheme + "://" + g.login(&s) + pick(g, hosts)
	text += pick(g, []string{"", "/", "/db", "/moon mind", "/moon%20mind", "/a/b", "/ü", "/d#b", "/db%3F", "/%ff"})
	if !g.chance(3) {
		return Sample{text, s.Words}
	}
	var options []string
	for range 1 + g.rand.IntN(2) {
		options = append(options, pick(g, []string{
			"sslmode=prefer", "application_name=me", "application_name=m+e", "connect_timeout=5", "keepalives=1&keepalives_idle=30", "options=-csearch_path%3Dpublic",
			"client_encoding=utf8", "sslmode=", "gssencmode=disable", "channel_binding=prefer", "user=other", "user=admin@srv", "dbname=other", "port=5444",
			"target_session_attrs=any", "application_name", "&", "application_name=a%20b", "application_name=x?y",
		}))
	}
	if g.chance(4) {
		password, words := g.Password()
		s.Words = append(s.Words, words...)
		// In a query, & and + have to be written otherwise.
		options = append(options, pick(g, []string{"password=", "sslpassword=", "oauth_client_secret="})+url.QueryEscape(password))
	}
	return Sample{text + "?" + strings.Join(options, "&"), s.Words}
}

// Mutate changes a text a little.
func (g *Generator) Mutate(text string) string {
	runes := []rune(text)
	for range 1 + g.rand.IntN(3) {
		at := g.rand.IntN(len(runes) + 1)
		switch {
		case g.chance(2) || at == len(runes):
			runes = append(runes[:at], append([]rune(pick(g, special)), runes[at:]...)...)
		default:
			runes = append(runes[:at], runes[at+1:]...)
		}
	}
	return string(runes)
}
