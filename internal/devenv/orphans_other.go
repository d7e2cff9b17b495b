//go:build !linux

package devenv

// adoptOrphans needs Linux; elsewhere only process groups are ended.
func adoptOrphans() (release func()) { return func() {} }

// onlyZombies cannot be told without /proc.
func onlyZombies(int) bool { return false }
