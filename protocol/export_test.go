package protocol

import (
	"encoding/json"
	"maps"
	"slices"
)

// Decompress and Unpickle with a lower limit: reaching the real limit takes too
// long under the race detector.
var (
	Decompress = decompress
	Unpickle   = unpickle
)

// BodyJSON returns the text of a body.
func BodyJSON(d Delivery) (json.RawMessage, error) { return decodeBody(d, nil) }

// TextEncodings returns the names of the known content encodings.
func TextEncodings() []string { return slices.Sorted(maps.Keys(textDecoders)) }
