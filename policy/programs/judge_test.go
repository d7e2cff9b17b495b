package programs

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// cases reads a file of testdata. A line has the rule, if any, a tab and a command line,
// whose words are separated by spaces; a part in quotes may have spaces. Lines that
// begin with # are comments.
func cases(t testing.TB, name string) (rules []string, lines [][]string) {
	t.Helper()
	content, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	for text := range strings.Lines(string(content)) {
		text = strings.TrimSuffix(text, "\n")
		if text == "" || text[0] == '#' {
			continue
		}
		rule, command, found := strings.Cut(text, "\t")
		if !found {
			rule, command = "", text
		}
		rules = append(rules, rule)
		lines = append(lines, split(command))
	}
	return rules, lines
}

func split(text string) (words []string) {
	word, quoted, begun := "", false, false
	for _, r := range text + " " {
		switch {
		case r == '\'':
			quoted, begun = !quoted, true
		case r == ' ' && !quoted:
			if begun {
				words = append(words, word)
			}
			word, begun = "", false
		default:
			word, begun = word+string(r), true
		}
	}
	return words
}

func line(argv []string) Line {
	return Line{Argv: argv, Workspace: "/workspace", Project: "moonmind", Service: "api"}
}

// ruleOf is the rule that refuses a line, "" for none.
func ruleOf(l Line) string {
	if refusal := Judge(l); refusal != nil {
		return refusal.Rule
	}
	return ""
}

func TestRefused(t *testing.T) {
	t.Parallel()
	rules, lines := cases(t, "refused.txt")
	if len(lines) < 100 {
		t.Errorf("%d command lines", len(lines))
	}
	described, _ := Describe()
	for i, argv := range lines {
		refusal := Judge(line(argv))
		switch {
		case refusal == nil:
			t.Errorf("%q is allowed, want %s", argv, rules[i])
		case refusal.Rule != rules[i]:
			t.Errorf("%q is refused by %s: %s; want %s", argv, refusal.Rule, refusal, rules[i])
		case !slices.ContainsFunc(described, func(r Rule) bool { return r.Name == refusal.Rule && r.What != "" }):
			t.Errorf("Describe has no rule %s", refusal.Rule)
		case refusal.Why == "" || strings.HasSuffix(refusal.Why, "."):
			t.Errorf("%q: why is %q", argv, refusal.Why)
		}
	}
}

func TestAllowed(t *testing.T) {
	t.Parallel()
	_, lines := cases(t, "allowed.txt")
	if len(lines) < 60 {
		t.Errorf("%d command lines", len(lines))
	}
	for _, argv := range lines {
		if refusal := Judge(line(argv)); refusal != nil {
			t.Errorf("%q is refused by %s: %s", argv, refusal.Rule, refusal)
		}
	}
}

// Without a project and a service, every project and service is the run's.
func TestNoTarget(t *testing.T) {
	t.Parallel()
	for _, text := range []string{"docker compose -p other up -d x", "docker compose restart", "docker stop x"} {
		l := line(split(text))
		l.Project, l.Service = "", ""
		if rule := ruleOf(l); rule != "" {
			t.Errorf("%s is refused by %s", text, rule)
		}
	}
}

func TestAnyProject(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{"docker compose -p other up -d api": "", "docker stop other-api-1": "docker.other-container"} {
		l := line(split(text))
		l.AnyProject = true
		if rule := ruleOf(l); rule != want {
			t.Errorf("%s is refused by %q, want %q", text, rule, want)
		}
	}
}

// What permits a refused word is what the refusal says.
func TestRefusalsSayWhatPermits(t *testing.T) {
	t.Parallel()
	_, lines := cases(t, "refused.txt")
	for _, argv := range lines {
		l := line(argv)
		for range 10 {
			refusal := Judge(l)
			if refusal == nil {
				break
			}
			p := Permission{Command: refusal.Command}
			if refusal.Option != "" {
				p.Options = []string{refusal.Option}
			}
			if refusal.Directory != "" {
				p.Directories = []string{refusal.Directory}
			}
			l.Permit = append(l.Permit, p)
		}
		if rule := ruleOf(l); rule != "" {
			t.Errorf("%q is refused by %s in spite of %+v", argv, rule, l.Permit)
		}
	}
}

func TestPermissions(t *testing.T) {
	t.Parallel()
	options := func(command string, options ...string) Permission {
		return Permission{Command: command, Options: options}
	}
	for _, test := range []struct {
		command string
		permit  Permission
		rule    string // that still refuses
	}{
		{"git commit", options("git commit"), ""},
		{"git commit -m x", options("git commit"), "git.history"},
		{"git commit -m x", options("git commit", "-m="), ""},
		{"git commit -mx --amend", options("git commit", "-m=", "--amend"), ""},
		{"git commit -m x --exec=sh", options("git commit", "-m="), "git.runs"},
		{"git commit /etc/passwd", options("git commit"), "path.outside"},
		{"git -c alias.x=!sh commit", options("git commit", "*"), "git.setting"},
		{"git -c alias.x=!sh x", options("git", "*"), ""},
		{"docker-compose exec api sh -c x", options("docker compose exec", "*"), ""},
		{"docker compose exec api sh", options("docker-compose exec", "*"), ""},
		{"docker compose -p other exec api sh", options("docker compose exec", "*"), "compose.other-project"},
		{"docker compose -p other up -d api", options("docker compose", "-p="), ""},
		{"docker compose --project-name=other up api", options("docker compose", "--project-name="), ""},
		{"docker compose up -d api worker", options("docker compose up", "worker"), ""},
		{"docker compose up -d", options("docker compose up", "*"), ""},
		{"docker compose build --with-dependencies api", options("docker compose build", "--with-dependencies"), ""},
		{"docker compose up --scale worker=2 api", options("docker compose up", "worker"), ""},
		{"docker compose stop worker", options("docker compose up", "worker"), "compose.other-service"},
		{"docker container run x", options("docker run", "*"), ""},
		{"docker run x", options("docker container run", "*"), ""},
		{"docker restart db", options("docker restart", "db"), ""},
		{"docker compose exec api sh", options("docker", "*"), ""},
		{"docker run x", options("git", "*"), "docker.runs"},
	} {
		l := line(split(test.command))
		l.Permit = []Permission{test.permit}
		if got := ruleOf(l); got != test.rule {
			t.Errorf("%s with %+v: refused by %q, want %q", test.command, test.permit, got, test.rule)
		}
	}
}

func TestDirectories(t *testing.T) {
	t.Parallel()
	top := t.TempDir()
	workspace, elsewhere := filepath.Join(top, "workspace"), filepath.Join(top, "elsewhere")
	for _, dir := range []string{workspace, elsewhere, filepath.Join(workspace, "sub")} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"out", "sub/out"} {
		if err := os.Symlink(elsewhere, filepath.Join(workspace, name)); err != nil {
			t.Fatal(err)
		}
	}
	resolve := func(path string) string {
		real, err := filepath.EvalSymlinks(path)
		if err == nil {
			return real
		}
		if real, err = filepath.EvalSymlinks(filepath.Dir(path)); err == nil {
			return filepath.Join(real, filepath.Base(path))
		}
		return path
	}
	for _, test := range []struct{ dir, command, rule string }{
		{workspace, "git status", ""},
		{workspace + "/sub", "git status", ""},
		{workspace + "/sub", "git add " + workspace + "/file", ""},
		{workspace + "/sub", "git add ../file", "path.outside"},
		{elsewhere, "git status", "path.directory"},
		{workspace + "/out", "git status", "path.directory"},
		{workspace + "/../elsewhere", "docker compose build api", "path.directory"},
		{workspace, "docker build out", "path.link"},
		{workspace, "docker build -f out/Dockerfile .", "path.link"},
		{workspace + "/sub", "docker compose -f out up", "path.link"},
		{workspace, "git apply out", "path.link"},
	} {
		l := line(split(test.command))
		l.Workspace, l.Dir, l.Resolve = workspace, test.dir, resolve
		if got := ruleOf(l); got != test.rule {
			t.Errorf("%s in %s: refused by %q, want %q", test.command, test.dir, got, test.rule)
		}
	}
	l := line(split("git add " + elsewhere + "/file"))
	l.Workspace, l.Dir, l.Resolve = workspace, elsewhere, resolve
	l.Permit = []Permission{{Command: "git", Directories: []string{elsewhere}}}
	if rule := ruleOf(l); rule != "" {
		t.Errorf("in a permitted directory: refused by %s", rule)
	}
	l.Argv = split("git add " + workspace + "/file")
	if rule := ruleOf(l); rule != "path.outside" {
		t.Errorf("from a permitted directory to the workspace: %q", rule)
	}
}

func TestProgramsWithoutRules(t *testing.T) {
	t.Parallel()
	for _, argv := range [][]string{nil, {"make", "/etc"}, {"sh", "-c", "!"}, {"gitk", "-c"}} {
		if rule := ruleOf(line(argv)); rule != "" {
			t.Errorf("%q: %s", argv, rule)
		}
	}
	for name, want := range map[string]bool{"git": true, "/usr/bin/git": true, "docker": true, "docker-compose": true, "./docker": true, "sh": false} {
		if got := Judged(name); got != want {
			t.Errorf("%s: %v", name, got)
		}
	}
	if ruleOf(line([]string{"/usr/bin/docker", "run", "x"})) == "" {
		t.Error("the path of a program is not judged")
	}
}

func TestSubcommand(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]int{
		"git": 1, "git status": 1, "git --no-pager log": 2, "git -c user.name=diff -P show HEAD": 4, "git -C x status": 3,
	} {
		if got := Subcommand(split(text)); got != want {
			t.Errorf("%s: %d, want %d", text, got, want)
		}
	}
}

// isText says that a word is the value of an option that takes any text, or contains it.
func isText(argv []string, at int) bool {
	for _, name := range argv[max(0, at-1) : at+1] {
		name, _, _ := strings.Cut(name, "=")
		for _, p := range everyProgram {
			for _, c := range p.commands {
				for option, is := range c.options {
					short := len(option) == 2 && strings.HasPrefix(name, "-") && !strings.HasPrefix(name, "--") && strings.Contains(name, option[1:])
					if (is == text || is == assignment) && (name == option || short) {
						return true
					}
				}
			}
		}
	}
	return false
}

// No command line with a path outside of the workspace, or with a setting of git that
// starts a program, is allowed.
func FuzzJudge(f *testing.F) {
	for _, name := range []string{"refused.txt", "allowed.txt"} {
		_, lines := cases(f, name)
		for _, argv := range lines {
			f.Add(strings.Join(argv, "\x00"))
		}
	}
	for _, name := range []string{"git", "docker", "docker\x00compose", "docker-compose"} {
		for _, more := range []string{"/etc", "-f/etc", "--file=/etc", "-c\x00alias.x=!sh", "-calias.x=!sh", "--", "-x"} {
			f.Add(name + "\x00" + more + "\x00up")
			f.Add(name + "\x00up\x00" + more)
		}
	}
	f.Fuzz(func(t *testing.T, joined string) {
		argv := strings.Split(joined, "\x00")
		if !Judged(argv[0]) || Judge(line(argv)) != nil {
			return
		}
		for at, word := range argv {
			if at == 0 {
				continue
			}
			if argv[at-1] == "-c" && argv[0] == "git" && at <= Subcommand(argv) {
				name, _, _ := strings.Cut(strings.ToLower(word), "=")
				if _, harmless := settings[name]; !harmless {
					t.Errorf("%q is allowed", argv)
				}
				continue // /dev/null is among the values
			}
			if isText(argv, at) {
				continue
			}
			parts := []string{word}
			if _, value, joined := strings.Cut(word, "="); joined && word[0] == '-' {
				parts = append(parts, value)
			}
			for _, part := range parts {
				if strings.HasPrefix(part, "/") && !isBelow("/workspace", part) || part == ".." || strings.HasPrefix(part, "../") {
					t.Errorf("%q is allowed", argv)
				}
			}
		}
	})
}
