package protocol

// Decompress and Unpickle with a lower limit: reaching the real limit takes too
// long under the race detector.
var (
	Decompress = decompress
	Unpickle   = unpickle
)
