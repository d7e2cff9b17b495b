package changetest

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
)

// Files of a project that the cases change. The plan's allow-list has the first two
// and not the third.
const (
	requirements = "api_service/requirements.txt"
	dockerfile   = "api_service/Dockerfile"
	guide        = "docs/guide.txt"
)

// A Project is a compose project with its work tree. Service api is the target of
// every run; service other must never change.
type Project struct {
	// Name of the compose project, Workspace the top of its work tree.
	Name, Workspace string
	// Port is where service api is published.
	Port int

	engine  *Engine
	compose string
	assets  *assets
	// dockerConfig is a DOCKER_CONFIG folder with which `docker compose` works.
	dockerConfig string
	// templates are folders with a committed work tree each, by kind of workspace.
	templates map[bool]string
	program   []byte
}

// NewProject makes the templates and the base image, and starts nothing. program is
// the service's.
func NewProject(ctx context.Context, engine *Engine, folder, name, compose string, program []byte) (p *Project, err error) {
	ports, err := devenv.FreePorts(1)
	if err != nil {
		return nil, err
	}
	p = &Project{
		Name: name, Workspace: filepath.Join(folder, "workspace"), Port: ports[0], engine: engine, compose: compose,
		dockerConfig: filepath.Join(folder, "docker"), templates: map[bool]string{}, program: program,
	}
	if p.assets, err = newAssets(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			p.assets.close()
		}
	}()
	plugins := filepath.Join(p.dockerConfig, "cli-plugins")
	if err := os.MkdirAll(plugins, 0o755); err != nil {
		return nil, err
	}
	if err := os.Symlink(compose, filepath.Join(plugins, "docker-compose")); err != nil {
		return nil, err
	}
	for _, submodule := range []bool{false, true} {
		p.templates[submodule] = filepath.Join(folder, fmt.Sprintf("template-%t", submodule))
		if err := p.makeTemplate(ctx, p.templates[submodule], submodule); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// base is the image that the project's images are built FROM; kept is another name
// of it, with which a lost base can be had again.
func (p *Project) base() string { return "mm-changetest-base:" + p.Name }
func (p *Project) kept() string { return "mm-changetest-kept:" + p.Name }

// Environment has the variables with which `docker compose` finds its program.
func (p *Project) Environment() []string { return []string{"DOCKER_CONFIG=" + p.dockerConfig} }

func (p *Project) subject(leaveOut ...string) Subject {
	return Subject{
		Workspace: p.Workspace, LeaveOut: leaveOut, Engine: p.engine, Project: p.Name,
		Repositories: []string{p.Name + "-api", p.Name + "-other"},
	}
}

// files are those of the first commit, by path.
func (p *Project) files() map[string]string {
	image := "FROM " + p.base() + "\nLABEL " + Label + "=" + p.Name + "\n"
	files := map[string]string{
		"docker-compose.yaml": fmt.Sprintf(`services:
  api:
    build: api_service
    restart: unless-stopped
    stop_grace_period: 1s
    ports: ["127.0.0.1:%d:8080"]
    environment: {MODE: live}
    depends_on: [other]
    volumes: ["data:/data"]
    networks: [front, back]
    healthcheck: {test: ["CMD", "/service", "check"], interval: 2s, timeout: 5s, retries: 2}
  other:
    build: other
    stop_grace_period: 1s
    networks: [back]
volumes: {data: {}}
networks: {front: {}, back: {}}
`, p.Port),
		".gitignore":                 ".env\n*.ignored\nvar/\n",
		dockerfile:                   image + "ADD " + p.assets.url("/asset") + " /asset\nCOPY requirements.txt /app/requirements.txt\nCMD [\"/service\", \"serve\", \"/app/requirements.txt\"]\n",
		requirements:                 "flask==3.1.0\nhttpx==0.28.1\n",
		"api_service/pyproject.toml": "[project]\nname = \"api\"\n",
		"api_service/app.py":         "print('hello')\n",
		"other/Dockerfile":           image + "COPY requirements.txt /app/requirements.txt\nCMD [\"/service\", \"serve\", \"/app/requirements.txt\"]\n",
		"other/requirements.txt":     "flask==3.1.0\n",
		"README.md":                  "# A project\n\nIt has two services.\n",
		guide:                        strings.Repeat("A line of the guide.\n", 20),
		"docs/größe.txt":             "Non-ASCII names are quoted by git.\n",
		"docs/assumed.txt":           "assumed\n",
		"docs/skipped.txt":           "skipped\n",
		"docs/with space.txt":        "spaces\n",
		"scripts/run.sh":             "#!/bin/sh\necho run\n",
		"data/old.txt":               "old\n",
		"data/gone.txt":              "gone\n",
		"data/moved.txt":             "moved\nfrom\nhere\n",
		"data/blob.bin":              "\x00\x01\x02\xff\xfe binary\r\n",
		"data/crlf.txt":              "one\r\ntwo\r\n",
	}
	return files
}

func (p *Project) makeTemplate(ctx context.Context, folder string, submodule bool) error {
	for name, text := range p.files() {
		if err := writeFile(filepath.Join(folder, name), text, 0o644); err != nil {
			return err
		}
	}
	if err := os.Chmod(filepath.Join(folder, "scripts/run.sh"), 0o755); err != nil {
		return err
	}
	if err := os.Symlink("run.sh", filepath.Join(folder, "scripts/link.sh")); err != nil {
		return err
	}
	git := func(args ...string) error { _, err := Git(ctx, folder, args...); return err }
	if err := git("init", "--quiet", "--initial-branch=main"); err != nil {
		return err
	}
	if submodule {
		origin := folder + ".lib"
		if err := writeFile(filepath.Join(origin, "lib.txt"), "a library\n", 0o644); err != nil {
			return err
		}
		for _, args := range [][]string{{"init", "--quiet", "--initial-branch=main"}, {"add", "--all"}, {"commit", "--quiet", "--message", "library"}} {
			if _, err := Git(ctx, origin, args...); err != nil {
				return err
			}
		}
		if err := git("-c", "protocol.file.allow=always", "submodule", "--quiet", "add", origin, "vendor/lib"); err != nil {
			return err
		}
	}
	for _, args := range [][]string{
		{"add", "--all"}, {"commit", "--quiet", "--message", "the project as it is deployed"},
		{"branch", "feature"}, {"tag", "v1"},
		{"checkout", "--quiet", "feature"},
	} {
		if err := git(args...); err != nil {
			return err
		}
	}
	// A branch that conflicts with main.
	if err := writeFile(filepath.Join(folder, guide), "Another guide.\n", 0o644); err != nil {
		return err
	}
	if err := git("commit", "--quiet", "--all", "--message", "another guide"); err != nil {
		return err
	}
	if err := git("checkout", "--quiet", "main"); err != nil {
		return err
	}
	if err := writeFile(filepath.Join(folder, guide), strings.Repeat("A line of the guide.\n", 21), 0o644); err != nil {
		return err
	}
	return git("commit", "--quiet", "--all", "--message", "a line more")
}

func writeFile(path, text string, mode os.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		return err
	}
	return os.Chmod(path, mode)
}

// Up builds the images and starts both services from the clean work tree, and waits
// until api is healthy. What was there of the project is removed before.
func (p *Project) Up(ctx context.Context) error {
	if err := p.engine.RemoveProject(ctx, p.Name); err != nil {
		return err
	}
	if err := p.provideBase(ctx); err != nil {
		return err
	}
	if err := p.reset(ctx, false); err != nil {
		return err
	}
	if err := p.runCompose(ctx, "up", "--build", "--detach", "--quiet-pull"); err != nil {
		return err
	}
	return p.awaitHealthy(ctx)
}

// provideBase makes sure that images can be built.
func (p *Project) provideBase(ctx context.Context) error {
	p.assets.off.Store(false)
	if p.engine.Tag(ctx, p.kept(), p.base()) == nil {
		return nil
	}
	// It was never there, or a case has pruned it.
	if err := p.engine.ImportBase(ctx, p.base(), baseLabel+"="+p.Name, p.program); err != nil {
		return err
	}
	return p.engine.Tag(ctx, p.base(), p.kept())
}

func (p *Project) awaitHealthy(ctx context.Context) error {
	return until(ctx, "service api of "+p.Name+" to be healthy", func() (bool, error) {
		state := State{}
		err := p.engine.take(ctx, p.subject(), state)
		return state["container "+p.Name+"-api-1 health"] == "healthy", err
	})
}

func (p *Project) runCompose(ctx context.Context, args ...string) error {
	command := exec.CommandContext(ctx, p.compose, append([]string{"--project-name", p.Name, "--project-directory", p.Workspace}, args...)...)
	command.Dir = p.Workspace
	command.Env = append(os.Environ(), p.Environment()...)
	if text, err := command.CombinedOutput(); err != nil {
		return fmt.Errorf("compose %v: %w: %s", args, err, text)
	}
	return nil
}

// reset makes the work tree the clean one of the template.
func (p *Project) reset(ctx context.Context, submodule bool) error {
	if err := os.RemoveAll(p.Workspace); err != nil {
		return err
	}
	if text, err := exec.CommandContext(ctx, "cp", "-a", p.templates[submodule], p.Workspace).CombinedOutput(); err != nil {
		return fmt.Errorf("cp: %w: %s", err, text)
	}
	command := exec.CommandContext(ctx, "git", "status", "--porcelain") // writes the new inode numbers to the index
	command.Dir = p.Workspace
	if text, err := command.CombinedOutput(); err != nil || len(text) > 0 {
		return fmt.Errorf("a new work tree is not clean: %s %w", text, err)
	}
	return nil
}

// Close removes all of the project but its files.
func (p *Project) Close(ctx context.Context) error {
	p.assets.close()
	err := p.engine.RemoveProject(ctx, p.Name)
	for _, name := range []string{p.base(), p.kept()} {
		p.engine.removeImage(ctx, name)
	}
	return err
}

// A WorkspaceKind says what the operator has in the work tree before the run.
type WorkspaceKind string

// The kinds.
const (
	// Clean: all is committed, and the plan changes files itself.
	Clean WorkspaceKind = "clean"
	// Deployed: the plan changes nothing; the operator's uncommitted edits are what
	// the run deploys.
	Deployed WorkspaceKind = "deployed edits"
	// Beside: the operator's work of every sort is there, and the plan changes files
	// itself.
	Beside WorkspaceKind = "edits beside"
	// Merging: a merge, rebase, cherry-pick or revert is in progress.
	Merging WorkspaceKind = "merge in progress"
	// Submodule: a submodule with the operator's edits in it.
	Submodule WorkspaceKind = "submodule"
)

// WorkspaceKinds are all.
var WorkspaceKinds = []WorkspaceKind{Clean, Deployed, Beside, Merging, Submodule}

// prepare makes the work tree for a kind, without the edits of Deployed.
func (p *Project) prepare(ctx context.Context, kind WorkspaceKind, random *rand.Rand) error {
	if err := p.reset(ctx, kind == Submodule); err != nil {
		return err
	}
	w := &operator{ctx: ctx, folder: p.Workspace, random: random}
	switch kind {
	case Deployed:
		w.ignoredFiles()
	case Beside:
		w.everything()
	case Merging:
		w.unfinishedMerge()
	case Submodule:
		w.write("vendor/lib/lib.txt", "a library\nwith an edit\n", 0o644)
		w.write("vendor/lib/notes.txt", "untracked in the submodule\n", 0o600)
		w.write("vendor/lib/staged.txt", "staged in the submodule\n", 0o644)
		w.git("-C", "vendor/lib", "add", "staged.txt")
		if random.IntN(2) == 0 {
			w.git("-C", "vendor/lib", "commit", "--quiet", "--message", "ahead of what the project has")
		}
		w.everything()
	}
	return w.err
}

// operator makes changes in a work tree. Its first error ends it.
type operator struct {
	ctx    context.Context
	folder string
	random *rand.Rand
	err    error
}

func (w *operator) do(err error) {
	if w.err == nil && err != nil {
		w.err = err
	}
}

func (w *operator) path(name string) string { return filepath.Join(w.folder, name) }

func (w *operator) git(args ...string) {
	if w.err == nil {
		_, err := Git(w.ctx, w.folder, args...)
		w.do(err)
	}
}

func (w *operator) write(name, text string, mode os.FileMode) {
	w.do(writeFile(w.path(name), text, mode))
}

func (w *operator) append(name, text string) {
	file, err := os.OpenFile(w.path(name), os.O_APPEND|os.O_WRONLY, 0)
	if err == nil {
		_, err = file.WriteString(text)
		file.Close()
	}
	w.do(err)
}

func (w *operator) ignoredFiles() {
	w.write(".env", "TOKEN=of-the-operator\n", 0o600)
	w.write("cache.ignored", "a cache\n", 0o644)
}

// everything leaves most sorts of uncommitted work and settings that an operator can
// have. Which of them, the case's random numbers say.
func (w *operator) everything() {
	w.ignoredFiles()
	for _, edit := range []func(){
		// git refuses to stash beside some of the others.
		func() {
			w.append("docs/with space.txt", "to stash\n")
			w.git("stash", "push", "--quiet", "--", "docs/with space.txt")
		},
		func() { w.append(guide, "Unstaged.\n") },
		func() {
			w.append("README.md", "Staged.\n")
			w.git("add", "README.md")
			w.append("README.md", "And unstaged.\n")
		},
		func() { w.append(requirements, "# of the operator\n") },
		func() {
			w.append(requirements, "# staged by the operator\n")
			w.git("add", requirements)
		},
		func() { w.append("api_service/pyproject.toml", "# of the operator\n") },
		func() { w.append("api_service/app.py", "# outside of the list\n") },
		func() { w.write("notes/todo.txt", "untracked\n", 0o600) },
		func() { w.write("notes/tab\there.txt", "a name with a tab\n", 0o644) },
		func() { w.do(os.MkdirAll(w.path("scratch/empty/deeper"), 0o750)) },
		func() { w.do(os.Symlink("nowhere", w.path("dangling"))) },
		func() {
			w.write("notes/one.txt", "one file\n", 0o644)
			w.do(os.Link(w.path("notes/one.txt"), w.path("notes/same.txt")))
		},
		func() { w.do(syscall.Mkfifo(w.path("notes.pipe"), 0o600)) },
		func() { w.do(os.Chmod(w.path("scripts/run.sh"), 0o644)) },
		func() { w.do(os.Chmod(w.path("docs/größe.txt"), 0o640)) },
		func() {
			w.do(os.Remove(w.path("scripts/link.sh")))
			w.do(os.Symlink("../README.md", w.path("scripts/link.sh")))
		},
		func() { w.git("rm", "--quiet", "data/old.txt") },
		func() { w.do(os.Remove(w.path("data/gone.txt"))) },
		func() { w.git("mv", "data/moved.txt", "data/renamed.txt") },
		func() {
			w.write("data/intended.txt", "intent to add\n", 0o644)
			w.git("add", "--intent-to-add", "data/intended.txt")
		},
		func() {
			w.append("docs/assumed.txt", "hidden by assume-unchanged\n")
			w.git("update-index", "--assume-unchanged", "docs/assumed.txt")
		},
		func() {
			w.append("docs/skipped.txt", "hidden by skip-worktree\n")
			w.git("update-index", "--skip-worktree", "docs/skipped.txt")
		},
		func() { w.write(".git/hooks/pre-commit", "#!/bin/sh\nexit 1\n", 0o755) },
		func() { w.write(".git/hooks/post-index-change", "#!/bin/sh\ntouch hook-has-run\n", 0o755) },
		func() { w.git("config", "color.ui", "always") },
		func() { w.git("config", "status.showUntrackedFiles", "no") },
		func() { w.git("config", "diff.noprefix", "true") },
		func() { w.git("config", "diff.external", "false") },
		func() { w.git("config", "core.autocrlf", "input") },
		func() {
			w.git("config", "filter.upper.clean", "tr a-z A-Z")
			w.git("config", "filter.upper.smudge", "tr A-Z a-z")
			w.write(".git/info/attributes", "*.upper filter=upper\n", 0o644)
			w.write("data/text.upper", "filtered\n", 0o644)
		},
		func() { w.write(".git/info/exclude", "*.excluded\n", 0o644) },
		func() { w.write("notes/private.excluded", "excluded\n", 0o644) },
		func() { w.git("branch", "another") },
		func() { w.git("checkout", "--quiet", "--detach") },
	} {
		if w.random.IntN(4) > 0 {
			edit()
		}
	}
}

// unfinishedMerge leaves a merge or the like with a conflict.
func (w *operator) unfinishedMerge() {
	begin := [][]string{
		{"merge", "--quiet", "feature"}, {"cherry-pick", "feature"}, {"rebase", "--quiet", "feature"}, {"revert", "--no-edit", "HEAD"},
	}[w.random.IntN(4)]
	if begin[0] == "revert" {
		// It conflicts with a later edit of the same lines.
		w.write(guide, strings.Repeat("A line of the guide.\n", 22)+"The last.\n", 0o644)
		w.git("commit", "--quiet", "--all", "--message", "the last line")
		begin[2] = "HEAD~1"
	}
	if w.err != nil {
		return
	}
	// git fails, since there is a conflict.
	if text, err := Git(w.ctx, w.folder, begin...); err == nil {
		w.do(fmt.Errorf("git %v has no conflict: %s", begin, text))
	}
	w.write("notes/todo.txt", "untracked\n", 0o600)
}
