package artifacts_test

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf16"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
)

type vectors struct {
	Names map[string]bool `json:"env_name_is_sensitive"`
	Texts []struct {
		Secrets  []string `json:"secrets"`
		Text     string   `json:"text"`
		Scrubbed string   `json:"scrubbed"`
	} `json:"scrubbing"`
}

func readVectors(t testing.TB) vectors {
	t.Helper()
	data, err := os.ReadFile("testdata/redaction_vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	var v vectors
	if err := json.Unmarshal(data, &v); err != nil {
		t.Fatal(err)
	}
	return v
}

func TestNamesOfMoonMindAreSensitive(t *testing.T) {
	t.Parallel()
	for name, sensitive := range readVectors(t).Names {
		if got := artifacts.NewRedactor([]string{name + "=hush-hush"}).String("it is hush-hush"); sensitive && got != "it is ***" {
			t.Errorf("%s: %q", name, got)
		}
	}
}

// Names that MoonMind misses, and names that only look like them.
func TestNames(t *testing.T) {
	t.Parallel()
	for names, sensitive := range map[string]bool{
		"PGPASSWORD MYSQL_PWD DB_PASS PASSWD DB_PASSWD GITHUB_PAT API_KEYS APIKEY MYAPIKEY apiKey clientSecret accessToken SSH_PASSPHRASE SIGNING SESSION_COOKIE SECRETS " +
			"AUTHORIZATION AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN SSH_PRIVATE_KEY GHTOKEN SLACK_WEBHOOK_URL JWT_SIGNING SMTP_CREDENTIALS": true,
		"PWD OLDPWD MONKEY TOKENIZER OAUTH2 GOOGLE_APPLICATION_CREDENTIALS CELERY_BROKER_URL PATH PASSENGER AWS_REGION PATTERN COMPASS TURKEYS DB_PASS_FILE SIGNING_PATH": false,
	} {
		for name := range strings.FieldsSeq(names) {
			got := artifacts.NewRedactor([]string{name + "=hush-hush"}).String("it is hush-hush")
			if want := map[bool]string{true: "it is ***", false: "it is hush-hush"}[sensitive]; got != want {
				t.Errorf("%s: %q, want %q", name, got, want)
			}
		}
	}
	// The added names do not mask words and numbers that say nothing.
	r := artifacts.NewRedactor([]string{"DB_PASS=true", "MAX_PASS=3", "USE_JWT=disabled"})
	if got := r.String("true 3 disabled"); got != "true 3 disabled" {
		t.Errorf("%q", got)
	}
}

func TestTextsAreScrubbedAsMoonMindDoes(t *testing.T) {
	t.Parallel()
	for _, vector := range readVectors(t).Texts {
		var environ []string
		for i, secret := range vector.Secrets {
			environ = append(environ, strings.Repeat("A", i)+"_TOKEN="+secret)
		}
		r := artifacts.NewRedactor(environ)
		if got := r.String(vector.Text); got != vector.Scrubbed {
			t.Errorf("%q of %q: %q, want %q", vector.Text, vector.Secrets, got, vector.Scrubbed)
		}
		if got := inPieces(r, vector.Text, 1); got != vector.Scrubbed {
			t.Errorf("%q of %q, byte by byte: %q, want %q", vector.Text, vector.Secrets, got, vector.Scrubbed)
		}
	}
}

func inPieces(r *artifacts.Redactor, text string, size int) string {
	var out bytes.Buffer
	w := r.Writer(&out)
	for len(text) > 0 {
		n := min(size, len(text))
		_, _ = w.Write([]byte(text[:n]))
		text = text[n:]
	}
	_ = w.Close()
	return out.String()
}

// Programs of Windows write files in UTF-16, in either order of bytes.
func TestUTF16(t *testing.T) {
	t.Parallel()
	encode := func(text string, order binary.AppendByteOrder) string {
		var out []byte
		for _, unit := range utf16.Encode([]rune(text)) {
			out = order.AppendUint16(out, unit)
		}
		return string(out)
	}
	for _, secret := range []string{"Zr5uTq8L", "ghp_R7dK2mX9wQ4vB1nZ8cY5tL0pJ3hG6fD2sA9e", strings.Repeat("Zr5uTq8LmW2xNv4B", 20)} {
		r := artifacts.NewRedactor([]string{"A_TOKEN=" + secret})
		for order, mask := range map[binary.AppendByteOrder]string{binary.LittleEndian: "***\x00", binary.BigEndian: "\x00***"} {
			before, after := encode("\ufefftoken = ", order), encode("\r\n\r\nü\r\n", order)
			text, want := before+encode(secret, order)+after, before+mask+after
			for _, got := range []string{r.String(text), inPieces(r, text, 1), inPieces(r, text, 7)} {
				if got != want {
					t.Errorf("%s of %s: %q, want %q", order, secret, got, want)
				}
			}
		}
	}
}

func TestURLPasswordsAreReplaced(t *testing.T) {
	t.Parallel()
	r := artifacts.NewRedactor([]string{
		"CELERY_BROKER_URL=amqp://mm:s3cret%2Fword@rabbit:5672//",
		"DATABASE=postgres://postgres:guest@db/x",
		"HTTP_PROXY=http://proxy:3128",
	})
	for text, want := range map[string]string{
		"amqp://mm:s3cret%2Fword@rabbit:5672//": "amqp://mm:***@rabbit:5672//",
		"password s3cret/word refused":          "password *** refused",
		"dial postgres://postgres:guest@db/x":   "dial postgres://postgres***db/x",
		"a guest is no secret":                  "a guest is no secret",
		"via http://proxy:3128":                 "via http://proxy:3128",
	} {
		if got := r.String(text); got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}

// Programs take the address of a proxy without a scheme.
func TestThePasswordOfAProxy(t *testing.T) {
	t.Parallel()
	workspace := t.TempDir()
	write(t, filepath.Join(workspace, ".env"), "http_proxy=svc:Other98xy@proxy:3128\n")
	r := artifacts.NewRedactor([]string{"HTTPS_PROXY=svc:Geheim99x@proxy:3128", "all_proxy=tok_Zr5uTq8LmW2xNv4B@proxy:3128", "NO_PROXY=localhost,proxy.example"}, artifacts.Rules{Workspace: workspace})
	for text, want := range map[string]string{
		"proxyconnect svc:Geheim99x@proxy:3128": "proxyconnect svc:***@proxy:3128",
		"is Geheim99x.":                         "is ***.",
		"is Other98xy.":                         "is ***.",
		"is tok_Zr5uTq8LmW2xNv4B.":              "is ***.",
		"not for localhost,proxy.example":       "not for localhost,proxy.example",
	} {
		if got := r.String(text); got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}

// The keys in a list of URLs are secret one by one.
func TestKeysInListsOfURLs(t *testing.T) {
	t.Parallel()
	r := artifacts.NewRedactor([]string{"MM_ORCHESTRATOR_HEALTH_URL=api=http://api:5000/healthz?token=SuperSecret99,web=http://web/ping?x=y&api_key=OtherSecret98, https://z/?token=with,comma-97"})
	for _, secret := range []string{"SuperSecret99", "OtherSecret98", "with,comma-97"} {
		if got := r.String("is " + secret + "."); got != "is ***." {
			t.Errorf("%s: %q", secret, got)
		}
	}
	const clean = "http://web/ping?x=y"
	if got := r.String(clean); got != clean {
		t.Errorf("%q became %q", clean, got)
	}
}

// The password of a URL is hidden as it is meant, however it was written, and
// however a program writes it.
func TestSpellingsOfURLPasswords(t *testing.T) {
	t.Parallel()
	content, err := os.ReadFile("testdata/secret_forms.txt")
	if err != nil {
		t.Fatal(err)
	}
	for _, value := range []string{
		"db+postgresql://mm:Ge%40heim%2F88%20w@db/moonmind",
		"db+postgresql://mm:Ge%40heim/88 w@db/moonmind",
		"amqp://mm:Ge@heim%2F88 w@rabbit//",
		"postgresql://db/moonmind?user=mm&password=Ge@heim/88+w",
	} {
		r := artifacts.NewRedactor([]string{"CELERY_RESULT_BACKEND=" + value})
		for line := range strings.Lines(string(content)) {
			if form := strings.TrimSuffix(line, "\n"); !strings.HasPrefix(form, "# ") && form != "" {
				if got := r.String("<" + form + ">"); got != "<***>" && got != "<bW06***>" {
					t.Errorf("%s: %q became %q", value, form, got)
				}
			}
		}
	}
}

// A text that a secret's every spelling stands in.
func TestSpellings(t *testing.T) {
	t.Parallel()
	const password = `Gé"h'e/im\ &<88~`
	r := artifacts.NewRedactor([]string{"A=amqp://mm:" + url.PathEscape(password) + "@h//"})
	for _, form := range []string{
		password, `Gé\"h'e/im\\ &<88~`, `Gé\"h'e\/im\\ &<88~`, `G\u00e9\"h'e/im\\ &<88~`, `G\u00e9\"h'e/im\\ \u0026\u003c88~`,
		`G%C3%A9%22h%27e%2Fim%5C%20%26%3C88~`, `G%c3%a9%22h%27e%2fim%5c%20%26%3c88~`, `G%C3%A9%22h'e%2Fim%5C%20%26%3C88~`, `G%C3%A9%22h%27e/im%5C+%26%3C88~`,
		`Gé"h'\''e/im\ &<88~`, `Gé"h\'e/im\\ &<88~`,
	} {
		if got := r.String(form); strings.Contains(got, "88") {
			t.Errorf("%s became %s", form, got)
		}
	}
}

func TestOverlappingSecretsLeaveNothing(t *testing.T) {
	t.Parallel()
	r := artifacts.NewRedactor([]string{"A_KEY=xab", "B_KEY=abcdef", "C_KEY=aaa"})
	for text, want := range map[string]string{
		"-xabcdef-": "-***-",
		"-aaaaaaa-": "-***-",
		"xabxab":    "******",
		"abcde":     "abcde",
		"xa":        "xa",
	} {
		for size := 1; size <= len(text); size++ {
			if got := inPieces(r, text, size); got != want {
				t.Errorf("%q by %d: %q, want %q", text, size, got, want)
			}
		}
	}
}

func TestSecretsWithLineBreaksAreHiddenInSanitisedText(t *testing.T) {
	t.Parallel()
	r := artifacts.NewRedactor([]string{"SSH_KEY=one\r\ntwo\n"})
	for _, text := range []string{"one\r\ntwo\n", "one\ntwo\n", "one\ntwo"} {
		if got := r.String(text); got != "***" {
			t.Errorf("%q: %q", text, got)
		}
	}
}

func TestRedactingWriterPassesOnWhatCannotBecomeASecret(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	w := artifacts.NewRedactor([]string{"A_TOKEN=abcdef"}).Writer(&out)
	_, _ = w.Write([]byte("line 1\nabc"))
	if out.String() != "line 1\n" {
		t.Errorf("passed on %q", out.String())
	}
	_, _ = w.Write([]byte("x"))
	if out.String() != "line 1\nabcx" {
		t.Errorf("passed on %q", out.String())
	}
}

func TestLogLinesCarryNoSecret(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	r := artifacts.NewRedactor([]string{"GITHUB_TOKEN=p@ss w/d"})
	logger := slog.New(r.Handler(slog.NewJSONHandler(&out, nil))).
		With("header", "Bearer p@ss w/d").WithGroup("g p@ss w/d")
	logger.Info("using p@ss w/d",
		"error", errors.New("refused p%40ss+w%2Fd"),
		"list", []string{"a", base64.StdEncoding.EncodeToString([]byte("p@ss w/d"))},
		slog.Group("inner", "x", "p@ss w/d"), slog.Group("group p@ss w/d", "key p@ss w/d", 1),
		"pointer", &struct{ Inner *struct{ Text string } }{&struct{ Text string }{"p@ss w/d"}},
		"bytes", json.RawMessage(`{"text": "p@ss w\/d"}`), "url", &url.URL{Scheme: "http", Host: "h", Path: "/p@ss w/d"},
		"func", func() string { return "p@ss w/d" },
		"count", 3)
	for _, form := range []string{"p@ss w/d", url.QueryEscape("p@ss w/d"), base64.StdEncoding.EncodeToString([]byte("p@ss w/d"))} {
		if strings.Contains(out.String(), form) {
			t.Errorf("%q is in %s", form, out.String())
		}
	}
	if !strings.Contains(out.String(), `"count":3`) {
		t.Errorf("lost an attribute: %s", out.String())
	}
}

func FuzzRedactionDoesNotDependOnWrites(f *testing.F) {
	f.Add("abcabcdefabc", 3)
	f.Add("p%40ss+w%2Fd cEBzcyB3L2Q= p@ss w/d", 5)
	f.Add("a%62c\\u0061bc &#97;bc a\x1b[1mb\x1b[0mc http://u:p@h Authorization: Basic abcabcabc", 1)
	f.Add("long-token-\n#1 0.1 0123456789\nlong-token\b-0123456789 bG9uZy10b2tlbi0wMTIzNDU2Nzg5", 1)
	r := artifacts.NewRedactor([]string{"A_TOKEN=abc", "B_TOKEN=abcdef", "C_TOKEN=p@ss w/d", "D_TOKEN=cab", "E_TOKEN=long-token-0123456789", "F_KEY=first line\nsecond line\n", `G_KEY=a\b"%41&amp;`, "H_TOKEN=password"},
		artifacts.Rules{CommonWords: []string{"password"}})
	f.Fuzz(func(t *testing.T, text string, size int) {
		if size < 1 {
			return
		}
		whole := r.String(text)
		if got := inPieces(r, text, size); got != whole {
			t.Errorf("%q by %d: %q, at once %q", text, size, got, whole)
		}
		if again := r.String(whole); again != whole {
			t.Errorf("%q became %q, redacted again %q", text, whole, again)
		}
		for _, secret := range []string{"abc", "p@ss w/d", "cab"} {
			if strings.Contains(whole, secret) {
				t.Errorf("%q is left of %q", whole, text)
			}
		}
	})
}

func FuzzTextIsValid(f *testing.F) {
	f.Add([]byte("a\r\nb\rc\x00\xff\xe2\x82"), 1)
	f.Fuzz(func(t *testing.T, data []byte, size int) {
		if size < 1 {
			return
		}
		var out, whole bytes.Buffer
		w := artifacts.NewTextWriter(&out)
		for rest := data; len(rest) > 0; {
			n := min(size, len(rest))
			_, _ = w.Write(rest[:n])
			rest = rest[n:]
		}
		_ = w.Close()
		w = artifacts.NewTextWriter(&whole)
		_, _ = w.Write(data)
		_ = w.Close()
		if out.String() != whole.String() {
			t.Errorf("%q by %d: %q, at once %q", data, size, out.String(), whole.String())
		}
		if strings.ToValidUTF8(out.String(), "") != out.String() || strings.ContainsAny(out.String(), "\r\x00") {
			t.Errorf("%q became %q", data, out.String())
		}
	})
}

func TestTextIsMadeAsPythonDoes(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	w := artifacts.NewTextWriter(&out)
	_, _ = w.Write([]byte("a\r\nb\rc\x00d\xffe\xe2\x82"))
	_ = w.Close()
	if got, want := out.String(), "a\nb\ncd\ufffde\ufffd\ufffd"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// A carriage return in a secret may be printed as it is, or as the line break that
// Python makes of it.
func TestSecretWithACarriageReturn(t *testing.T) {
	t.Parallel()
	for name, r := range map[string]*artifacts.Redactor{
		"carriage return": artifacts.NewRedactor([]string{"MY_TOKEN=first-9x\rsecond-7y"}),
		"line break":      artifacts.NewRedactor([]string{"MY_TOKEN=first-9x\nsecond-7y"}),
	} {
		for _, text := range []string{"first-9x\rsecond-7y", "first-9x\nsecond-7y"} {
			if got := r.String("a " + text + " b"); got != "a *** b" {
				t.Errorf("secret with a %s, text %q: %q", name, text, got)
			}
		}
	}
}
