package protocol_test

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// A body in any content encoding is decoded to the text to which Python decodes
// it, and refused where Python refuses it.
func TestPythonDecodesTheSameContentEncodings(t *testing.T) {
	t.Parallel()
	type body struct{ encoding, bytes string }
	var bodies []body
	const utf16le, utf16be = "[\x00\"\x00\xe9\x00=\xd8\x00\xde\"\x00]\x00", "\x00[\x00\"\x00\xe9\xd8=\xde\x00\x00\"\x00]"
	const utf32le, utf32be = "[\x00\x00\x00\"\x00\x00\x00\xe9\x00\x00\x00\x00\xf6\x01\x00\"\x00\x00\x00]\x00\x00\x00", "\x00\x00\x00[\x00\x00\x00\"\x00\x00\x00\xe9\x00\x01\xf6\x00\x00\x00\x00\"\x00\x00\x00]"
	for _, text := range []string{
		utf16le, utf16be, "\xff\xfe" + utf16le, "\xfe\xff" + utf16be, utf32le, utf32be, "\xff\xfe\x00\x00" + utf32le, "\x00\x00\xfe\xff" + utf32be,
		"[\x00\"\x00\x00\xd8\"\x00]\x00", "[\x00\"\x00\x00\xd8", "[\x00]", "[\x00\"\x00\x00\xdc\x00\xd8\"\x00]\x00", "[\x00\"\x00\xfd\xff\"\x00]\x00",
		"[\x00\x00\x00\"\x00\x00\x00\x00\xd8\x00\x00\"\x00\x00\x00]\x00\x00\x00", "[\x00\x00\x00\"\x00\x00\x00\x00\x00\x11\x00\"\x00\x00\x00]\x00\x00\x00", "[\x00\x00\x00]",
		`["caf\u00e9"]`, "[\"caf\u00e9\"]", "[\"caf\xe9\"]", "\ufeff[\"\u00e9\"]", "\ufeff\ufeff[1]", "[\"\xff\xc3\xa9\"]",
	} {
		for _, encoding := range []string{
			"", "utf-8", "UTF8", "utf-8-sig", "utf_8_sig", "utf-16", "UTF-16", "utf16", "U16", "utf-16le", "UTF-16LE", "utf-16-be", "utf-32", "utf-32-le", "UTF_32BE",
			"iso-8859-1", "ISO-8859-1", "ISO_8859-1:1987", "latin-1", "latin1", "latin--1", " latin 1 ", "l1", "8859", "us-ascii", "ascii",
			"binary", "ascii-8bit", "base64", "zlib", "rot13", "nonsense", "iso:8859", "utf.8", "utf/16", "iso-8859-15", "windows-1252", "cp1252", "\u00e9",
		} {
			bodies = append(bodies, body{encoding, text})
		}
	}
	// Every byte of every encoding of one byte per character.
	for _, encoding := range protocol.TextEncodings() {
		if strings.HasPrefix(encoding, "u") {
			continue
		}
		for b := range 256 {
			quote, open, end := "\"", "[", "]"
			if strings.Contains(encoding, "037") || strings.Contains(encoding, "1140") || strings.HasPrefix(encoding, "ebcdic") || encoding == "ibm039" {
				quote, open, end = "\x7f", "\xba", "\xbb" // EBCDIC
			}
			bodies = append(bodies, body{encoding, open + quote + string([]byte{byte(b)}) + quote + end})
		}
	}
	var questions []question
	for _, b := range bodies {
		questions = append(questions, question{"body", []string{hex.EncodeToString([]byte(b.bytes)), b.encoding}})
	}
	for i, want := range askPython(t, "5.7.0", questions) {
		b := bodies[i]
		got, err := protocol.BodyJSON(protocol.Delivery{
			Properties: protocol.Properties{ContentType: "application/json", ContentEncoding: b.encoding}, Body: []byte(b.bytes)})
		if string(want) == "null" {
			if err == nil {
				t.Errorf("%q in %q: got %q, Python refuses it", b.bytes, b.encoding, got)
			}
			continue
		}
		if fmt.Sprint(decoded(t, got)) != fmt.Sprint(decoded(t, want)) || err != nil {
			t.Errorf("%q in %q: got %q, %v; Python has %s", b.bytes, b.encoding, got, err, want)
		}
	}
}

func decoded(t *testing.T, text json.RawMessage) (v any) {
	t.Helper()
	if err := protocol.DecodeJSON(text, &v); err != nil && len(text) > 0 {
		t.Fatalf("%q: %v", text, err)
	}
	return v
}

// The arguments of a message in another encoding are UTF-8 from then on, also in
// a retry of it.
func TestArgumentsInAnotherEncoding(t *testing.T) {
	t.Parallel()
	d := delivery("[[\"caf\xe9\"], {}, {}]")
	d.Properties.ContentEncoding = "ISO-8859-1"
	m, err := protocol.Decode(d, nil)
	if err != nil {
		t.Fatal(err)
	}
	if string(m.RawArgs) != "[\"caf\u00e9\"]" {
		t.Errorf("args are %q", m.RawArgs)
	}
	p, err := protocol.RetryMessage(m, protocol.RetryOptions{})
	if err != nil || p.Properties.ContentEncoding != "utf-8" || !strings.Contains(string(p.Body), "caf\u00e9") {
		t.Errorf("retry is %q in %q, %v", p.Body, p.Properties.ContentEncoding, err)
	}
	d.Properties.ContentEncoding = "nonsense"
	_, err = protocol.Decode(d, nil)
	if reasonOf(t, err) != protocol.ReasonBody || !strings.Contains(err.Error(), `neither "nonsense" nor UTF-8`) {
		t.Errorf("unknown encoding: %v", err)
	}
}
