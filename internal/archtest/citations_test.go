package archtest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode"
)

// A citation is docs/celery.md#retries: a page, from the top of the repository
// or from the folder of the file that cites it, and one of its headings.
//
// No other form is allowed: section numbers change when a page is edited, and a
// reader cannot open a document outside of the repository.

// fault is a citation that a reader cannot follow.
type fault struct {
	file string
	line int
	what string
	cure string
}

func (f fault) String() string {
	return fmt.Sprintf("%s:%d: %s.\n\tCure: %s.", f.file, f.line, f.what, f.cure)
}

func TestCitationsCanBeFollowed(t *testing.T) {
	t.Parallel()
	tree := readTree(t)
	for _, f := range tree.faults() {
		t.Error(f)
	}
}

// tree is every text file of the repository, by its path from the top.
type tree map[string]string

// readTree reads all files except for .git and the top-level folders that
// .gitignore names, such as /var/.
func readTree(t *testing.T) tree {
	t.Helper()
	top := filepath.Join("..", "..")
	ignored, err := os.ReadFile(filepath.Join(top, ".gitignore"))
	if err != nil {
		t.Fatal(err)
	}
	skipped := strings.Fields(string(ignored))
	files := tree{}
	err = filepath.WalkDir(top, func(file string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(top, file)
		if err != nil {
			return err
		}
		name = filepath.ToSlash(name)
		switch {
		case entry.IsDir() && (name == ".git" || slices.Contains(skipped, "/"+name+"/") || slices.Contains(skipped, entry.Name()+"/")):
			return filepath.SkipDir
		case !entry.Type().IsRegular() || name == ".git":
			return nil
		}
		text, err := os.ReadFile(file)
		if err == nil && !bytes.Contains(text, []byte{0}) {
			files[name] = string(text)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

const (
	celeryPage   = "docs/celery.md"
	moonmindPage = "docs/moonmind.md"
)

var (
	address     = regexp.MustCompile(`[A-Za-z][A-Za-z0-9+.-]*://\S+`)
	citation    = regexp.MustCompile(`((?:[A-Za-z0-9_.-]+/)*[A-Za-z0-9_-]+\.md)\b(?:#([A-Za-z0-9_-]*[A-Za-z0-9_]))?`)
	commentMark = regexp.MustCompile(`//|#|--`)
	ownHeading  = regexp.MustCompile(`\]\(#([^)]*)\)`)
	defectID    = regexp.MustCompile(`^[ACFR][0-9]+$`)
)

// notPages are files of other repositories that code and pages write about: that of
// the Spec workflow, and those of its simulated patch.
var notPages = []string{"tasks.md", "a/README.md", "b/README.md"}

// forbidden are forms of citation that a reader cannot follow. They are searched
// for in text without comment marks and line ends, since comments are wrapped.
var forbidden = []struct {
	pattern *regexp.Regexp
	what    string
}{
	{regexp.MustCompile(`(?i)\bcontract[ ,]+(?:section ?)?(?:[0-9]+(?:\.[0-9]+)*\b|[a-z-]+\.md|celery-worker)`), "cites a document that is not in the repository"},
	{regexp.MustCompile(`\bcelery-worker(?:\.md| [0-9]+\.[0-9])`), "cites a document that is not in the repository"},
	{regexp.MustCompile(`\.md\)? (?:section )?[0-9]+(?:\.[0-9]+)*\b`), "cites a page by a number"},
	{regexp.MustCompile(`\.\./shared\b`), "names a folder that is not in the repository"},
}

// isForeign reports whether a file is captured or generated text, which is kept
// unchanged.
func isForeign(name string) bool {
	return name == "go.sum" || strings.Contains("/"+name, "/testdata/") && strings.HasSuffix(name, ".json")
}

// faults returns all citations that a reader cannot follow, in the order of files
// and lines.
func (files tree) faults() []fault {
	headings := map[string][]string{}
	for name, text := range files {
		if strings.HasSuffix(name, ".md") {
			headings[name] = headingsOf(text)
		}
	}
	var found []fault
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if isForeign(name) {
			continue
		}
		inFile := unfindable(name, files[name], headings[moonmindPage])
		for i, line := range strings.Split(files[name], "\n") {
			for _, f := range dangling(name, line, headings) {
				f.file, f.line = name, i+1
				inFile = append(inFile, f)
			}
		}
		// Only the first fault of each line is reported: its cure is the best one.
		slices.SortStableFunc(inFile, func(a, b fault) int { return a.line - b.line })
		found = append(found, slices.CompactFunc(inFile, func(a, b fault) bool { return a.line == b.line })...)
	}
	return found
}

// dangling returns the citations in a line whose page or heading does not exist.
func dangling(name, line string, headings map[string][]string) []fault {
	var found []fault
	commented := ""
	if at := commentMark.FindStringIndex(line); at != nil {
		commented = line[at[1]:]
	}
	for _, match := range citation.FindAllStringSubmatch(address.ReplaceAllString(line, ""), -1) {
		page, heading := match[1], match[2]
		if slices.Contains(notPages, page) {
			continue
		}
		if heading == "" && !strings.HasSuffix(name, ".md") && !strings.Contains(commented, page) {
			continue // the name of a file that the program uses
		}
		known, exists := headings[path.Join(path.Dir(name), page)]
		if !exists {
			known, exists = headings[path.Clean(page)]
		}
		switch {
		case !exists:
			found = append(found, fault{
				what: fmt.Sprintf("there is no page %s", page),
				cure: fmt.Sprintf("cite one of %s, by its path from the top of the repository", strings.Join(slices.Sorted(maps.Keys(headings)), ", ")),
			})
		case heading != "" && !slices.Contains(known, heading):
			found = append(found, noHeading(page, heading, known))
		}
	}
	if strings.HasSuffix(name, ".md") {
		for _, match := range ownHeading.FindAllStringSubmatch(line, -1) {
			if !slices.Contains(headings[name], match[1]) {
				found = append(found, noHeading(name, match[1], headings[name]))
			}
		}
	}
	return found
}

func noHeading(page, heading string, known []string) fault {
	known = slices.DeleteFunc(slices.Clone(known), func(h string) bool { return defectID.MatchString(strings.ToUpper(h)) })
	return fault{
		what: fmt.Sprintf("%s has no heading #%s", page, heading),
		cure: fmt.Sprintf("cite one that it has, or add it to the page. It has %s", strings.Join(known, ", ")),
	}
}

// unfindable returns citations by section number, of documents outside of the
// repository, and by the id of a defect alone.
func unfindable(name, text string, known []string) []fault {
	var found []fault
	joined, lineOf := unwrap(text)
	for _, f := range forbidden {
		for _, at := range f.pattern.FindAllStringIndex(joined, -1) {
			found = append(found, fault{
				file: name, line: lineOf(at[0]),
				what: fmt.Sprintf("%q %s", joined[at[0]:at[1]], f.what),
				cure: fmt.Sprintf("cite a heading, such as %s#retries or %s#the-plan; if there is none, add one", celeryPage, moonmindPage),
			})
		}
	}
	if strings.HasSuffix(name, ".md") {
		return found // pages link ids, which dangling checks
	}
	for _, at := range bareID.FindAllStringSubmatchIndex(joined, -1) {
		id := joined[at[2]:at[3]]
		if heading := strings.ToLower(id); slices.Contains(known, heading) {
			found = append(found, fault{
				file: name, line: lineOf(at[2]),
				what: fmt.Sprintf("%s alone does not say where it is explained", id),
				cure: fmt.Sprintf("write %s#%s", moonmindPage, heading),
			})
		}
	}
	return found
}

// bareID matches the id of a defect. It does not match after a dash, where the text
// is a flag, nor in quotes.
var bareID = regexp.MustCompile(`(?:^|[\s(])([ACFR][0-9]{1,2})\b`)

var lineStart = regexp.MustCompile(`\n[ \t]*(?://|#|--|\*)?[ \t]*`)

// unwrap joins the lines of comments, and says in which line a place of the
// result was.
func unwrap(text string) (joined string, lineOf func(int) int) {
	var out strings.Builder
	var starts []int // of each line but the first, in the result
	last := 0
	for _, at := range lineStart.FindAllStringIndex(text, -1) {
		out.WriteString(text[last:at[0]])
		out.WriteByte(' ')
		// A mark's white space may span empty lines.
		for range strings.Count(text[at[0]:at[1]], "\n") {
			starts = append(starts, out.Len())
		}
		last = at[1]
	}
	out.WriteString(text[last:])
	return out.String(), func(at int) int {
		line, exact := slices.BinarySearch(starts, at)
		if exact {
			line++
		}
		return line + 1
	}
}

// headingsOf returns the anchors of a page, formed as code forges do: lower case,
// dashes for blanks, only letters, digits, dashes and underscores, and a number
// for a repeated heading.
func headingsOf(page string) []string {
	var anchors []string
	fenced := false
	for line := range strings.SplitSeq(page, "\n") {
		if strings.HasPrefix(line, "```") {
			fenced = !fenced
		}
		title := strings.TrimLeft(line, "#")
		if fenced || title == line || !strings.HasPrefix(title, " ") {
			continue
		}
		anchor := strings.Map(func(r rune) rune {
			switch {
			case unicode.IsLetter(r), unicode.IsDigit(r), r == '-', r == '_':
				return unicode.ToLower(r)
			case r == ' ':
				return '-'
			}
			return -1
		}, strings.TrimSpace(title))
		free := anchor
		for n := 1; slices.Contains(anchors, free); n++ {
			free = fmt.Sprintf("%s-%d", anchor, n)
		}
		anchors = append(anchors, free)
	}
	return anchors
}

func TestFaultsOfCitations(t *testing.T) {
	t.Parallel()
	page := "# The page\n\n## Retries, and `more`\n\n```\n## no heading\n```\n\n### R~5\n\nSee [above](#retries-and-more).\n"
	// The test checks this file too. A ~ in each text, which is removed before
	// use, prevents it from finding itself.
	for name, test := range map[string]struct {
		file, text string
		want       []string
	}{
		"a heading":                {"worker/a.go", "// See docs/moonmind~.md#retries-and-more.\n", nil},
		"a defect":                 {"store/a.sql", "-- repaired (docs/moonmind~.md#r5)\n", nil},
		"a page":                   {"worker/a.go", "// README~.md and docs/moonmind~.md say so.\n", nil},
		"a page beside":            {"docs/other~.md", "[it](moonmind~.md#r5), [that](../README~.md)\n", nil},
		"an address":               {"a.go", "// https://example.org/none~.md#nothing\n", nil},
		"a file":                   {"a.go", "write(\"notes~.md\") // as people do\n", nil},
		"a word":                   {"a.go", "// The JSON form is a con~tract: 2 fields.\n", nil},
		"an id of nothing":         {"a.go", "// F~16 is a plane\n", nil},
		"a flag":                   {"a.go", "run(\"git\", \"-R~5\", \"R~5\")\n", nil},
		"others' words":            {"testdata/a.json", "{\"a\": \"docs/none~.md#a\"}", nil},
		"no such heading":          {"a.go", "package a\n\n// docs/moonmind~.md#retry\n", []string{"a.go:3: docs/moonmind~.md has no heading #retry"}},
		"a fenced heading":         {"a.go", "// docs/moonmind~.md#no-heading\n", []string{"a.go:1: docs/moonmind~.md has no heading #no-heading"}},
		"no such page":             {"a.go", "// docs/moon~.md says so\n", []string{"a.go:1: there is no page docs/moon~.md"}},
		"no such page in a text":   {"a.go", "fail(\"see docs/moon~.md#r5\")\n", []string{"a.go:1: there is no page docs/moon~.md"}},
		"a page of another folder": {"a.go", "// moonmind~.md#r5\n", []string{"a.go:1: there is no page moonmind~.md"}},
		"a link within a page":     {"README~.md", "# A\n[b](#b)\n", []string{"README~.md:2: README~.md has no heading #b"}},
		"a section":                {"a.go", "\n// (con~tract 6.1)\n", []string{"a.go:2: \"con~tract 6.1\" cites a document"}},
		"a wrapped section":        {"a.go", "\n\t// as said (con~tract\n\t// 6.1)\n", []string{"a.go:2: \"con~tract 6.1\" cites a document"}},
		"a page by number":         {"a.go", "// docs/moonmind~.md ~6.1\n", []string{"a.go:1: \"~.md ~6.1\" cites a page by a number"}},
		"a bare id":                {"a.go", "//\n// the highest (R~5)\n", []string{"a.go:2: R~5 alone does not say"}},
		"two in two lines":         {"a.go", "// R~5 and R~5\n// R~5\n", []string{"a.go:1: R~5 alone", "a.go:2: R~5 alone"}},
		"another folder":           {"a.py", "# ../~shared/x\n", []string{"a.py:1: \"../~shared\" names a folder"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			plain := func(text string) string { return strings.ReplaceAll(text, "~", "") }
			files := tree{moonmindPage: plain(page), "README.md": "# Read me\n"}
			files[plain(test.file)] = plain(test.text)
			got := files.faults()
			if len(got) != len(test.want) {
				t.Fatalf("faults are %v, want %v", got, test.want)
			}
			for i, want := range test.want {
				if text := got[i].String(); !strings.HasPrefix(text, plain(want)) || !strings.Contains(text, "Cure: ") {
					t.Errorf("fault is %q, want %q", text, want)
				}
			}
		})
	}
}

// TestCapturesExist: docs/celery.md names captures as worker:success, which is
// the scenario success in each testdata/celery/worker_celery-*.json.
func TestCapturesExist(t *testing.T) {
	t.Parallel()
	tree := readTree(t)
	scenarios := map[string][]map[string]json.RawMessage{}
	versioned := regexp.MustCompile(`^testdata/celery/(.+)_celery-[0-9.]+\.json$`)
	for name, text := range tree {
		match := versioned.FindStringSubmatch(name)
		if match == nil {
			continue
		}
		var file struct {
			Scenarios map[string]json.RawMessage `json:"scenarios"`
		}
		if err := json.Unmarshal([]byte(text), &file); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		kind := strings.Replace(match[1], "producer_protocol1", "protocol1", 1)
		scenarios[kind] = append(scenarios[kind], file.Scenarios)
	}
	named := 0
	for i, line := range strings.Split(tree[celeryPage], "\n") {
		for _, match := range regexp.MustCompile("`([a-z_0-9]+):([a-z_0-9]+)`").FindAllStringSubmatch(line, -1) {
			named++
			if !slices.ContainsFunc(scenarios[match[1]], func(file map[string]json.RawMessage) bool { return file[match[2]] != nil }) {
				t.Errorf("%s:%d: no %s capture in testdata/celery has a scenario %s.\n\tCure: name one of those files' scenarios, or mark the fact as observed or source.",
					celeryPage, i+1, match[1], match[2])
			}
		}
	}
	if named == 0 {
		t.Errorf("%s names no captures: if its notation has changed, change this test", celeryPage)
	}
}
