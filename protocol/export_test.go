package protocol

// Decompress and Unpickle with a limit of the test's own: to reach the real one
// takes long under the race detector.
var (
	Decompress = decompress
	Unpickle   = unpickle
)
