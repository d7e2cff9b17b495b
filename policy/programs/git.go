package programs

import (
	"slices"
	"strings"
)

// diffs are the options of everything that shows differences. The patch that git makes
// starts no program: callers add --no-ext-diff and --no-textconv.
const diffs = `-p|-u|--patch -s|--no-patch -U|--unified= --raw --minimal --patience --histogram --diff-algorithm= --stat? --compact-summary --numstat
	--shortstat --dirstat? --summary --patch-with-stat -z --name-only --name-status --color? --no-color --word-diff? --word-diff-regex=text
	--no-renames --renames --check --full-index --binary --abbrev? --no-abbrev -B|--break-rewrites? -M|--find-renames? -C|--find-copies?
	--find-copies-harder -D|--irreversible-delete -l= --diff-filter= -S=text -G=text --pickaxe-all --pickaxe-regex -R --relative? --no-relative
	-a|--text --ignore-cr-at-eol --ignore-space-at-eol -b|--ignore-space-change -w|--ignore-all-space --ignore-blank-lines
	--inter-hunk-context= -W|--function-context --exit-code -q|--quiet --no-ext-diff --no-textconv --ignore-submodules? --submodule?
	--src-prefix= --dst-prefix= --no-prefix --line-prefix=text --ita-invisible-in-index -1|--base -2|--ours -3|--theirs -0 --cc -c -m`

// logs are the options of everything that lists commits.
const logs = `-NUMBER -n|--max-count= --skip= --since=text --after=text --until=text --before=text --author=text --committer=text --grep=text
	--all-match --invert-grep -i|--regexp-ignore-case -E|--extended-regexp -F|--fixed-strings -P|--perl-regexp --merges --no-merges
	--first-parent --all --branches? --tags? --remotes? --not --reverse --date-order --topo-order --author-date-order --graph --oneline
	--pretty? --format=text --abbrev-commit --no-abbrev-commit --decorate? --no-decorate --date= --follow --left-right --cherry-pick
	--cherry-mark --left-only --right-only --simplify-by-decoration --full-history --ancestry-path --boundary --parents --children
	--relative-date --no-notes --no-walk? --source --log-size -L=text`

// git has the rules of git. Of its options before the subcommand, none starts a program
// or makes git work elsewhere.
var git = &program{
	name: "git", style: gitStyle,
	globals: options(`--no-pager -P --no-optional-locks --literal-pathspecs --glob-pathspecs --noglob-pathspecs --icase-pathspecs
		--no-replace-objects --version -v -c=setting`),
	commands: map[string]command{
		"status": {options: options(`-s|--short -b|--branch --show-stash --porcelain? --long -u|--untracked-files? --ignored?
			--ignore-submodules? -z --column? --no-column --ahead-behind --no-ahead-behind --renames --no-renames --find-renames?`), arguments: plain},
		"diff":       {options: options(diffs, `--cached --staged --merge-base`), arguments: plain},
		"diff-tree":  {options: options(diffs, `-r -t --root --no-commit-id --pretty?`), arguments: plain},
		"diff-index": {options: options(diffs, `--cached --merge-base`), arguments: plain},
		"diff-files": {options: options(diffs), arguments: plain},
		"show":       {options: options(logs, diffs), arguments: plain},
		"log":        {options: options(logs, diffs), arguments: plain},
		"shortlog":   {options: options(logs, `-s|--summary -e|--email -c|--committer`), arguments: plain},
		"rev-list":   {options: options(logs, `--count --objects --disk-usage`), arguments: plain},
		"blame": {options: options(`-b --root -L=text -l -t -p|--porcelain --line-porcelain --date= -M? -C? -c -f|--show-name -n|--show-number
			-s -e|--show-email -w --abbrev= --since=text --first-parent`), arguments: plain},
		"grep": {options: options(`--cached --untracked -a|--text -i|--ignore-case -I -w|--word-regexp -v|--invert-match -h -H --full-name -E|--extended-regexp
			-G|--basic-regexp -P|--perl-regexp -F|--fixed-strings -n|--line-number --column -l|--files-with-matches --name-only
			-L|--files-without-match -z|--null -o|--only-matching -c|--count --color? --no-color --break --heading -p|--show-function
			-A|--after-context= -B|--before-context= -C|--context= -W|--function-context -m|--max-count= -e=text --and --or --not
			--all-match -q|--quiet --max-depth= -r|--recursive --no-recursive --no-textconv --exclude-standard`), arguments: plain},
		"rev-parse": {options: options(`--verify -q|--quiet --short? --abbrev-ref? --symbolic-full-name --symbolic --show-toplevel --show-prefix --show-cdup
			--is-inside-work-tree --is-bare-repository --git-dir --absolute-git-dir --git-common-dir --all --branches? --tags? --remotes? --revs-only --no-revs --flags --no-flags --default= --sq`), arguments: plain},
		"ls-files": {options: options(`-c|--cached -d|--deleted -m|--modified -o|--others -i|--ignored -s|--stage --directory --no-empty-directory -u|--unmerged
			-k|--killed -z -x|--exclude= --exclude-standard --error-unmatch -t -v -f --full-name --abbrev? --eol --deduplicate --format=text`), arguments: plain},
		"ls-tree":  {options: options(`-d -r -t -l|--long -z --name-only --name-status --object-only --full-name --full-tree --abbrev? --format=text`), arguments: plain},
		"cat-file": {options: options(`-t -s -e -p --allow-unknown-type`), arguments: plain},
		"describe": {options: options(`--all --tags --contains --dirty? --broken? --abbrev= --candidates= --exact-match --long --match= --exclude= --always
			--first-parent`), arguments: plain},
		"show-ref":      {options: options(`--head --heads --tags -d|--dereference -s|--hash? --verify --abbrev? -q|--quiet`), arguments: plain},
		"for-each-ref":  {options: options(`--count= --sort= --format=text --points-at= --merged? --no-merged? --contains? --no-contains? --ignore-case`), arguments: plain},
		"merge-base":    {options: options(`-a|--all --octopus --independent --is-ancestor --fork-point`), arguments: plain},
		"name-rev":      {options: options(`--tags --refs= --exclude= --all --name-only --no-undefined --always`), arguments: plain},
		"check-ignore":  {options: options(`-q|--quiet -v|--verbose -z -n|--non-matching --no-index`), arguments: plain},
		"hash-object":   {options: options(`-t= --no-filters`), arguments: plain},
		"count-objects": {options: options(`-v|--verbose -H|--human-readable`), arguments: none},
		"version":       {options: options(`--build-options`), arguments: none},
		"config": {options: options(`--get --get-all --get-regexp --list -l --local -z|--null --name-only --type= --bool --int --show-origin --show-scope --default=text`),
			arguments: plain, check: onlyReads},
		"branch": {options: options(`--show-current -l|--list -a|--all -r|--remotes -v|--verbose -q|--quiet --contains? --no-contains? --merged? --no-merged? --points-at=
			--sort= --format=text --column? --no-column --color? --no-color --no-track -i|--ignore-case --abbrev= --no-abbrev`), arguments: plain},
		"tag": {options: options(`-l|--list -n? --contains? --no-contains? --merged? --no-merged? --points-at= --sort= --format=text --column? --no-column
			--color? -i|--ignore-case`), arguments: plain},

		// Those that change the workspace. All of it can be taken back: see package change.
		"add": {options: options(`-n|--dry-run -v|--verbose -f|--force -u|--update -A|--all --no-all --ignore-removal --no-ignore-removal -N|--intent-to-add
			--refresh --ignore-errors --ignore-missing --sparse --chmod= --renormalize --pathspec-from-file=path --pathspec-file-nul`), arguments: plain},
		"apply": {options: options(`--stat --numstat --summary --check --index --cached -N|--intent-to-add -3|--3way --apply -z -p= -C= --unidiff-zero -R|--reverse
			--reject --no-add --allow-binary-replacement --binary --exclude= --include= --ignore-space-change --ignore-whitespace --whitespace=
			--inaccurate-eof -v|--verbose -q|--quiet --recount --allow-empty --directory=path --allow-overlap --ours --theirs --union`), arguments: path},
		"checkout": {options: options(`-q|--quiet -f|--force --ours --theirs --progress --no-progress -b= -B= -d|--detach --no-track --orphan= --overlay --no-overlay
			--ignore-skip-worktree-bits --pathspec-from-file=path --pathspec-file-nul --guess --no-guess --overwrite-ignore --no-overwrite-ignore
			--no-recurse-submodules`), arguments: plain},
		"switch": {options: options(`-q|--quiet -f|--force --discard-changes -c|--create= -C|--force-create= -d|--detach --no-track --orphan= --progress --no-progress
			--guess --no-guess --no-recurse-submodules`), arguments: plain},
		"restore": {options: options(`-s|--source= -S|--staged -W|--worktree -q|--quiet --progress --no-progress --ours --theirs --ignore-unmerged --overlay
			--no-overlay --ignore-skip-worktree-bits --pathspec-from-file=path --pathspec-file-nul --no-recurse-submodules`), arguments: plain},
		"reset": {options: options(`-q|--quiet --no-quiet --refresh --no-refresh --soft --mixed --hard --merge --keep -N|--intent-to-add --pathspec-from-file=path
			--pathspec-file-nul --no-recurse-submodules`), arguments: plain},
		"revert": {options: options(`-n|--no-commit --no-edit -m|--mainline= --quit --abort --skip`), arguments: plain},
		"rm":     {options: options(`-n|--dry-run -q|--quiet -f|--force -r --cached --ignore-unmatch --sparse --pathspec-from-file=path --pathspec-file-nul`), arguments: plain},
		"mv":     {options: options(`-n|--dry-run -v|--verbose -f|--force -k --sparse`), arguments: plain},
		"clean":  {options: options(`-n|--dry-run -q|--quiet -f|--force -d -e|--exclude=`), arguments: plain, check: forcesOnce},
		"stash": {options: options(`-q|--quiet -m|--message=text -u|--include-untracked -k|--keep-index --no-keep-index -S|--staged --index --stat? --numstat
			--name-only --name-status --only-untracked`), arguments: plain, check: stashes},
	},
	refused: []refused{
		{"runs", []string{"bisect", "difftool", "mergetool", "filter-branch", "submodule", "rebase", "hook", "instaweb", "web--browse", "help", "gui", "citool", "gitk",
			"send-email", "imap-send", "credential", "maintenance", "daemon", "shell", "for-each-repo", "interpret-trailers", "var"},
			"starts other programs that its arguments or the repository name"},
		{"remote", []string{"fetch", "pull", "push", "clone", "ls-remote", "remote", "fetch-pack", "send-pack", "upload-pack", "receive-pack", "upload-archive",
			"http-fetch", "http-push", "request-pull", "svn", "p4", "cvsimport", "cvsexportcommit", "cvsserver", "archimport", "quiltimport", "remote-ext", "remote-fd", "remote-http", "remote-https"},
			"exchanges data with another repository, and starts programs to reach it"},
		{"outside", []string{"init", "init-db", "worktree", "archive", "bundle", "format-patch", "bugreport", "diagnose", "checkout-index", "fast-export", "fast-import",
			"mailsplit", "mailinfo", "get-tar-commit-id", "unpack-file", "write-tree", "sparse-checkout", "read-tree", "scalar"},
			"writes files that no run's record covers, also outside of the workspace"},
		{"history", []string{"commit", "merge", "cherry-pick", "am", "notes", "replace", "gc", "prune", "repack", "reflog", "update-ref", "symbolic-ref", "pack-refs",
			"pack-objects", "commit-tree", "commit-graph", "multi-pack-index", "unpack-objects", "index-pack", "update-index", "update-server-info", "prune-packed", "mktag", "mktree", "rerere", "fsck",
			"merge-file", "merge-index", "merge-one-file", "merge-tree", "merge-recursive", "fmt-merge-msg", "stage"},
			"changes the history or git's own files, and may start an editor or a hook"},
	},
}

// Subcommand returns the place of the subcommand in a command line of git that is
// allowed, or its length if there is none.
func Subcommand(argv []string) int {
	for at := 1; at < len(argv); at++ {
		switch word := argv[at]; {
		case !strings.HasPrefix(word, "-"):
			return at
		case slices.Contains([]string{"-c", "-C", "--git-dir", "--work-tree", "--namespace", "--config-env", "--super-prefix", "--attr-source"}, word):
			at++ // its value; but for -c, only an operator can permit these
		}
	}
	return len(argv)
}

// onlyReads refuses git config without an option that makes it show settings.
func onlyReads(j *judge, arguments []string) *Refusal {
	// Refused options do not come here, so that the options are known to be harmless.
	for _, word := range j.Argv {
		if slices.Contains([]string{"--get", "--get-all", "--get-regexp", "--list", "-l"}, word) {
			return nil
		}
	}
	return j.refuse("read-only", "config", "git config without --get or --list changes settings, which can make git start a program")
}

// forcesOnce refuses git clean -f -f, which removes repositories.
func forcesOnce(j *judge, _ []string) *Refusal {
	forced := 0
	for _, word := range j.Argv {
		if word == "--force" {
			forced++
		}
		if len(word) > 1 && word[0] == '-' && word[1] != '-' {
			for _, letter := range word[1:] {
				if letter == 'f' {
					forced++
				}
				if letter == 'e' {
					break
				}
			}
		}
	}
	if forced > 1 {
		return j.refuse("history", "-f", "git clean with two -f removes repositories with their history")
	}
	return nil
}

// stashes judges the subcommand of git stash.
func stashes(j *judge, arguments []string) *Refusal {
	if len(arguments) == 0 || slices.Contains([]string{"push", "save", "list", "show", "apply", "pop", "drop"}, arguments[0]) {
		return nil
	}
	return j.refuse("history", arguments[0], "git stash %s is none of push, save, list, show, apply, pop and drop", arguments[0])
}
