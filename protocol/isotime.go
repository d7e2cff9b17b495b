package protocol

import (
	"fmt"
	"strings"
	"time"
)

// TimeError says why a text is not a time.
type TimeError struct {
	Text string
	// Why is the reason, one clause.
	Why string
}

// Error quotes the text and names the reason.
func (e *TimeError) Error() string {
	return fmt.Sprintf("%s is not an ISO 8601 time: %s", quote(e.Text), e.Why)
}

// ParseTime parses ISO 8601 as Celery does (dateutil's isoparse). It accepts a
// date alone, week dates, ordinal dates and any offset. It cuts fractions of a
// second to microseconds, and reads a time without a zone as UTC. The error is
// a [*TimeError].
func ParseTime(text string) (time.Time, error) {
	t, err := parseDatetime(text)
	if t.Location() == Naive {
		t = time.Date(t.Year(), t.Month(), t.Day(), t.Hour(), t.Minute(), t.Second(), t.Nanosecond(), time.UTC)
	}
	return t, err
}

// parseDatetime is ParseTime, except that a time without a zone is in [Naive].
func parseDatetime(text string) (time.Time, error) { return parseISO(isoText{rest: text}) }

// parseIsoformat is parseDatetime that accepts seconds in an offset, too: Python's
// isoformat writes them for local mean times.
func parseIsoformat(text string) (time.Time, error) {
	return parseISO(isoText{rest: text, offsetSeconds: true})
}

func parseISO(p isoText) (time.Time, error) {
	text := p.rest
	fail := func(why string) (time.Time, error) { return time.Time{}, &TimeError{Text: text, Why: why} }
	year, month, day, ok := p.date()
	if !ok {
		return fail("it does not begin with a date")
	}
	clock := isoClock{naive: true}
	if p.rest != "" {
		if p.rest[0] >= 0x80 {
			return fail("it is not ASCII")
		}
		p.rest = p.rest[1:]
		if clock, ok = p.clock(); !ok {
			return fail("no time of day follows the date")
		}
	}
	zone := time.UTC
	switch {
	case clock.naive:
		zone = Naive
	case clock.offset != 0:
		zone = time.FixedZone("", clock.offset)
	}
	t := time.Date(year, time.Month(month), day, clock.hour, clock.minute, clock.second, clock.micros*1000, zone)
	if y := t.Year(); y < 1 || y > 9999 {
		return fail("the year is out of range")
	}
	return t, nil
}

// FormatTime formats a time in UTC as Python's isoformat does:
// 2031-01-02T03:04:05.678901+00:00. A fraction of zero is left out; nanoseconds
// are cut to microseconds.
func FormatTime(t time.Time) string {
	t = t.UTC().Truncate(time.Microsecond)
	if t.Nanosecond() == 0 {
		return t.Format("2006-01-02T15:04:05+00:00")
	}
	return t.Format("2006-01-02T15:04:05.000000+00:00")
}

// isoText is the part of an ISO 8601 text that is not parsed yet.
type isoText struct {
	rest string
	// offsetSeconds: the offset may end with seconds.
	offsetSeconds bool
}

type isoClock struct {
	hour, minute, second, micros, offset int
	naive                                bool // there is no zone
}

func (p *isoText) number(digits int) (int, bool) {
	if len(p.rest) < digits {
		return 0, false
	}
	n := 0
	for i := range digits {
		if !isDigit(p.rest[i]) {
			return 0, false
		}
		n = n*10 + int(p.rest[i]-'0')
	}
	p.rest = p.rest[digits:]
	return n, true
}

func (p *isoText) take(c byte) bool {
	if p.rest != "" && p.rest[0] == c {
		p.rest = p.rest[1:]
		return true
	}
	return false
}

func (p *isoText) date() (year, month, day int, ok bool) {
	start := p.rest
	if year, ok = p.number(4); !ok || year < 1 {
		return 0, 0, 0, false
	}
	if p.rest == "" {
		return year, 1, 1, true
	}
	if month, day, ok = p.monthDay(); ok {
		return year, month, day, isDay(year, month, day)
	}
	p.rest = start[4:]
	day, ok = p.weekOrOrdinal(year)
	return year, 1, day, ok
}

// monthDay reads -MM, -MM-DD or MMDD; MM alone is refused as ambiguous.
func (p *isoText) monthDay() (month, day int, ok bool) {
	dashed := p.take('-')
	if month, ok = p.number(2); !ok {
		return 0, 0, false
	}
	if p.rest == "" {
		return month, 1, dashed
	}
	if dashed && !p.take('-') {
		return 0, 0, false
	}
	day, ok = p.number(2)
	return month, day, ok
}

// weekOrOrdinal reads -Www, -Www-D or -DDD and their forms without dashes. The
// day counts from 1 January and may lie in the year before or after.
func (p *isoText) weekOrOrdinal(year int) (day int, ok bool) {
	dashed := p.take('-')
	if !p.take('W') {
		day, ok = p.number(3)
		return day, ok && day >= 1 && day <= daysIn(year)
	}
	week, ok := p.number(2)
	if !ok || week < 1 || week > 53 {
		return 0, false
	}
	weekday := 1
	if p.rest != "" {
		if (p.rest[0] == '-') != dashed {
			return 0, false
		}
		p.take('-')
		if weekday, ok = p.number(1); !ok || weekday < 1 || weekday > 7 {
			return 0, false
		}
	}
	fourth := int(time.Date(year, 1, 4, 0, 0, 0, 0, time.UTC).Weekday()+6) % 7
	return 4 - fourth + (week-1)*7 + weekday - 1, true
}

func daysIn(year int) int { return time.Date(year, 12, 31, 0, 0, 0, 0, time.UTC).YearDay() }

func isDay(year, month, day int) bool {
	t := time.Date(year, time.Month(month), day, 0, 0, 0, 0, time.UTC)
	return int(t.Month()) == month && t.Day() == day
}

func (p *isoText) clock() (c isoClock, ok bool) {
	if len(p.rest) < 2 {
		return c, false
	}
	if c.hour, ok = p.number(2); !ok || c.hour > 24 {
		return c, false
	}
	colon := false
	for i, field := range []*int{&c.minute, &c.second} {
		if p.rest == "" || strings.ContainsRune("+-Zz", rune(p.rest[0])) {
			break
		}
		if i == 0 {
			colon = p.take(':')
		} else if colon && !p.take(':') {
			return c, false
		}
		if *field, ok = p.number(2); !ok || *field > 59 {
			return c, false
		}
	}
	if p.take('.') || p.take(',') {
		scale := 100_000
		if p.rest == "" || !isDigit(p.rest[0]) {
			return c, false
		}
		for p.rest != "" && isDigit(p.rest[0]) {
			c.micros += int(p.rest[0]-'0') * scale
			scale /= 10
			p.rest = p.rest[1:]
		}
	}
	if c.hour == 24 && (c.minute != 0 || c.second != 0 || c.micros != 0) {
		return c, false
	}
	c.naive = p.rest == ""
	return c, p.zone(&c.offset)
}

func (p *isoText) zone(offset *int) bool {
	if p.rest == "" || p.rest == "Z" || p.rest == "z" {
		return true
	}
	sign := 1
	switch {
	case p.take('-'):
		sign = -1
	case !p.take('+'):
		return false
	}
	hours, ok := p.number(2)
	if !ok || hours > 23 {
		return false
	}
	minutes, seconds := 0, 0
	if p.rest != "" {
		p.take(':')
		if minutes, ok = p.number(2); !ok || minutes > 59 {
			return false
		}
	}
	if p.rest != "" && p.offsetSeconds && p.take(':') {
		if seconds, ok = p.number(2); !ok || seconds > 59 {
			return false
		}
	}
	*offset = sign * ((hours*60+minutes)*60 + seconds)
	return p.rest == ""
}
