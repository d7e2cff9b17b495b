package protocol

import "crypto/rand"

// newUUID makes a random UUID of version 4, as Celery's ids are.
func newUUID() string {
	var u UUID
	// It never fails; where there is no randomness the program ends.
	_, _ = rand.Read(u[:])
	u[6] = u[6]&0x0F | 0x40
	u[8] = u[8]&0x3F | 0x80
	return u.String()
}
