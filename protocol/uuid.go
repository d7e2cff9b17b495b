package protocol

import (
	"crypto/rand"
	"crypto/sha1"
)

// newUUID makes a random UUID of version 4, as Celery's ids are.
func newUUID() string {
	var u UUID
	// It never fails; where there is no randomness the program ends.
	_, _ = rand.Read(u[:])
	u[6] = u[6]&0x0F | 0x40
	u[8] = u[8]&0x3F | 0x80
	return u.String()
}

// idSpace is the namespace of ids that are derived; drawn once.
var idSpace = UUID{0x6d, 0x0f, 0x3e, 0x51, 0x2b, 0x8a, 0x4c, 0x77, 0x9d, 0x1e, 0x58, 0xa4, 0xc3, 0x60, 0xf2, 0x19}

// derivedUUID makes a UUID of version 5: the same name has the same.
func derivedUUID(name []byte) string {
	sum := sha1.Sum(append(idSpace[:], name...))
	u := UUID(sum[:16])
	u[6] = u[6]&0x0F | 0x50
	u[8] = u[8]&0x3F | 0x80
	return u.String()
}
