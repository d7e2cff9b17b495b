// Package secret has a type for text that must not be printed: passwords, and
// addresses that contain passwords (package address prints these without them).
//
// A [String] prints as three asterisks with every verb of fmt, in JSON, in text
// marshalling and in slog. Code that needs the text calls Reveal, so that
// `grep Reveal` finds every place where a secret leaves the type.
package secret

import (
	"encoding/json"
	"fmt"
	"log/slog"
)

// Mask is printed in place of a secret. MoonMind's redaction uses the same text
// (docs/moonmind.md#secrets).
const Mask = "***"

// String is a secret text. The zero value is the empty secret. It prints as the
// empty string, which shows that a password is missing.
type String struct{ text string }

// New returns text as a secret.
func New(text string) String { return String{text: text} }

// Reveal returns the text itself.
func (s String) Reveal() string { return s.text }

// IsZero reports whether the text is empty.
func (s String) IsZero() bool { return s.text == "" }

// String returns [Mask], or "" if the text is empty.
func (s String) String() string {
	if s.text == "" {
		return ""
	}
	return Mask
}

// Format prints the mask for every verb and flag, %#v and %x included.
func (s String) Format(f fmt.State, verb rune) {
	if verb == 'q' || (verb == 'v' && f.Flag('#')) {
		fmt.Fprintf(f, "%q", s.String())
		return
	}
	fmt.Fprint(f, s.String())
}

// MarshalJSON writes the mask.
func (s String) MarshalJSON() ([]byte, error) { return json.Marshal(s.String()) }

// MarshalText writes the mask.
func (s String) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// LogValue logs the mask.
func (s String) LogValue() slog.Value { return slog.StringValue(s.String()) }
