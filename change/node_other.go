//go:build !linux

package change

import "errors"

func makeNode(string, uint32, uint64) error {
	return errors.New("special files cannot be made on this system")
}
