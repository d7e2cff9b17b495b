package policy

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// A Value is the value of a field, as text.
type Value struct{ Field, Text string }

// Values are the values of a service for limits, verify and approval that are set, in
// the order of the fields. Those that lists have are fields of the service.
func Values(s Service) []Value {
	var values []Value
	for _, f := range Fields {
		field, below := strings.CutPrefix(f.Path, "services.NAME.")
		if !below || f.Form == "" || strings.HasPrefix(field, "overrides.") {
			continue
		}
		if !strings.Contains(field, "STEP") {
			values = s.value(values, field)
			continue
		}
		for _, step := range append([]string{everyStep}, steps...) {
			values = s.value(values, strings.Replace(field, "STEP", step, 1))
		}
	}
	return values
}

// Values are what the override adds or replaces.
func (o Override) Values() []Value {
	var values []Value
	for _, glob := range o.AllowList() {
		values = append(values, Value{"allowList", glob})
	}
	for _, program := range o.Programs() {
		values = append(values, Value{"programs", program.Name})
	}
	if o.Command != "" {
		values = append(values, Value{"command", o.Command})
		for _, option := range o.Options {
			values = append(values, Value{"options", option})
		}
		for _, directory := range o.Directories {
			values = append(values, Value{"directories", directory})
		}
	}
	return append(values, Values(o.values)...)
}

// value adds the value of a field to a list, if it is set.
func (s Service) value(list []Value, field string) []Value {
	if _, set := s.Origins[field]; !set {
		return list
	}
	text := ""
	switch parts := strings.Split(field, "."); {
	case field == "verify.quietPeriod":
		text = duration(s.Verify.QuietPeriod)
	case field == "verify.runningIsEnough":
		text = strconv.FormatBool(s.Verify.RunningIsEnough)
	case field == "verify.healthURL":
		text = s.Verify.HealthURL
	case field == "verify.appCheck":
		text = strings.Join(s.Verify.AppCheck, " ")
	case field == "approval.wait":
		text = duration(s.ApprovalWait)
	case parts[0] == "limits" && parts[1] == "run":
		text = limit(parts[2], StepLimits{Time: s.Limits.Run.Time, Output: s.Limits.Run.Output, Disk: s.Limits.Run.Disk})
	case parts[0] == "limits":
		step := parts[1]
		if step == everyStep {
			step = ""
		}
		text = limit(parts[2], s.Limits.Step[step])
	default:
		return list // compose and the lists
	}
	return append(list, Value{field, text})
}

func limit(name string, l StepLimits) string {
	switch name {
	case "time":
		return duration(l.Time)
	case "idle":
		return duration(l.Idle)
	case "output":
		return size(l.Output)
	}
	return size(l.Disk)
}

func duration(d time.Duration) string {
	if d <= 0 {
		return "none"
	}
	text := d.String()
	if strings.HasSuffix(text, "m0s") {
		text = strings.TrimSuffix(text, "0s")
	}
	if strings.HasSuffix(text, "h0m") {
		text = strings.TrimSuffix(text, "0m")
	}
	return text
}

func size(bytes int64) string {
	if bytes <= 0 {
		return "none"
	}
	for i := len(units) - 1; i >= 0; i-- {
		if unit := units[i]; bytes%int64(unit.bytes) == 0 {
			return fmt.Sprintf("%d%s", bytes/int64(unit.bytes), unit.name)
		}
	}
	return fmt.Sprintf("%dB", bytes)
}
