// Package protocol encodes and decodes Celery's wire format: task messages of
// protocol 2 and 1, signatures, Python's dialect of JSON, the result column,
// and exceptions. It covers Celery 5.4 to 5.7 with kombu 5.3 to 5.7. It does
// no I/O, imports neither a broker library nor a database driver, and keeps no
// state.
//
// # Running a task
//
// A worker uses these functions:
//
//   - [DecodeHeader] reads the task's name and id, so that the worker can look
//     up a handler before it reads the body.
//   - [Decode] reads the whole message. A [*MalformedError] says what to do
//     with a message that cannot be run ([MalformedError.Disposition]).
//   - [CheckCanvas] checks, before the handler runs, that this package can
//     start everything that the message asks to run afterwards.
//   - [AfterSuccess] or [AfterFailure] makes the messages to publish
//     afterwards. [LaterSteps] lists the chain steps that a failure cancels.
//   - [RetryMessage] makes the message that runs the same task again.
//   - [EncodeResult] makes the bytes of the result column in celery_taskmeta.
//
// # Sending a task
//
// [NewSignature] or [ParseSignature] makes a [Signature]; [Signature.Apply]
// makes the message that runs it. Apply leaves the exchange and the routing key
// empty: with the exchange "" the routing key is the name of a queue.
//
// # Values
//
// Arguments and results are JSON text in Python's dialect
// (json.RawMessage). [EncodeJSON] and [DecodeJSON] convert between that text
// and Go values; [ReadResult] reads a result column.
//
// Text that is not changed is never encoded again: arguments, options and
// whole signatures keep the bytes that Python wrote. NaN, integers of any
// size, type wrappers and the order of keys therefore survive a republication
// byte for byte.
package protocol
