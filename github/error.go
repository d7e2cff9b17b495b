package github

import (
	"encoding/json"
	"errors"
	"strings"
	"time"
)

// Kind says what is wrong with a call.
type Kind string

const (
	// Login: GitHub does not accept the token, or it cannot be read.
	Login Kind = "login"
	// Access: the token is valid and may not do this.
	Access Kind = "access"
	// NotFound: GitHub shows no such thing to the token. It answers so too if the token
	// may not see a private repository.
	NotFound Kind = "not found"
	// Invalid: GitHub does not accept what was asked.
	Invalid Kind = "invalid"
	// RateLimit: a limit is used up for longer than the caller waits.
	RateLimit Kind = "rate limit"
	// Unavailable: there was no answer, or GitHub has failed.
	Unavailable Kind = "unavailable"
	// Unusable: what answers does not look like GitHub.
	Unusable Kind = "unusable"
)

// An Error says why GitHub did not do what was asked, and what to do.
type Error struct {
	Kind Kind
	// Status is that of the answer, 0 without one.
	Status int
	// Message is what GitHub has said, in one line, "" for nothing.
	Message string
	// Fields say what of a request is not valid. Of kind Invalid only.
	Fields []FieldError
	// SSO is the page on which the token is authorised for the organisation. Of kind
	// Access only.
	SSO string
	// Scopes are those of the token; see Repository.
	Scopes []string
	// Classic says that the token has scopes.
	Classic bool
	// Until is when a rate limit ends, zero if that is not known.
	Until time.Time
	// Err is the cause, nil if it is GitHub's answer.
	Err error

	text string
	// unsent says that GitHub cannot have done what was asked.
	unsent bool
}

func (e *Error) Error() string { return e.text }

func (e *Error) Unwrap() error { return e.Err }

// Retryable reports whether the same call can succeed later, without anybody having
// changed something.
func (e *Error) Retryable() bool { return e.Kind == RateLimit || e.Kind == Unavailable }

// KindOf is the kind of an *Error in err, "" for none.
func KindOf(err error) Kind {
	var own *Error
	if errors.As(err, &own) {
		return own.Kind
	}
	return ""
}

// A FieldError is one of GitHub's validation errors.
type FieldError struct {
	Resource string `json:"resource"`
	// Code is missing, missing_field, invalid, already_exists, unprocessable or custom.
	Code    string `json:"code"`
	Field   string `json:"field"`
	Message string `json:"message"`
}

// UnmarshalJSON also accepts a text: some answers have one in place of an object.
func (e *FieldError) UnmarshalJSON(data []byte) error {
	type plain FieldError
	var text string
	if json.Unmarshal(data, &text) == nil {
		*e = FieldError{Code: "custom", Message: text}
		return nil
	}
	return json.Unmarshal(data, (*plain)(e))
}

func (e FieldError) String() string {
	if e.Message != "" {
		return oneLine(e.Message)
	}
	return oneLine(strings.Join(strings.Fields(e.Resource+" "+e.Field+" is "+e.Code), " "))
}

// says reports whether one of the validation errors has a text.
func (e *Error) says(text string) bool {
	text = strings.ToLower(text)
	if strings.Contains(strings.ToLower(e.Message), text) {
		return true
	}
	for _, field := range e.Fields {
		if strings.Contains(strings.ToLower(field.Message), text) {
			return true
		}
	}
	return false
}

// isInvalid reports whether a field is not valid.
func (e *Error) isInvalid(name string) bool {
	for _, field := range e.Fields {
		if field.Field == name && (field.Code == "invalid" || field.Code == "missing") {
			return true
		}
	}
	return false
}

// oneLine is a text of a server for an error: short, in one line, without control
// characters.
func oneLine(text string) string {
	text = strings.Join(strings.Fields(strings.Map(func(r rune) rune {
		if r < ' ' && r != '\n' && r != '\t' && r != '\r' || r == 0x7f || r >= 0x80 && r < 0xa0 {
			return -1
		}
		return r
	}, strings.ToValidUTF8(text, "\uFFFD"))), " ")
	if runes := []rune(text); len(runes) > 300 {
		text = string(runes[:300]) + "…"
	}
	return text
}
