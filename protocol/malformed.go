package protocol

import (
	"errors"
	"fmt"
)

// ErrMalformed matches every [*MalformedError] in errors.Is.
var ErrMalformed = errors.New("malformed task message")

// Reason says why a message cannot be run: a row of the table in
// docs/celery.md#bad-messages.
type Reason string

// The reasons why a message cannot be run.
const (
	// ReasonUnknown: there is no header task, and the body is not a protocol 1
	// task; or the task's name is not text.
	ReasonUnknown Reason = "not a task message"
	// ReasonBody: the body is not text in its content_encoding or in UTF-8, or
	// not Python's dialect of JSON.
	ReasonBody Reason = "body cannot be decoded"
	// ReasonCompression: the compression is unknown, the stream is corrupt, or
	// the body is larger than [MaxBodySize] and [MaxExpansion] allow.
	ReasonCompression Reason = "body cannot be decompressed"
	// ReasonContentType: the content type is not in the accept list.
	ReasonContentType Reason = "content type is not accepted"
	// ReasonNoContentType: the property content_type is missing.
	ReasonNoContentType Reason = "content type is missing"
	// ReasonShape: the body is not [args, kwargs, embed], or embed contains
	// something that is not a signature.
	ReasonShape Reason = "body is not [args, kwargs, embed]"
	// ReasonNoID: the id is missing or not text.
	ReasonNoID Reason = "task id is missing"
	// ReasonArgs: the positional arguments are not an array.
	ReasonArgs Reason = "args is not an array"
	// ReasonKwargs: the keyword arguments are not an object.
	ReasonKwargs Reason = "kwargs is not an object"
	// ReasonETA and ReasonExpires: the header is not a time in ISO 8601.
	ReasonETA     Reason = "eta is not a time"
	ReasonExpires Reason = "expires is not a time"
	// ReasonOptions: no message can be made with a signature's options. Only
	// [Signature.Apply] returns it.
	ReasonOptions Reason = "options cannot be applied"
)

// Disposition says what a worker must do with a message that it cannot run.
type Disposition struct {
	// StoreFailure: store the result FAILURE with the error's Exception. It is
	// set only if the message has a task id.
	StoreFailure bool
	// Reject: reject the message without requeue, so that the queue's
	// dead-letter exchange receives it. Otherwise acknowledge it.
	Reject bool
}

// MalformedError says why a message cannot be run, or cannot be made from a
// signature. The error is permanent: a retry fails in the same way.
type MalformedError struct {
	Reason Reason
	// TaskID and Task are "" when they are unknown.
	TaskID string
	Task   string
	// Detail is one clause about the value that is wrong, or "".
	Detail string
}

// Error names the message and what is wrong with it.
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

// Disposition returns what to do with the message: the column "here" of
// docs/celery.md#bad-messages.
func (e *MalformedError) Disposition() Disposition {
	switch e.Reason {
	case ReasonArgs, ReasonKwargs:
		return Disposition{StoreFailure: e.TaskID != "", Reject: e.TaskID == ""}
	case ReasonContentType:
		return Disposition{StoreFailure: e.TaskID != "", Reject: true}
	}
	return Disposition{Reject: true}
}

// Exception returns the exception for the FAILURE row: the one that a Python
// worker would raise.
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

// quote quotes text from a message, shortened for a log line.
func quote(text string) string {
	const most = 160
	if len(text) > most {
		text = text[:most] + "..."
	}
	return fmt.Sprintf("%q", text)
}
