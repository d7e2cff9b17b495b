package protocol

import (
	"crypto/rand"
	"crypto/sha1"
)

// newUUID returns a random UUID (version 4), the form of Celery's own ids.
func newUUID() string {
	var u UUID
	// Read never returns an error: without a source of randomness it ends the
	// program.
	_, _ = rand.Read(u[:])
	return u.withVersion(4).String()
}

// idSpace is the namespace of derived ids: a random UUID that must never
// change, since the same follow-up must always get the same id.
var idSpace = UUID{0x6d, 0x0f, 0x3e, 0x51, 0x2b, 0x8a, 0x4c, 0x77, 0x9d, 0x1e, 0x58, 0xa4, 0xc3, 0x60, 0xf2, 0x19}

// derivedUUID returns a UUID of version 5: equal names give equal UUIDs.
func derivedUUID(name []byte) string {
	sum := sha1.Sum(append(idSpace[:], name...))
	return UUID(sum[:16]).withVersion(5).String()
}

// withVersion returns the UUID with the bits of a version, and with those of the
// variant that has versions, as the parameter version of Python's uuid.UUID sets them.
func (u UUID) withVersion(version byte) UUID {
	u[6] = u[6]&0x0F | version<<4
	u[8] = u[8]&0x3F | 0x80
	return u
}

// NewID returns a random task id, as Celery makes them.
func NewID() string { return newUUID() }
