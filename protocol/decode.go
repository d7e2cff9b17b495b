package protocol

// MaxBodySize is how many bytes a body may have after decompression. A
// message beyond it is malformed (ReasonCompression).
const MaxBodySize = 64 << 20

// DecodeHeader reads what can be known of a message before its arguments:
// task, id, relations and retries. A worker uses it to see whether it has
// the task, which Celery checks before it looks at the body (contract 2.5).
//
// A protocol 1 message has no headers, so its body is decoded; then accept is
// obeyed as in [Decode]. Message.ID is "" when the id is missing. The error is
// a *MalformedError.
func DecodeHeader(d Delivery, accept []string) (*Message, error) { return decodeHeader(d, accept) }

// Decode reads a message of protocol 2, protocol 1, or the hybrid of both, in
// the order of contract 2.4. Every header but task and id may be missing; a
// header of an unexpected type counts as missing, but for eta and expires.
// accept lists content types, compared exactly; nil means application/json.
// Only JSON can be decoded, whatever accept says.
//
// The error is a *MalformedError. The message shares memory with d.
func Decode(d Delivery, accept []string) (*Message, error) { return decode(d, accept) }
