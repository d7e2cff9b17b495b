// Package leaktest has secrets of each kind, spells them as programs print them, and
// finds what is left of them in a text. It is for tests, and shares nothing with the
// redactor that they test.
package leaktest

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"html"
	"math/rand/v2"
	"net/url"
	"regexp"
	"strings"
	"sync"
)

// window is the length of the pieces of a secret that count as a leak, in bytes.
const window = 12

// A Search looks for many secrets in texts. It decodes a text in each way that a
// reader would try, and looks for the secrets, and of long ones for any piece of them.
type Search struct {
	// filter has the hashes of the first four bytes of all windows.
	filter  [1 << 16]bool
	windows map[[window]byte]string
	short   map[string]string
	// key is the same for the same secrets.
	key [sha256.Size]byte
}

// clean has the texts in which nothing was found, by Search.key and their own hash: the
// tests of a package leave many copies of the same files.
var clean sync.Map

// NewSearch returns a Search for secrets, which have names.
func NewSearch(secrets map[string]string) *Search {
	s := &Search{windows: map[[window]byte]string{}, short: map[string]string{}, key: sha256.Sum256(fmt.Appendf(nil, "%q", secrets))}
	for name, secret := range secrets {
		// What all keys have is no secret.
		for _, line := range strings.Split(common.ReplaceAllString(secret, "\n"), "\n") {
			if len(line) <= window {
				if len(line) >= 8 || !strings.Contains(secret, "\n") && line != "" {
					s.short[line] = name
				}
				continue
			}
			for i := 0; i+window <= len(line); i++ {
				s.windows[[window]byte([]byte(line[i:i+window]))] = name
				s.filter[gram(line[i:])] = true
			}
		}
	}
	return s
}

func gram(text string) uint16 {
	return uint16(binary.LittleEndian.Uint32([]byte(text[:4])) * 0x9E3779B1 >> 16)
}

// Find returns the name of a secret that is left in a text, and what is left of it.
func (s *Search) Find(text string) (name, piece string) {
	id := [2][sha256.Size]byte{s.key, sha256.Sum256([]byte(text))}
	if _, known := clean.Load(id); known {
		return "", ""
	}
	if name, piece = s.find(text); name == "" {
		clean.Store(id, true)
	}
	return name, piece
}

func (s *Search) find(text string) (name, piece string) {
	for _, view := range s.views(text) {
		for short, name := range s.short {
			if strings.Contains(view, short) {
				return name, short
			}
		}
		for i := 0; i+window <= len(view); i++ {
			if s.filter[gram(view[i:])] {
				if name, found := s.windows[[window]byte([]byte(view[i:i+window]))]; found {
					return name, view[i : i+window]
				}
			}
		}
	}
	return "", ""
}

// common matches what all keys have.
var common = regexp.MustCompile(`-----[A-Z ]+-----|\r|\\n|  "type".*|  "project".*|  "private_key(_id)?": "`)

// Secrets are secrets of each kind, by the variable that has them.
func Secrets() map[string]string {
	random := rand.New(rand.NewPCG(9, 9))
	word := func(alphabet string, n int) string {
		var out strings.Builder
		for range n {
			out.WriteByte(alphabet[random.IntN(len(alphabet))])
		}
		return out.String()
	}
	const letters = "abcdefghijkmnopqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789"
	const base = letters + "01lIO+/"
	var key, long strings.Builder
	key.WriteString("-----BEGIN RSA PRIVATE KEY-----\n")
	for range 7 {
		key.WriteString(word(base, 64) + "\n")
	}
	key.WriteString(word(base, 26) + "==\n-----END RSA PRIVATE KEY-----\n")
	long.WriteString("eyJ" + word(letters, 300))
	account, _ := json.MarshalIndent(map[string]string{"type": "service_account", "project": "demo", "private_key": key.String(), "private_key_id": word("0123456789abcdef", 40)}, "", "  ")
	return map[string]string{
		"GITHUB_TOKEN": "ghp_" + word(letters, 36), "PGPASSWORD": `p@ss/w"d' &<x>\$%41+~é ` + word(letters, 8), "DB_PASS": word(letters, 12), "HEX_KEY": word("0123456789abcdef", 64),
		"JWT": long.String(), "SSH_KEY": key.String(), "CRLF_KEY": strings.ReplaceAll(key.String(), "\n", "\r\n"), "SERVICE_SECRET": string(account),
		"SLASHES_SECRET": word(base, 22) + "/+/" + word(base, 15), "UNICODE_SECRET": "naïve-геheim-𝄞-" + word(letters, 8),
	}
}

// A Spelled is a text that has a secret in it, and how.
type Spelled struct {
	How, Text string
}

// Spell writes a secret as programs write it.
func Spell(secret string, random *rand.Rand) (list []Spelled) {
	add := func(how, text string) { list = append(list, Spelled{how, text}) }
	each := func(write func(c byte) string) string {
		var out strings.Builder
		for i := range len(secret) {
			out.WriteString(write(secret[i]))
		}
		return out.String()
	}
	runes := func(write func(r rune) string) string {
		var out strings.Builder
		for _, r := range secret {
			out.WriteString(write(r))
		}
		return out.String()
	}
	plain := strings.ReplaceAll(secret, "\r\n", "\n")
	add("as it is", secret)
	add("query", url.QueryEscape(secret))
	add("path", url.PathEscape(secret))
	add("lower hex", strings.ToLower(url.QueryEscape("é/@"))+each(func(c byte) string { return fmt.Sprintf("%%%02x", c) }))
	add("every byte", each(func(c byte) string { return fmt.Sprintf("%%%02X", c) }))
	add("some bytes", each(func(c byte) string {
		if random.IntN(3) == 0 || strings.IndexByte("%+ &", c) >= 0 || c >= 0x80 || c < ' ' {
			return fmt.Sprintf("%%%02x", c)
		}
		return string([]byte{c})
	}))
	add("twice", url.QueryEscape(url.QueryEscape(secret)))
	add("twice, every byte", each(func(c byte) string { return fmt.Sprintf("%%25%02X", c) }))
	quoted, _ := json.Marshal(secret)
	add("json", string(quoted))
	again, _ := json.Marshal(string(quoted))
	add("json in json", string(again))
	add("json, escaped slash", strings.ReplaceAll(string(quoted), "/", `\/`))
	add("json, lower", runes(func(r rune) string {
		if r > 0xffff {
			return string(r)
		}
		return fmt.Sprintf(`\u%04x`, r)
	}))
	add("json, upper", runes(func(r rune) string {
		if r > 0xffff {
			return string(r)
		}
		return fmt.Sprintf(`\u%04X`, r)
	}))
	add("ascii", fmt.Sprintf("%+q", secret))
	add("c, hex", each(func(c byte) string { return fmt.Sprintf(`\x%02x`, c) }))
	add("c, octal", each(func(c byte) string { return fmt.Sprintf(`\%03o`, c) }))
	add("go", fmt.Sprintf("%q", secret))
	add("python", "'"+strings.NewReplacer(`\`, `\\`, "'", `\'`, "\n", `\n`, "\r", `\r`).Replace(secret)+"'")
	add("shell", "'"+strings.ReplaceAll(secret, "'", `'\''`)+"'")
	add("shlex", "'"+strings.ReplaceAll(secret, "'", `'"'"'`)+"'")
	add("printf %q", each(func(c byte) string {
		if strings.IndexByte(" \"'\\$&<>~`*?[](){}|;!#", c) >= 0 {
			return `\` + string([]byte{c})
		}
		return string([]byte{c})
	}))
	add("yaml", "'"+strings.ReplaceAll(secret, "'", "''")+"'")
	add("xml", html.EscapeString(secret))
	add("xml twice", html.EscapeString(html.EscapeString(secret)))
	add("xml, decimal", runes(func(r rune) string { return fmt.Sprintf("&#%d;", r) }))
	add("xml, hex", runes(func(r rune) string { return fmt.Sprintf("&#x%X;", r) }))
	for offset := range 3 {
		for name, alphabet := range map[string]*base64.Encoding{"std": base64.StdEncoding, "url": base64.URLEncoding, "raw std": base64.RawStdEncoding, "raw url": base64.RawURLEncoding} {
			text := alphabet.EncodeToString([]byte("{{{{"[:offset+1] + secret + "}"))
			add(fmt.Sprintf("base64 %s at %d", name, offset), text)
			add(fmt.Sprintf("base64 %s at %d, alone", name, offset), alphabet.EncodeToString([]byte(secret)))
			if name == "std" {
				add(fmt.Sprintf("base64 over lines at %d", offset), fold(text, 76, "\n"))
				add(fmt.Sprintf("base64 over lines behind prefixes at %d", offset), fold(text, 64, "\n#12 0.345 "))
				add(fmt.Sprintf("base64 in a url at %d", offset), url.QueryEscape(text))
			}
		}
	}
	add("hex", hex.EncodeToString([]byte(secret)))
	add("HEX", strings.ToUpper(hex.EncodeToString([]byte(secret))))
	if len(secret) < 1000 {
		add("hex, spaces", strings.TrimSpace(each(func(c byte) string { return fmt.Sprintf("%02x ", c) })))
		add("hex, colons", strings.Trim(each(func(c byte) string { return fmt.Sprintf("%02X:", c) }), ":"))
	}
	add("hex over lines", fold(hex.EncodeToString([]byte(secret)), 60, "\n"))
	for _, colour := range []string{"\x1b[31m", "\x1b[0;1;38;5;12m", "\x1b]8;;http://x\x1b\\", "\x1b]0;t\a", "\x1b(B", "\r", "\b", `\u001b[1m`} {
		at := 1 + random.IntN(len(secret)-2)
		if secret[at]&0xc0 == 0x80 || secret[at] == '\n' || secret[at-1] == '\n' {
			at = 1
		}
		add(fmt.Sprintf("%q at %d", colour, at), secret[:at]+colour+secret[at:])
		add(fmt.Sprintf("%q at 1", colour), secret[:1]+colour+secret[1:])
		add(fmt.Sprintf("%q everywhere", colour), runes(func(r rune) string { return colour + string(r) }))
	}
	if !strings.ContainsFunc(secret, func(r rune) bool { return r >= 0x80 || r < ' ' }) {
		add("bold", each(func(c byte) string { return string([]byte{c, '\b', c}) }))
	}
	for name, prefix := range map[string]string{"buildkit": "#12 0.345 ", "buildkit without time": "#7 ", "compose": "web-1  | ", "time": "2026-01-02T03:04:05.678901Z ", "compose with time": "api-1 | 2026-01-02T03:04:05Z ", "diff": "+", "indentation": "    "} {
		if strings.Contains(plain, "\n") {
			add("lines, "+name, prefix+strings.ReplaceAll(strings.TrimSuffix(plain, "\n"), "\n", "\n"+prefix))
			add("lines, crlf, "+name, prefix+strings.ReplaceAll(strings.TrimSuffix(plain, "\n"), "\n", "\r\n"+prefix))
		} else if len(secret) >= 40 {
			add("folded, "+name, fold(secret, 20, "\n"+prefix))
		}
	}
	return list
}

// fold cuts a text into lines.
func fold(text string, width int, lineBreak string) string {
	var out strings.Builder
	for i := 0; i < len(text); {
		n := min(width, len(text)-i)
		for i+n < len(text) && text[i+n]&0xc0 == 0x80 {
			n++
		}
		if i > 0 {
			out.WriteString(lineBreak)
		}
		out.WriteString(text[i : i+n])
		i += n
	}
	return out.String()
}
