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

// A setting is one value of the configuration: where it comes from, what it
// means, how it is read. The table of all settings drives parsing, the help
// texts, the config command and docs/configuration.md, so that none of them
// can say something that another does not do.
type setting struct {
	// flag is the name on the command line, or "" for values that must not
	// be given there: everybody on the machine sees command lines.
	flag string
	// form is what its value looks like, in a word or as the choices that
	// there are.
	form string
	// vars are the environment variables, the first that is set wins.
	vars []variable
	// def is the default, as one would write it. Settings without a default
	// have the meaning that defaultNote gives.
	def         string
	defaultNote string
	topic       topic
	// help says what it does, in sentences.
	help string
	// secret hides the whole value.
	secret bool
	// mask, if given, shows the value without the passwords inside it.
	mask func(text string) string
	// boolean settings may be given on the command line without a value.
	boolean bool
	// read parses text into the configuration. It is not called for a
	// setting without value and default.
	read func(c *configuration, text string) error
	// show, if given, is the effective value where that is not the text that
	// was read.
	show func(c *configuration) string
}

// variable is the name of an environment variable.
type variable struct {
	name string
	// emptyCounts: set to the empty text, it counts as set. For the others
	// empty is the same as unset, as for Python code that says `a or b`.
	emptyCounts bool
}

// topic groups settings in help texts, and says which commands read them.
type topic string

const (
	topicBroker   topic = "Broker"
	topicResults  topic = "Results"
	topicDatabase topic = "Database"
	topicFiles    topic = "Workspace and artifacts"
	topicSteps    topic = "Steps"
	topicStart    topic = "Start"
	topicProcess  topic = "Process"
	topicMetrics  topic = "Metrics and health"
)

// topics in the order in which they are explained.
var topics = []topic{topicBroker, topicResults, topicDatabase, topicFiles, topicSteps, topicStart, topicProcess, topicMetrics}

// redact returns the value of s as it may be shown.
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

// name is what the setting is called in errors when nobody has given it.
func (s setting) name() string { return s.vars[0].name }

// names lists variables, the preferred one first.
func names(list ...string) []variable {
	vars := make([]variable, len(list))
	for i, name := range list {
		vars[i] = variable{name: name}
	}
	return vars
}

// Readers of values. Their errors complete the sentence "NAME is VALUE: …".

func readText(field func(*configuration) *string) func(*configuration, string) error {
	return func(c *configuration, text string) error {
		if text == "" {
			return errors.New("it must not be empty")
		}
		if strings.ContainsAny(text, "\x00\r\n") {
			return errors.New("it must not hold line breaks or NUL")
		}
		*field(c) = text
		return nil
	}
}

// readOptionalText takes an empty text for an answer.
func readOptionalText(field func(*configuration) *string) func(*configuration, string) error {
	return func(c *configuration, text string) error {
		if strings.ContainsAny(text, "\x00\r\n") {
			return errors.New("it must not hold line breaks or NUL")
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

// readDuration takes what Go takes (90s, 1h30m) and a number of seconds.
func readDuration(field func(*configuration) *time.Duration, least time.Duration) func(*configuration, string) error {
	return func(c *configuration, text string) error {
		text = strings.TrimSpace(text)
		d, err := time.ParseDuration(text)
		if seconds, isNumber := strconv.ParseFloat(text, 64); isNumber == nil {
			// 10 years in seconds: far from overflow, and more than anybody means.
			if !(seconds >= 0 && seconds <= 315_360_000) {
				return errors.New("it must be a time such as 90s, 15m or 2h")
			}
			d, err = time.Duration(seconds*float64(time.Second)), nil
		}
		if err != nil {
			return errors.New("it must be a time such as 90s, 15m or 2h")
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

// splitList splits at commas and drops the white space around each part.
func splitList(text string) []string {
	var parts []string
	for part := range strings.SplitSeq(text, ",") {
		if part = strings.TrimSpace(part); part != "" {
			parts = append(parts, part)
		}
	}
	return parts
}
