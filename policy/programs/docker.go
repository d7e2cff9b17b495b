package programs

// builds are the options of an image build.
const builds = `-t|--tag= -f|--file=path --target= --build-arg=assignment --label=text --no-cache --no-cache-filter= --pull --progress= -q|--quiet --platform=
	--network=network --rm --force-rm --compress -m|--memory= --memory-swap= --shm-size= --cpu-period= --cpu-quota= --cpuset-cpus= -c|--cpu-shares=
	--load --check --ulimit=`

// docker has the rules of docker. Its options before the subcommand lead to another
// engine or another configuration; only those that do not are listed.
var docker = &program{
	name: "docker", style: dockerStyle,
	globals: options(`-D|--debug -l|--log-level= -v|--version`),
	commands: map[string]command{
		"ps": {options: options(`-a|--all -f|--filter= --format=text -n|--last= -l|--latest --no-trunc -q|--quiet -s|--size`), arguments: none},
		// Of a container, both show secrets of others: its environment, and what it prints.
		"inspect":       {options: options(`-f|--format=text -s|--size --type= --platform=`), arguments: container},
		"image inspect": {options: options(`-f|--format=text --platform=`), arguments: plain},
		"logs":          {options: options(`--details -f|--follow --since= -n|--tail= -t|--timestamps --until=`), arguments: container},
		"images":        {options: options(`-a|--all --digests -f|--filter= --format=text --no-trunc -q|--quiet --tree`), arguments: plain},
		"history":       {options: options(`--format=text -H|--human --no-trunc -q|--quiet --platform=`), arguments: plain},
		"port":          {arguments: plain},
		"version":       {options: options(`-f|--format=text`), arguments: none},
		"info":          {options: options(`-f|--format=text`), arguments: none},
		"pull":          {options: options(`-q|--quiet --platform=`), arguments: plain},
		"build":         {options: options(builds), arguments: folder},
		"start":         {arguments: container},
		"stop":          {options: options(`-t|--time|--timeout= -s|--signal=`), arguments: container},
		"restart":       {options: options(`-t|--time|--timeout= -s|--signal=`), arguments: container},
	},
	groups: map[string]map[string]string{
		"container": {"ls": "ps", "list": "ps", "ps": "ps", "inspect": "inspect", "logs": "logs", "port": "port",
			"start": "start", "stop": "stop", "restart": "restart",
			"run": "run", "exec": "exec", "create": "create", "cp": "cp", "attach": "attach", "commit": "commit", "export": "export",
			"rm": "rm", "remove": "rm", "kill": "kill", "pause": "pause", "unpause": "unpause", "rename": "rename", "update": "update", "prune": "rm"},
		"image": {"ls": "images", "list": "images", "inspect": "image inspect", "history": "history", "pull": "pull", "build": "build",
			"load": "load", "save": "save", "import": "import", "push": "push", "rm": "rmi", "remove": "rmi", "tag": "tag", "prune": "rmi"},
		"builder": {"build": "build"},
		"buildx":  {"build": "build"},
		"system":  {"info": "info"},
	},
	plugins: map[string]*program{"compose": compose},
	refused: []refused{
		{"runs", []string{"run", "exec", "create", "attach", "debug", "sandbox", "model", "mcp", "scout", "init", "dev", "desktop", "offload", "ai", "extension", "plugin"},
			"starts a program of the plan's choice, with the machine's folders if the plan wants them"},
		{"bake", []string{"buildx", "builder"}, "builds from other files, and writes outside of the workspace"},
		{"copies", []string{"cp", "load", "save", "import", "export", "commit"}, "copies files between the machine, images and containers"},
		{"cluster", []string{"swarm", "service", "stack", "node", "secret", "config"}, "acts on a cluster, beside the run's project"},
		{"engine", []string{"volume", "network", "system", "context", "checkpoint", "trust", "manifest", "events", "top", "stats", "diff", "wait", "search"}, "acts on the engine, beside the run's project"},
		{"removes", []string{"rm", "rmi", "tag", "rename", "update", "kill", "pause", "unpause"}, "changes or removes what the run's record does not cover"},
		{"registry", []string{"push", "login", "logout"}, "sends images or credentials to a registry"},
	},
}

// composeGlobals are compose's options before the subcommand.
const composeGlobals = `-p|--project-name=project -f|--file=path --project-directory=path --env-file=path --profile= --ansi= --progress= --parallel= --dry-run
	--compatibility --all-resources --verbose -v|--version`

// compose has the rules of docker compose.
var compose = &program{
	name: "docker compose", style: composeStyle,
	globals: options(composeGlobals),
	commands: map[string]command{
		"build": {options: options(`--build-arg=assignment -m|--memory= --no-cache --pull --progress= -q|--quiet --check --parallel --compress
			--force-rm --no-rm`, dryRun), arguments: target, check: namesService},
		"up": {options: options(`-d|--detach --no-deps --build --no-build --force-recreate --no-recreate --pull= --quiet-pull --quiet-build --wait --wait-timeout= -t|--timeout=
			--scale=scale --no-start --no-color --no-log-prefix --timestamps --abort-on-container-exit
			--abort-on-container-failure --exit-code-from= --attach= --no-attach= --attach-dependencies`, dryRun), arguments: target, check: namesService},
		"create":  {options: options(`--build --no-build --force-recreate --no-recreate --pull= --quiet-pull --scale=scale`, dryRun), arguments: target, check: namesService},
		"pull":    {options: options(`--ignore-buildable --ignore-pull-failures --policy= -q|--quiet --no-parallel`, dryRun), arguments: target, check: namesService},
		"restart": {options: options(`--no-deps -t|--timeout=`, dryRun), arguments: target, check: namesService},
		"stop":    {options: options(`-t|--timeout=`, dryRun), arguments: target, check: namesService},
		"start":   {options: options(`--wait --wait-timeout=`, dryRun), arguments: target, check: namesService},
		"ps":      {options: options(`-a|--all --filter= --format=text --no-trunc --orphans -q|--quiet --services --status=`, dryRun), arguments: services},
		"logs":    {options: options(`-f|--follow --index= --no-color --no-log-prefix --since= -n|--tail= -t|--timestamps --until=`, dryRun), arguments: services},
		"config": {options: options(`-q|--quiet --services --images --volumes --profiles --networks --models --hash= --format= --no-interpolate --no-normalize
			--no-path-resolution --no-consistency --no-env-resolution --resolve-image-digests --variables`, dryRun), arguments: services},
		"images":  {options: options(`-q|--quiet --format=`, dryRun), arguments: services},
		"top":     {options: options(dryRun), arguments: services},
		"port":    {options: options(`--index= --protocol=`, dryRun), arguments: services},
		"ls":      {options: options(`-a|--all --filter= --format= -q|--quiet`, dryRun), arguments: none},
		"version": {options: options(`-f|--format= --short`, dryRun), arguments: none},
	},
	aliases: map[string]string{"convert": "config"},
	refused: []refused{
		{"runs", []string{"run", "exec", "attach", "watch", "bridge", "alpha"}, "starts a program of the plan's choice in a container, with the machine's folders if the plan wants them"},
		{"copies", []string{"cp", "export", "commit", "publish", "push"}, "copies files between the machine, images and containers"},
		{"removes", []string{"down", "rm", "kill", "pause", "unpause", "scale", "volumes", "events", "stats", "wait"}, "changes or removes what the run's record does not cover"},
	},
}

// namesService refuses a command line that acts on all services because it names none.
func namesService(j *judge, arguments []string) *Refusal {
	if j.Service == "" || len(arguments) > 0 {
		return nil
	}
	return j.refuse("other-service", j.command, "without a name, %s acts on all services of the project: name service %s, for which the run is", j.command, j.Service)
}

const dryRun = `--dry-run`

// standalone is the docker-compose program.
var standalone = func() *program {
	p := *compose
	p.globals = options(composeGlobals, `-D|--debug -l|--log-level=`)
	return &p
}()
