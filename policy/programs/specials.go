package programs

// specials are options that have a rule of their own, for a better reason than that
// they are not listed.
var specials = []special{
	{"directory", "git", false, []string{"-C", "--git-dir", "--work-tree", "--namespace", "--super-prefix", "--bare"}, "makes git work on another repository"},
	{"setting", "git", false, []string{"--config-env", "--exec-path", "-p", "--paginate", "--attr-source"}, "makes git start another program or read other settings"},
	{"runs", "git grep", false, []string{"-O"}, "makes git start another program"},
	{"history", "git clean", false, []string{"-x", "-X"}, "removes ignored files, which no run's record covers"},
	{"runs", "git", true, []string{"--upload-pack", "--receive-pack", "--exec", "--open-files-in-pager", "--ext-diff", "--textconv", "--filters", "--extcmd", "--show-signature",
		"-i", "--interactive", "-e", "--edit", "--edit-description", "--help", "--patch", "-p", "--gpg-sign"}, "can make git start another program"},
	{"outside", "git", true, []string{"--output", "--output-directory", "--no-index", "-O", "--unsafe-paths", "--build-fake-ancestor", "--remote", "--contents", "-o", "--file", "--exclude-from",
		"--exclude-per-directory", "-X", "--ignore-revs-file", "--git-common-dir", "--template", "--separate-git-dir", "--ignore-other-worktrees"}, "can read or write files outside of the workspace"},
	{"history", "git", true, []string{"-d", "-D", "--delete", "-m", "--move", "-M", "--recurse-submodules", "--set-upstream-to", "-a", "-s"}, "changes or removes what the run's record does not cover"},
	{"engine", "docker", false, []string{"-H", "--host", "-c", "--context", "--config", "--tls", "--tlscacert", "--tlscert", "--tlskey", "--tlsverify"}, "leads to another engine or another configuration"},
	{"engine", "docker compose", false, []string{"-H", "--host", "-c", "--context", "--config", "--tls", "--tlscacert", "--tlscert", "--tlskey", "--tlsverify", "--workdir"}, "leads to another engine or another folder"},
	{"build-reads", "docker build", false, []string{"--secret", "--ssh", "--build-context", "--cache-from", "--allow", "--security-opt", "--add-host", "--builder", "--cgroup-parent", "--isolation"}, "gives the build files, keys or rights of the machine"},
	{"build-writes", "docker build", false, []string{"-o", "--output", "--cache-to", "--iidfile", "--metadata-file", "--push", "--cidfile", "--attest", "--provenance", "--sbom"}, "writes outside of the images of the engine"},
	{"build-reads", "docker compose build", false, []string{"--ssh", "--builder", "--print", "--secret"}, "gives the build files, keys or rights of the machine"},
	{"build-writes", "docker compose build", false, []string{"--push", "--provenance", "--sbom"}, "writes outside of the images of the engine"},
	{"output", "docker compose config", false, []string{"-o", "--output", "--lock-image-digests", "--environment"}, "writes a file, or shows the worker's environment"},
	{"removes", "docker compose", true, []string{"-v", "--volumes", "-V", "--renew-anon-volumes", "--remove-orphans", "--rmi", "--prune", "-y", "--yes"}, "removes containers or volumes, whose data no rollback brings back"},
	{"other-service", "docker compose", true, []string{"--with-dependencies", "--include-deps", "--always-recreate-deps"}, "changes other services than the run's"},
	{"runs", "docker compose up", false, []string{"-w", "--watch", "--menu"}, "copies files into containers and runs commands there"},
	{"other-files", "docker compose up", false, []string{"-f", "--file", "--project-directory", "--env-file"}, "stands before the subcommand, where its path is judged"},
}
