package protocol

import (
	"fmt"
	"strings"
	"time"
)

// timeRepr is Python's repr of a datetime, date or time in its type wrapper.
func timeRepr(name, text string) (string, bool) {
	switch name {
	case "datetime":
		t, err := parseDatetime(text)
		if err != nil {
			return "", false
		}
		fields := append([]int{t.Year(), int(t.Month()), t.Day()}, clockFields(t)...)
		return "datetime.datetime(" + joinInts(fields) + zoneRepr(t) + ")", true
	case "date":
		t, err := parseDatetime(text)
		if err != nil {
			return "", false
		}
		return "datetime.date(" + joinInts([]int{t.Year(), int(t.Month()), t.Day()}) + ")", true
	case "time":
		t, err := parseDatetime("2000-01-01T" + text)
		if err != nil {
			return "", false
		}
		return "datetime.time(" + joinInts(clockFields(t)) + zoneRepr(t) + ")", true
	}
	return "", false
}

// clockFields are hour and minute, and as many of second and microsecond as Python
// prints.
func clockFields(t time.Time) []int {
	fields := []int{t.Hour(), t.Minute()}
	micros := t.Nanosecond() / 1000
	if t.Second() != 0 || micros != 0 {
		fields = append(fields, t.Second())
	}
	if micros != 0 {
		fields = append(fields, micros)
	}
	return fields
}

func joinInts(fields []int) string {
	return strings.Join(strings.Fields(strings.Trim(fmt.Sprint(fields), "[]")), ", ")
}

func zoneRepr(t time.Time) string {
	if t.Location() == Naive {
		return ""
	}
	_, offset := t.Zone()
	switch {
	case offset == 0:
		return ", tzinfo=datetime.timezone.utc"
	case offset < 0:
		// Python's timedelta has a negative number of days and positive seconds.
		return fmt.Sprintf(", tzinfo=datetime.timezone(datetime.timedelta(days=-1, seconds=%d))", offset+24*60*60)
	}
	return fmt.Sprintf(", tzinfo=datetime.timezone(datetime.timedelta(seconds=%d))", offset)
}
