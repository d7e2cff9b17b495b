package main

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/address"
	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
)

// setting is one value of the configuration: its sources, its meaning and its
// parser. Parsing, help texts, the command config and docs/configuration.md are
// all derived from the table of settings, so that they cannot contradict each
// other.
type setting struct {
	// flag is the flag's name, or "" for secrets, since all users of a machine can
	// see command lines.
	flag string
	// form is the placeholder for the value in help texts: a word, or the choices
	// separated by |.
	form string
	// vars are the environment variables; the first that is set wins.
	vars []variable
	// def is the default value as text, or "" for none. defaultNote explains the
	// default, or what happens without a value.
	def         string
	defaultNote string
	topic       topic
	// help explains the setting, in sentences.
	help string
	// secret: the whole value is secret.
	secret bool
	// mask, if not nil, removes the passwords in the value.
	mask func(text string) string
	// boolean: the flag may be given without a value.
	boolean bool
	// read parses text into the configuration. It is not called if there is
	// neither a value nor a default.
	read func(c *configuration, text string) error
	// show, if not nil, returns the effective value where that differs from the
	// text that was read.
	show func(c *configuration) string
}

// variable is the name of an environment variable.
type variable struct {
	name string
	// emptyCounts: an empty value counts as set. For other variables empty is the
	// same as unset, as in Python's `a or b`.
	emptyCounts bool
	// shared: other settings read it too. Both of MoonMind's workers read STATSD_HOST,
	// each for metrics of its own.
	shared bool
}

// topic is a group of settings, for help texts and for the commands that read it.
type topic string

const (
	topicBroker   topic = "Broker"
	topicResults  topic = "Results"
	topicDatabase topic = "Database"
	topicFiles    topic = "Workspace and artifacts"
	topicSteps    topic = "Steps"
	topicChanges  topic = "Changes and rollback"
	topicSpec     topic = "Spec workflow"
	topicSecrets  topic = "Secrets"
	topicStart    topic = "Start"
	topicProcess  topic = "Process"
	topicMetrics  topic = "Metrics and health"
)

// topics are all topics, in the order of the help texts.
var topics = []topic{topicBroker, topicResults, topicDatabase, topicFiles, topicSteps, topicChanges, topicSpec, topicSecrets, topicStart, topicProcess, topicMetrics}

// redact removes the secrets from a value of s.
func (s setting) redact(text string) string {
	switch {
	case s.secret:
		return secret.New(text).String()
	case s.mask != nil:
		return s.mask(text)
	case strings.Contains(text, "://") && strings.Contains(text, "@"):
		return address.SchemeOnly(text) // an address in the wrong place
	}
	return text
}

// name is the preferred variable, which errors name if the value is a default.
func (s setting) name() string { return s.vars[0].name }

// names makes variables, the preferred one first.
func names(list ...string) []variable {
	vars := make([]variable, len(list))
	for i, name := range list {
		vars[i] = variable{name: name}
	}
	return vars
}

// Parsers of values. Their errors continue "NAME is VALUE: ".

func readText(field func(*configuration) *string) func(*configuration, string) error {
	return func(c *configuration, text string) error {
		if text == "" {
			return errors.New("it must not be empty")
		}
		if strings.ContainsAny(text, "\x00\r\n") {
			return errors.New("it must not contain line breaks or NUL")
		}
		*field(c) = text
		return nil
	}
}

// maxName is the length of the longest name in AMQP, in bytes.
const maxName = 255

// readName is readText for a name that the broker gets.
func readName(field func(*configuration) *string) func(*configuration, string) error {
	return func(c *configuration, text string) error {
		if len(text) > maxName {
			return errLongName
		}
		return readText(field)(c, text)
	}
}

var errLongName = fmt.Errorf("a name has at most %d bytes", maxName)

// readOptionalText is readText, but accepts an empty text.
func readOptionalText(field func(*configuration) *string) func(*configuration, string) error {
	return func(c *configuration, text string) error {
		if strings.ContainsAny(text, "\x00\r\n") {
			return errors.New("it must not contain line breaks or NUL")
		}
		*field(c) = text
		return nil
	}
}

func readNumber(field func(*configuration) *int, least, most int) func(*configuration, string) error {
	return func(c *configuration, text string) error {
		n, err := strconv.Atoi(strings.TrimSpace(text))
		if err != nil || n < least || n > most {
			return fmt.Errorf("it must be a whole number from %d to %d", least, most)
		}
		*field(c) = n
		return nil
	}
}

func readBool(field func(*configuration) *bool) func(*configuration, string) error {
	return func(c *configuration, text string) error {
		switch strings.ToLower(strings.TrimSpace(text)) {
		case "true", "t", "yes", "y", "on", "1":
			*field(c) = true
		case "false", "f", "no", "n", "off", "0":
			*field(c) = false
		default:
			return errors.New("it must be true or false")
		}
		return nil
	}
}

func readChoice(field func(*configuration) *string, choices ...string) func(*configuration, string) error {
	return func(c *configuration, text string) error {
		text = strings.ToLower(strings.TrimSpace(text))
		for _, choice := range choices {
			if text == choice {
				*field(c) = text
				return nil
			}
		}
		return fmt.Errorf("it must be %s", oneOf(choices))
	}
}

// readDuration accepts Go's durations (90s, 1h30m) and a number of seconds.
func readDuration(field func(*configuration) *time.Duration, least time.Duration) func(*configuration, string) error {
	return func(c *configuration, text string) error {
		text = strings.TrimSpace(text)
		d, err := time.ParseDuration(text)
		if seconds, isNumber := strconv.ParseFloat(text, 64); isNumber == nil {
			// 10 years in seconds: no overflow, and more than any sensible value.
			if !(seconds >= 0 && seconds <= 315_360_000) {
				return errors.New("it must be a duration such as 90s, 15m or 2h")
			}
			d, err = time.Duration(seconds*float64(time.Second)), nil
		}
		if err != nil {
			return errors.New("it must be a duration such as 90s, 15m or 2h")
		}
		if d < least {
			return fmt.Errorf("it must be %s or more", least)
		}
		*field(c) = d
		return nil
	}
}

// oneOf writes "a, b or c".
func oneOf(words []string) string {
	if len(words) == 1 {
		return words[0]
	}
	return strings.Join(words[:len(words)-1], ", ") + " or " + words[len(words)-1]
}

// splitList splits at commas, trims white space, and drops empty parts.
func splitList(text string) []string {
	var parts []string
	for part := range strings.SplitSeq(text, ",") {
		if part = strings.TrimSpace(part); part != "" {
			parts = append(parts, part)
		}
	}
	return parts
}
