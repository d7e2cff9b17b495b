package policy

import (
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"unicode/utf8"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
)

// maxFile is the largest file that is read, maxDepth how deep its lists and mappings
// may be nested, in bytes and levels; the deepest field has 6. maxErrors is how many
// errors are told.
const (
	maxFile   = 64 << 10
	maxDepth  = 12
	maxErrors = 100
)

//go:embed profiles.yaml
var builtIn string

// BuiltInText is the built-in file, with its comments.
func BuiltInText() string { return builtIn }

var parsedDefault = sync.OnceValue(func() *Policy {
	r := &reader{policy: &Policy{Services: map[string]*Service{}}}
	r.read(builtIn)
	if len(r.errs) > 0 {
		panic("policy: the built-in profiles.yaml: " + r.errs.Error())
	}
	return r.policy
})

// Default returns the built-in policy, which is upstream's
// (docs/moonmind.md#service-profiles). The caller must not change it.
func Default() *Policy { return parsedDefault() }

// Load reads the operator's file over the built-in policy. If something is wrong in
// the file, the error is of type [Errors] and has all that is wrong.
func Load(path string) (*Policy, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, Errors{unreadable(path, err)}
	}
	defer file.Close()
	info, err := file.Stat()
	switch {
	case err != nil:
		return nil, Errors{unreadable(path, err)}
	case info.IsDir():
		// Docker makes a folder where a file to be mounted is missing.
		return nil, Errors{{File: path, Problem: "it is a directory", Cure: "If it is a mount, the file is missing at its source, and docker has made a directory there: remove that, put the file there, and create the container again"}}
	case !info.Mode().IsRegular():
		return nil, Errors{{File: path, Problem: "it is not a regular file"}}
	}
	text, err := io.ReadAll(io.LimitReader(file, maxFile+1))
	if err != nil {
		return nil, Errors{unreadable(path, err)}
	}
	return Parse(path, string(text))
}

func unreadable(path string, err error) *Error {
	reason, cure := err, "Correct the path, or mount the file there"
	var of *os.PathError
	if errors.As(err, &of) {
		reason = of.Err
	}
	if errors.Is(err, os.ErrPermission) {
		cure = "Let the worker's user read it"
	}
	return &Error{File: path, Problem: "it cannot be read: " + reason.Error(), Cure: cure}
}

// Parse is Load for the text of a file. name is the file's name for messages.
func Parse(name, text string) (*Policy, error) {
	r := &reader{file: name, base: Default().Services, policy: &Policy{File: name, Services: map[string]*Service{}, Redaction: Default().Redaction}}
	for service, s := range Default().Services {
		c := s.clone()
		r.policy.Services[service] = &c
	}
	r.read(text)
	if len(r.errs) > 0 {
		r.errs.sort()
		if more := len(r.errs) - maxErrors; more > 0 {
			r.errs = append(r.errs[:maxErrors], &Error{File: name, Problem: fmt.Sprintf("%d more errors", more)})
		}
		return nil, r.errs
	}
	return r.policy, nil
}

// read reads a whole file.
func (r *reader) read(text string) {
	text = strings.TrimPrefix(text, "\ufeff")
	if !r.readable(text) {
		return
	}
	file, err := parseYAML(text)
	if err != nil {
		r.syntax(err)
		return
	}
	documents := 0
	for _, doc := range file.Docs {
		if doc.Body == nil {
			continue
		}
		if _, isComment := doc.Body.(*ast.CommentGroupNode); isComment {
			continue
		}
		if documents++; documents > 1 {
			r.fail(doc.Body, "", "the file has more than one document", "Remove the line ---")
			return
		}
		r.document(doc.Body)
	}
}

// parseYAML returns the syntax tree. A panic of the parser becomes an error: the file
// is what an operator has typed.
func parseYAML(text string) (file *ast.File, err error) {
	defer func() {
		if thrown := recover(); thrown != nil {
			file, err = nil, errors.New("it is not YAML that can be read")
		}
	}()
	return parser.ParseBytes([]byte(text), 0, parser.AllowDuplicateMapKey()) // fields tells about duplicates, with both lines
}

// syntax tells about an error of the parser, of which there is only the first.
func (r *reader) syntax(err error) {
	e := &Error{File: r.file, Problem: err.Error()}
	var of *yaml.SyntaxError
	if errors.As(err, &of) {
		e.Problem = of.Message
		if of.Token != nil && of.Token.Position != nil {
			e.Line, e.Column = of.Token.Position.Line, of.Token.Position.Column
		}
	}
	e.Problem, _, _ = strings.Cut(e.Problem, "\n")
	e.Problem = "this is not YAML: " + e.Problem
	e.Cure = "Look at this line and the one before it: the indentation, a missing colon or quote. Other errors are only found when this one is corrected"
	r.errs = append(r.errs, e)
}

// readable looks at the text before it is parsed, for what would make the parser
// slow, or its message useless.
func (r *reader) readable(text string) bool {
	if len(text) > maxFile {
		r.errs = append(r.errs, &Error{File: r.file, Problem: fmt.Sprintf("it is larger than %d KiB", maxFile>>10), Cure: "Is it the right file? A policy needs a few KiB"})
		return false
	}
	before := len(r.errs)
	depth := 0
	for i, line := range strings.Split(text, "\n") {
		fail := func(at int, problem, cure string) {
			r.errs = append(r.errs, &Error{File: r.file, Line: i + 1, Column: utf8.RuneCountInString(line[:at]) + 1, Problem: problem, Cure: cure})
		}
		line = strings.TrimSuffix(line, "\r")
		indent := strings.TrimLeft(line, " ")
		if strings.HasPrefix(indent, "\t") && strings.TrimSpace(line) != "" {
			fail(len(line)-len(indent), "a tab in the indentation", "Use spaces")
		}
		if at := strings.IndexFunc(line, func(c rune) bool { return c < ' ' && c != '\t' || c == 0x7f }); at >= 0 {
			fail(at, fmt.Sprintf("a control character (%U)", line[at]), "Remove it")
		} else if !utf8.ValidString(line) {
			fail(0, "a character that is not UTF-8", "Save the file as UTF-8")
		}
		if strings.HasPrefix(indent, "#") {
			continue
		}
		// Brackets in quotes count too: no file of a person comes near the limit.
		depth += strings.Count(line, "[") + strings.Count(line, "{")
		if depth-strings.Count(line, "]")-strings.Count(line, "}") > maxDepth*8 || strings.Count(line, "- - ") > maxDepth || strings.Count(line, "? ") > maxDepth || len(line)-len(indent) > maxDepth*16 {
			fail(0, "it is nested too deeply", "No field is more than 6 levels deep")
			return false
		}
		depth = max(0, depth-strings.Count(line, "]")-strings.Count(line, "}"))
	}
	return len(r.errs) == before
}
