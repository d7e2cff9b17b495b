package protocol

import "time"

// ParseTime reads ISO 8601 as Celery does (dateutil's isoparse): dates alone,
// week and ordinal dates, fractions of a second cut to microseconds, any
// offset. A time without zone is UTC.
func ParseTime(text string) (time.Time, error) { return parseTime(text) }

// FormatTime writes a time as Python's isoformat does, in UTC:
// 2031-01-02T03:04:05.678901+00:00, without the fraction when it is zero.
func FormatTime(t time.Time) string { return formatTime(t) }
