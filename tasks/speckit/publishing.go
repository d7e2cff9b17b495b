package speckit

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"github.com/moonladderstudios/mm-orchestrator/github"
	"github.com/moonladderstudios/mm-orchestrator/gitrepo"
)

// PullRequests is implemented by github.Client.
type PullRequests interface {
	Ensure(ctx context.Context, want github.Want) (github.Ensured, error)
}

// PublishConfig says how changes are published.
type PublishConfig struct {
	// PullRequests opens pull requests. nil means that nothing can be published.
	PullRequests PullRequests
	// BranchPrefix begins the name of every branch. Defaults to speckit/: Spec Kit's own
	// branches have the feature's name, and git cannot have both a and a/b.
	BranchPrefix string
	// Author is the author and the committer of commits. Defaults to
	// mm-orchestrator <mm-orchestrator@noreply.invalid>.
	Author gitrepo.Person
	// Trailers are added to each commit message, as Key: value.
	Trailers []string
	// Draft makes new pull requests drafts.
	Draft bool
	// Labels, Reviewers and Teams are those of pull requests.
	Labels, Reviewers, Teams []string
}

func (c PublishConfig) withDefaults() PublishConfig {
	if c.BranchPrefix == "" {
		c.BranchPrefix = "speckit/"
	}
	if c.Author == (gitrepo.Person{}) {
		c.Author = gitrepo.Person{Name: "mm-orchestrator", Email: "mm-orchestrator@noreply.invalid"}
	}
	return c
}

var trailer = regexp.MustCompile(`^[A-Za-z0-9-]+: \S[^\r\n]*$`)

// CheckTrailers returns an error that names a text which is no trailer.
func CheckTrailers(trailers []string) error {
	for _, text := range trailers {
		if !trailer.MatchString(text) {
			return fmt.Errorf("%.100q does not have the form Key: value", text)
		}
	}
	return nil
}

func (c PublishConfig) validate() error {
	c = c.withDefaults()
	if err := gitrepo.CheckBranch(c.BranchPrefix + "x"); err != nil || len(c.BranchPrefix) > 60 {
		return fmt.Errorf("speckit: Config.Publish.BranchPrefix is %.80q, want at most 60 bytes that a branch may begin with", c.BranchPrefix)
	}
	if err := CheckTrailers(c.Trailers); err != nil {
		return fmt.Errorf("speckit: Config.Publish.Trailers: %w", err)
	}
	if c.Author.Name == "" || c.Author.Email == "" {
		return errors.New("speckit: Config.Publish.Author needs a name and an address")
	}
	return nil
}

// branchName is the branch of a task of a feature: always the same. Names that git does
// not accept are made fit, and then have a hash, so that two tasks never share one.
func branchName(prefix, feature, task string) string {
	parts := strings.Split(feature, "/")
	for i := range parts {
		parts[i] = slug(parts[i])
	}
	parts = slices.DeleteFunc(parts, func(part string) bool { return part == "" })
	id := slug(strings.ToLower(task))
	name := strings.Join(append(parts, id), "/")
	if name != feature+"/"+strings.ToLower(task) || len(name) > 150 || id == "" {
		sum := sha256.Sum256([]byte(feature + "\x00" + task))
		if len(name) > 120 {
			name = strings.TrimRight(name[:120], "/.-")
		}
		name = strings.TrimSuffix(name, "/") + "-" + hex.EncodeToString(sum[:4])
	}
	return prefix + strings.TrimPrefix(name, "/")
}

// slug is a part of a branch name: letters, digits, and . _ - between them.
func slug(text string) string {
	var out strings.Builder
	for _, r := range text {
		switch {
		case r < 0x80 && (unicode.IsLetter(r) || unicode.IsDigit(r) || r == '_' || r == '.'):
			out.WriteRune(r)
		default:
			if !strings.HasSuffix(out.String(), "-") {
				out.WriteByte('-')
			}
		}
	}
	name := out.String()
	for strings.Contains(name, "..") {
		name = strings.ReplaceAll(name, "..", ".")
	}
	name = strings.Trim(name, ".-")
	if strings.HasSuffix(name, ".lock") {
		name = strings.TrimSuffix(name, ".lock") + "-lock"
	}
	return name
}

// The trailers by which a commit is known to be this program's.
const (
	trailerFeature = "Spec-Feature: "
	trailerTask    = "Spec-Task: "
	trailerRun     = "Spec-Run: "
)

// A description is what commit and pull request say about a change.
type description struct {
	run                           string
	attempt                       int
	feature, phase, taskID, title string
	// summary is what Codex has said at its end.
	summary string
	// files are the names of the first files that it changes, of changed files.
	files   []string
	changed int
	author  gitrepo.Person
	more    []string // trailers
}

// subject is the first line of the commit and the title of the pull request.
func (d description) subject(limit int) string {
	text := oneLineOf(d.taskID + ": " + d.title)
	if d.title == "" {
		text = oneLineOf(d.taskID + ": " + d.feature)
	}
	if runes := []rune(text); len(runes) > limit {
		text = strings.TrimSpace(string(runes[:limit-1])) + "…"
	}
	return text
}

// oneLineOf is a text in one line, without control characters.
func oneLineOf(text string) string {
	return strings.Join(strings.Fields(strings.Map(func(r rune) rune {
		if unicode.IsControl(r) && !unicode.IsSpace(r) || unicode.Is(unicode.Cf, r) {
			return -1
		}
		return r
	}, text)), " ")
}

// message is the message of the commit.
func (d description) message() string {
	lines := []string{d.subject(100), "", "Done by Codex for the feature " + oneLineOf(d.feature) + ".", ""}
	lines = append(lines, trailerFeature+oneLineOf(d.feature), trailerTask+oneLineOf(d.taskID), trailerRun+d.run)
	return strings.Join(append(lines, d.more...), "\n") + "\n"
}

// owns says that a commit is one that this program has made for the task, of this run or
// of another one.
func (d description) owns(tip gitrepo.Tip) bool {
	lines := strings.Split(strings.TrimSpace(tip.Message), "\n")
	return tip.Parents == 1 && tip.Committer == d.author &&
		slices.Contains(lines, trailerFeature+oneLineOf(d.feature)) && slices.Contains(lines, trailerTask+oneLineOf(d.taskID))
}

// maxSummary bounds what Codex has said, in the text of a pull request.
const maxSummary = 8000

// body is the text of the pull request. What a model has said stands in a code block:
// there it can neither notify people nor close issues.
func (d description) body() string {
	var out strings.Builder
	row := func(name, value string) {
		if value != "" {
			fmt.Fprintf(&out, "| %s | %s |\n", name, value)
		}
	}
	out.WriteString("| | |\n|---|---|\n")
	row("Feature", code(d.feature))
	row("Phase", code(d.phase))
	row("Task", code(d.taskID)+" "+code(d.title))
	row("Run", code(d.run)+", attempt "+strconv.Itoa(d.attempt))
	if text := strings.TrimSpace(d.summary); text != "" {
		if runes := []rune(text); len(runes) > maxSummary {
			text = string(runes[:maxSummary]) + "…"
		}
		fence := "```"
		for strings.Contains(text, fence) {
			fence += "`"
		}
		fmt.Fprintf(&out, "\nWhat Codex says:\n\n%stext\n%s\n%s\n", fence, text, fence)
	}
	fmt.Fprintf(&out, "\nChanged files (%d):\n\n", d.changed)
	for _, name := range d.files {
		fmt.Fprintf(&out, "- %s\n", code(name))
	}
	if more := d.changed - len(d.files); more > 0 {
		fmt.Fprintf(&out, "- and %d more\n", more)
	}
	return out.String()
}

// code is a text as code in a table of Markdown.
func code(text string) string {
	text = strings.NewReplacer("`", "'", "|", "¦").Replace(oneLineOf(text))
	if runes := []rune(text); len(runes) > 300 {
		text = string(runes[:300]) + "…"
	}
	if text == "" {
		return ""
	}
	return "`" + text + "`"
}
