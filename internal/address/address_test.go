package address_test

import (
	"bufio"
	"net/url"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/address"
	"github.com/moonladderstudios/mm-orchestrator/internal/address/addresstest"
)

// checkShown checks that masked addresses and errors contain no part of a password,
// however the address is written, and that the masked address is the one to which
// the program connects.
func checkShown(t *testing.T, kind string, sample addresstest.Sample) {
	t.Helper()
	var shown []string
	if kind == "broker" {
		shown = append(shown, address.MaskBrokers(sample.Text))
		brokers, err := address.ParseBrokers(sample.Text)
		if err != nil {
			shown = append(shown, err.Error())
		}
		for _, b := range brokers {
			shown = append(shown, b.Place(), b.Masked())
			if b.Hidden {
				continue
			}
			// With the password inserted, the masked address is the broker's.
			written := strings.Replace(b.Masked(), ":***@", ":"+strings.ReplaceAll(url.QueryEscape(b.Password.Reveal()), "+", "%20")+"@", 1)
			again, err := address.ParseBrokers(written)
			if err != nil || again[0].Masked() != b.Masked() || again[0].Password != b.Password || again[0].Place() != b.Place() {
				t.Errorf("%q became %q, then %v, %v", sample.Text, written, again, err)
			}
		}
	} else {
		shown = append(shown, address.MaskDatabase(sample.Text))
		d, err := address.ParseDatabase(sample.Text)
		if err != nil {
			shown = append(shown, err.Error())
		} else {
			shown = append(shown, d.Masked())
			again, err := address.ParseDatabase(d.URL().Reveal())
			if err != nil || !again.Equal(d) || again.Hidden != d.Hidden {
				t.Errorf("%q became %q, then %v: got %#v, want %#v", sample.Text, d.URL().Reveal(), err, again, d)
			}
		}
	}
	for _, text := range shown {
		for _, word := range sample.Words {
			if strings.Contains(text, word) {
				t.Errorf("%q is shown as %q", sample.Text, text)
			}
		}
	}
}

func TestMaskedAddressesHaveNoPassword(t *testing.T) {
	t.Parallel()
	g := addresstest.New(6)
	for range 5 * rounds {
		checkShown(t, "broker", g.Broker())
		checkShown(t, "database", g.Database("db+postgresql"))
		checkShown(t, "database", g.Database("postgresql"))
	}
}

// FuzzShown is the same test for other seeds. The secrets in its texts are unknown,
// but each address must parse again to the same result.
func FuzzShown(f *testing.F) {
	for _, kind := range []string{"broker", "database"} {
		for _, text := range fixtures(f, kind) {
			f.Add(text, uint64(1))
		}
	}
	f.Fuzz(func(t *testing.T, text string, seed uint64) {
		checkShown(t, "broker", addresstest.Sample{Text: text})
		checkShown(t, "database", addresstest.Sample{Text: text})
		g := addresstest.New(seed)
		checkShown(t, "broker", g.Broker())
		checkShown(t, "database", g.Database("db+postgresql"))
	})
}

func TestMasks(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		mask     func(string) string
		in, want string
	}{
		{address.MaskBrokers, "amqp://guest:guest@rabbitmq:5672//", "amqp://guest:***@rabbitmq:5672//"},
		{address.MaskBrokers, "pyamqp://us er:Geheim 99@h/v h", "pyamqp://us%20er:***@h:5672/v%20h"},
		{address.MaskBrokers, "amqp://a:one@x//;amqp://b:two@y//", "amqp://a:***@x:5672//;amqp://b:***@y:5672//"},
		{address.MaskBrokers, "amqp://a:one@x//;amqp://b:tw;o@y//", "amqp://***"},
		{address.MaskBrokers, "amqp://u:p@h/v?heartbeat=7.5&ssl_ca_certs=/ca.pem", "amqp://u:***@h:5671/v?ssl_ca_certs=/ca.pem&heartbeat=7.5"},
		{address.MaskBrokers, "amqp://u:p/w@h//", "amqp://***"},
		{address.MaskBrokers, "amqp://u:1/w@h//", "amqp://***"},
		{address.MaskBrokers, "amqp://u:p@h/w@x", "amqp://***"},
		{address.MaskBrokers, "redis://:pw@h", "redis://***"},
		{address.MaskBrokers, "pw@h", "***"},
		{address.MaskBrokers, "", ""},
		{address.MaskDatabase, "db+postgresql://admin@srv:Geheim99@db/moonmind?sslmode=require", "db+postgresql://admin%40srv:***@db/moonmind?sslmode=require"},
		{address.MaskDatabase, "postgresql://u:p@ss:w@h:5433/d", "postgresql://u:***@h:5433/d"},
		{address.MaskDatabase, "postgresql://us/er:pw@h/d", "postgresql://***"},
		{address.MaskDatabase, "postgresql:///d?user=u&password=pw&sslpassword=x&host=/run", "postgresql://u:***@/d?host=/run&sslpassword=***"},
		{address.MaskDatabase, "postgresql://u:p@h/d?search_path=a,b&my.key=pw", "postgresql://u:***@h/d?my.key=***&search_path=a,b"},
		{address.MaskDatabase, "postgresql://u:p@h1,h2:5433/d", "postgresql://u:***@h1,h2:5433/d"},
		{address.MaskDatabase, "postgresql://u:p@h1:1,h2:2/d", "postgresql://u:***@/d?host=h1,h2&port=1,2"},
		{address.MaskDatabase, "mysql://u:p@h", "mysql://***"},
		{address.MaskURL, "tcp://docker:2375", "tcp://docker:2375"},
		{address.MaskURL, "http://u:p@h/x?token=abc", "http://u:***@h/x?token=***"},
		{address.MaskURL, "http://u:p/q@h/", "http://***"},
		{address.MaskNamedURLs, "api=http://api:5000/h,web=http://u:p@web/", "api=http://api:5000/h,web=http://u:***@web/"},
		{address.MaskNamedURLs, "web=http://u:,x://p@web/", "***"},
	} {
		if got := tt.mask(tt.in); got != tt.want {
			t.Errorf("%q is shown as %q, want %q", tt.in, got, tt.want)
		}
	}
}

func TestBrokerOptions(t *testing.T) {
	t.Parallel()
	brokers, err := address.ParseBrokers("pyamqp://us%40er:p%2Fw%3A%20%2B@One:1//; amqps://two/v%2Fh?ssl_ca_certs=/ca.pem&ssl_cert_reqs=CERT_REQUIRED&heartbeat=30; ;")
	if err != nil {
		t.Fatal(err)
	}
	if b := brokers[1]; b.CAFile != "/ca.pem" || b.Heartbeat != 30*time.Second || !b.TLS {
		t.Errorf("options: %+v", b)
	}
	var shown []string
	for _, b := range brokers {
		shown = append(shown, b.Masked())
	}
	if want := []string{"pyamqp://us%40er:***@one:1//", "amqps://guest:***@two:1/v/h?ssl_ca_certs=/ca.pem&heartbeat=30"}; !reflect.DeepEqual(shown, want) {
		t.Errorf("got %q\nwant %q", shown, want)
	}
}

func TestRefusedAddresses(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"":                                     "no broker is named",
		" ; ":                                  "no broker is named",
		"rabbitmq":                             "no scheme",
		"redis://redis":                        "not supported",
		"amqp://h:99999":                       "not a number up to",
		"amqp://::1":                           "brackets",
		"amqp://[::1":                          "of the form [address]:port",
		"amqp://u:p#w@h":                       "%23",
		"amqp://h?ssl_cert_reqs=CERT_NONE":     "always checked",
		"amqp://h?ssl_check_hostname=false":    "always checked",
		"amqp://h?ssl=false":                   "write amqps://",
		"amqp://h?heartbeat=x":                 "number of seconds",
		"amqps://h?ssl_certfile=/x":            "need each other",
		"amqp://h?surprise=1":                  "option surprise is not supported",
		"amqp://h?login_method=EXTERNAL":       "must be PLAIN",
		"amqp://h/" + strings.Repeat("v", 256): "longer than 255",
		"postgresql://h?gssencmode=require":    "gssencmode=prefer",
		"postgresql://h?replication=database":  "remove the option",
		"postgresql://h?scram_client_key=x":    "give the password",
		"postgresql://h?sslmode=always":        "option sslmode must be disable, allow",
		"postgresql://h?keepalives_idle=x":     "option keepalives_idle must be a whole number",
		"postgresql://h?sslmode=a&sslmode=b":   "given twice",
		"postgresql://h:x/d":                   "its port",
		"postgresql://h:65536/d":               "its port",
		"postgresql://?host=h1&port=1,2":       "same number of parts",
		"db+mysql://h/d":                       "only PostgreSQL",
		"postgresql://h?ssl_min_protocol_version=TLSv1.3&ssl_max_protocol_version=TLSv1.2": "above",
	} {
		_, err := address.ParseBrokers(text)
		if strings.Contains(text, "sql://") {
			_, err = address.ParseDatabase(text)
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want %q", text, err, want)
		}
	}
}

// libpq18 returns the keywords of libpq 18.
func libpq18(t testing.TB) []string {
	t.Helper()
	file, err := os.Open("testdata/libpq_18_keywords.txt")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	var found []string
	for lines := bufio.NewScanner(file); lines.Scan(); {
		if line := lines.Text(); line != "" && !strings.HasPrefix(line, "#") {
			found = append(found, line)
		}
	}
	return found
}

func TestAllKeywordsOfLibpqAreKnown(t *testing.T) {
	t.Parallel()
	list := libpq18(t)
	if len(list) < 50 {
		t.Fatalf("only %d keywords", len(list))
	}
	for _, keyword := range list {
		if !address.Known(keyword) {
			t.Errorf("keyword %s is not in the table", keyword)
		}
	}
}

func TestIgnoredOptions(t *testing.T) {
	t.Parallel()
	d, err := address.ParseDatabase("postgresql://h?sslcompression=1&krbsrvname=postgres&client_encoding=utf8&gssencmode=prefer&keepalives=1")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, ignored := range d.Ignored() {
		if ignored.Why == "" {
			t.Errorf("%s: no reason", ignored.Option)
		}
		names = append(names, ignored.Option)
	}
	if want := []string{"krbsrvname", "sslcompression"}; !reflect.DeepEqual(names, want) {
		t.Errorf("got %q, want %q", names, want)
	}
}

func TestLoginsFindsEverySpelling(t *testing.T) {
	t.Parallel()
	g := addresstest.New(3)
	for range 2 * rounds {
		for _, s := range []addresstest.Sample{g.Broker(), g.Database("postgresql")} {
			var all strings.Builder
			for _, login := range address.Logins(s.Text) {
				all.WriteString(login.Password + "\n")
			}
			for _, word := range s.Words {
				if !strings.Contains(all.String(), word) {
					t.Errorf("%q: nothing of %s in %q", s.Text, word, all.String())
				}
			}
		}
	}
}
