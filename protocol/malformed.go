package protocol

import (
	"errors"
	"fmt"
)

// ErrMalformed is what every *MalformedError is, for errors.Is.
var ErrMalformed = errors.New("malformed task message")

// Reason says which row of the table in docs/celery.md#bad-messages a message
// belongs to.
type Reason string

// The reasons why a message cannot be run.
const (
	// ReasonUnknown: no task header, and a body that is no protocol 1 task.
	ReasonUnknown Reason = "not a task message"
	// ReasonBody: the body is not text in its encoding or not Python's JSON.
	ReasonBody Reason = "body cannot be decoded"
	// ReasonCompression: unknown compression, a corrupt stream, or more than
	// MaxBodySize bytes behind it.
	ReasonCompression Reason = "body cannot be decompressed"
	// ReasonContentType: not one of the accepted types, compared exactly.
	ReasonContentType Reason = "content type is not accepted"
	// ReasonNoContentType: the property is missing.
	ReasonNoContentType Reason = "content type is missing"
	// ReasonShape: the body is not [args, kwargs, embed], or embed holds what
	// is no signature.
	ReasonShape Reason = "body is not [args, kwargs, embed]"
	// ReasonNoID: there is no id, or it is no text.
	ReasonNoID Reason = "task id is missing"
	// ReasonArgs: the positional arguments are no array.
	ReasonArgs Reason = "args is not an array"
	// ReasonKwargs: the keyword arguments are no object.
	ReasonKwargs Reason = "kwargs is not an object"
	// ReasonETA and ReasonExpires: not a time in ISO 8601.
	ReasonETA     Reason = "eta is not a time"
	ReasonExpires Reason = "expires is not a time"
	// ReasonOptions: a signature's options make no message. Decode never gives
	// it; [Signature.Apply] does.
	ReasonOptions Reason = "options cannot be applied"
)

// Disposition is what a worker does with a message that it cannot run.
type Disposition struct {
	// StoreFailure: write a FAILURE row with the error's Exception. It is
	// never set without a task id.
	StoreFailure bool
	// Reject without requeue, so that a dead-letter exchange catches the
	// message; otherwise acknowledge it.
	Reject bool
}

// MalformedError says why a message cannot be run. It is permanent: the same
// message fails the same way for ever.
type MalformedError struct {
	Reason Reason
	// TaskID and Task are "" when the message does not tell.
	TaskID string
	Task   string
	// Detail is one clause about the very value, or "".
	Detail string
}

// Error says what is wrong with which message.
func (e *MalformedError) Error() string {
	text := string(e.Reason)
	if e.Detail != "" {
		text += ": " + e.Detail
	}
	switch {
	case e.Task != "" && e.TaskID != "":
		return fmt.Sprintf("message of task %s (id %s) cannot be run: %s", quote(e.Task), quote(e.TaskID), text)
	case e.Task != "":
		return fmt.Sprintf("message of task %s without id cannot be run: %s", quote(e.Task), text)
	case e.TaskID != "":
		return fmt.Sprintf("message with id %s cannot be run: %s", quote(e.TaskID), text)
	}
	return "message cannot be run: " + text
}

// Is reports whether target is ErrMalformed.
func (e *MalformedError) Is(target error) bool { return target == ErrMalformed }

// Disposition is the column "here" of docs/celery.md#bad-messages.
func (e *MalformedError) Disposition() Disposition {
	switch e.Reason {
	case ReasonArgs, ReasonKwargs:
		return Disposition{StoreFailure: e.TaskID != "", Reject: e.TaskID == ""}
	case ReasonContentType:
		return Disposition{StoreFailure: e.TaskID != "", Reject: true}
	}
	return Disposition{Reject: true}
}

// Exception is what the FAILURE row says, as a Python worker would have
// raised it.
func (e *MalformedError) Exception() Exception {
	text := string(e.Reason)
	if e.Detail != "" {
		text += ": " + e.Detail
	}
	switch e.Reason {
	case ReasonArgs:
		return NewException("builtins", "TypeError", text)
	case ReasonKwargs:
		return NewException("celery.exceptions", "InvalidTaskError", "Task keyword arguments is not a mapping")
	case ReasonContentType:
		return NewException("kombu.exceptions", "ContentDisallowed", e.Detail)
	case ReasonBody, ReasonCompression:
		return NewException("kombu.exceptions", "DecodeError", text)
	}
	return NewException("celery.exceptions", "InvalidTaskError", text)
}

// quote cuts foreign text to a length that a log line bears.
func quote(text string) string {
	const most = 160
	if len(text) > most {
		text = text[:most] + "..."
	}
	return fmt.Sprintf("%q", text)
}
