package audit

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"
)

// Genesis is the hash before the first record.
const Genesis = "0000000000000000000000000000000000000000000000000000000000000000"

// Hash is that of a record: SHA-256 over the hash of the record before, in hex, and
// the record's text.
func Hash(prev string, text []byte) string {
	sum := sha256.New()
	sum.Write([]byte(prev))
	sum.Write(text)
	return hex.EncodeToString(sum.Sum(nil))
}

// A Head says how long a trail is and how it ends. Whoever knows it notices a trail
// that was cut, or written anew.
type Head struct {
	Length int64
	Hash   string
}

// Start is the head of a trail without records.
func Start() Head { return Head{0, Genesis} }

// String is LENGTH:HASH, which ParseHead reads.
func (h Head) String() string { return fmt.Sprintf("%d:%s", h.Length, h.Hash) }

// ParseHead reads LENGTH:HASH.
func ParseHead(text string) (Head, error) {
	length, hash, found := strings.Cut(strings.TrimSpace(text), ":")
	n, err := strconv.ParseInt(length, 10, 64)
	if sum, hexErr := hex.DecodeString(hash); !found || err != nil || n < 0 || hexErr != nil || len(sum) != sha256.Size {
		return Head{}, fmt.Errorf("%q is no head of an audit trail: a head is LENGTH:HASH, a number and 64 hexadecimal digits", text)
	}
	return Head{n, strings.ToLower(hash)}, nil
}

// Next is the head after a record of this text.
func (h Head) Next(text []byte) Head { return Head{h.Length + 1, Hash(h.Hash, text)} }
