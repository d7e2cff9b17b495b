package credential

import (
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"strings"
)

// A Source says where a credential is kept. [Parse] makes one; the zero value is none.
//
//	env:NAME            the variable NAME; of env:NAME,OTHER the first that is set
//	file:/path          a file with the credential and nothing else
//	command:program …   the first line that a program prints
type Source struct {
	// text is the source as it was written.
	text string
	// One of these is set.
	variables []string
	file      string
	argv      []string
}

// String returns the source as it was written.
func (s Source) String() string { return s.text }

// IsZero reports whether there is no source.
func (s Source) IsZero() bool { return s.text == "" }

// Variables are the names of an env: source, nil for any other.
func (s Source) Variables() []string { return s.variables }

// File is the path of a file: source, "" for any other.
func (s Source) File() string { return s.file }

var variableName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

// githubToken is how tokens of GitHub begin, and no variable of anybody.
var githubToken = regexp.MustCompile(`^(gh[pousr]_|github_pat_)`)

// Parse parses the text of a source. It opens nothing and starts nothing. Errors do not
// contain the text: whoever writes the credential itself by mistake must not find it in
// a log.
func Parse(text string) (Source, error) {
	text = strings.TrimSpace(text)
	kind, rest, found := strings.Cut(text, ":")
	rest = strings.TrimSpace(rest)
	source := Source{text: text}
	switch {
	case !found:
		return Source{}, errors.New("it must be env:NAME, file:/path or command:program and its arguments, not the credential itself")
	case kind == "env":
		for name := range strings.SplitSeq(rest, ",") {
			name = strings.TrimSpace(name)
			// A GitHub token has the form of a name.
			if !variableName.MatchString(name) || githubToken.MatchString(name) {
				return Source{}, errors.New("after env: it must have the name of a variable, or several names separated by commas, not the credential itself")
			}
			source.variables = append(source.variables, name)
		}
	case kind == "file":
		if !filepath.IsAbs(rest) || strings.ContainsRune(rest, 0) {
			return Source{}, errors.New("after file: it must have an absolute path, such as file:/run/secrets/github_token")
		}
		source.file = filepath.Clean(rest)
	case kind == "command":
		var err error
		if source.argv, err = words(rest); err != nil {
			return Source{}, err
		}
	default:
		return Source{}, errors.New("its beginning must be one of env:, file: and command: in lower case")
	}
	return source, nil
}

// words splits a command line at white space. Quotes and backslashes work as in a shell;
// nothing else does, and what only a shell would understand is refused.
func words(line string) (list []string, err error) {
	var word strings.Builder
	inWord := false
	end := func() {
		if inWord {
			list = append(list, word.String())
		}
		word.Reset()
		inWord = false
	}
	for rest := line; rest != ""; {
		c := rest[0]
		rest = rest[1:]
		switch {
		case c == 0:
			return nil, errors.New("the command has a NUL character")
		case c == ' ' || c == '\t' || c == '\n' || c == '\r':
			end()
			continue
		case c == '\'':
			quoted, after, closed := strings.Cut(rest, "'")
			if !closed {
				return nil, errors.New("the command has a quote that is not closed")
			}
			word.WriteString(quoted)
			rest = after
		case c == '"':
			for {
				if rest == "" {
					return nil, errors.New("the command has a quote that is not closed")
				}
				c, rest = rest[0], rest[1:]
				if c == '"' {
					break
				}
				if c == '\\' && rest != "" && strings.ContainsRune(`"\$`+"`", rune(rest[0])) {
					c, rest = rest[0], rest[1:]
				}
				word.WriteByte(c)
			}
		case c == '\\':
			if rest == "" {
				return nil, errors.New("the command ends with a backslash")
			}
			word.WriteByte(rest[0])
			rest = rest[1:]
		case strings.ContainsRune("|&;<>$`", rune(c)):
			return nil, fmt.Errorf("the command has the character %c, but no shell runs it: quote it if it is meant as it is, or write a script and name that", c)
		default:
			word.WriteByte(c)
		}
		inWord = true
	}
	end()
	if len(list) == 0 || list[0] == "" {
		return nil, errors.New("after command: it must have a program, such as command:pass show github/token")
	}
	return list, nil
}
