package change

import "syscall"

// changeTime returns the ctime in nanoseconds since 1970.
func changeTime(stat *syscall.Stat_t) int64 { return stat.Ctim.Nano() }
