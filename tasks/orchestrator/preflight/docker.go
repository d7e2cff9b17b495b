package preflight

import (
	"context"
	"errors"
	"slices"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/compose"
)

// LookAtEngine looks whether the docker engine answers this process.
func (s Subject) LookAtEngine() Look {
	cure := "Start the engine, mount its socket, or set " + s.SettingName("DOCKER_HOST") + "; this user needs access to it"
	return Look{Name: lookEngine, Remote: true, At: "the docker engine at " + s.Engine.Place(), Late: Refuse, LateCure: "Restart the engine, or set " + s.SettingName("DOCKER_HOST"),
		Do: func(ctx context.Context) []Result {
			if err := s.Engine.Ping(ctx); err != nil {
				return refuse(cure, "%s", s.oneLine(err.Error()))
			}
			return ok("engine answers at %s", s.Engine.Place())
		}}
}

// Install is the cure for a compose program that cannot be started.
func (s Subject) install() string {
	return "Install docker with its compose plugin, or set " + s.SettingName("MM_ORCHESTRATOR_COMPOSE") + " to a docker-compose program of version 2 or later"
}

// composeFailure is the result for a compose command that failed for another
// reason than the compose file: the program is missing, or cannot reach an engine.
// It is nil if the text says something else.
func (s Subject) composeFailure(argv []string, err error) []Result {
	program, text := argv[0], err.Error()
	if program == "docker" {
		program = "docker compose"
	}
	switch {
	case errors.Is(err, errNotFound):
		return refuse(s.install(), "%s failed: %s", program, s.oneLine(text))
	// Without the plugin, docker parses the plugin's arguments itself.
	case argv[0] == "docker" && (strings.Contains(text, "unknown flag") || strings.Contains(text, "not a docker command") || strings.Contains(text, "unknown command: docker compose")):
		return refuse(s.install(), "docker is installed, its compose plugin is not")
	}
	return nil
}

// LookAtComposeEngine looks whether the compose program reaches a docker engine, with
// the options of the command line: those may name another engine than ours.
// `compose ls` needs no compose file.
func (s Subject) LookAtComposeEngine() Look {
	return Look{Name: lookComposeEngine, Remote: true, At: "the docker engine that the compose program uses", Late: Refuse,
		LateCure: "If the docker engine hangs, restart it; docker ps shows whether it answers",
		Do: func(ctx context.Context) []Result {
			for _, project := range s.Projects {
				argv := s.Compose.Resolve(append(slices.Clone(project.Target.Prefix), "ls", "--quiet"))
				if _, err := s.run(ctx, project.Dir, s.Environ, argv); err != nil {
					if results := s.composeFailure(argv, err); results != nil {
						return results
					}
					cure := "Start the engine, mount its socket, or set " + s.SettingName("DOCKER_HOST") + "; this user needs access to it"
					switch text := err.Error(); {
					case strings.Contains(text, "403 Forbidden"):
						cure = "What stands before the engine's socket refuses the request: let it allow POST, BUILD, containers, images, networks and volumes"
					case strings.Contains(text, "context not found"):
						cure = "docker context ls shows those that this user has"
					}
					return refuse(cure, "compose cannot use the docker engine: %s", s.oneLine(err.Error()))
				}
			}
			return ok("compose reaches the docker engine")
		}}
}

// LookAtComposeVersion looks at the version of the compose program.
func (s Subject) LookAtComposeVersion() Look {
	return Look{Name: lookCompose, At: "the compose program", Late: Refuse, LateCure: s.install(),
		Do: func(ctx context.Context) []Result {
			argv := s.Compose.Resolve([]string{"docker", "compose", "version", "--short"})
			version, err := s.run(ctx, s.Workspace, s.Environ, argv)
			if err != nil {
				if results := s.composeFailure(argv, err); results != nil {
					return results
				}
				return refuse(s.install(), "%s failed: %s", argv[0], s.oneLine(err.Error()))
			}
			fault := compose.FaultOf(version)
			switch {
			case fault.Unusable:
				return refuse("Install version "+compose.OldestTested+" or later", "compose %s cannot be used: %s", version, fault.Text)
			case fault.Text != "":
				return note("Install another version, "+compose.OldestTested+" or later", "compose %s works, but %s", version, fault.Text)
			}
			return ok("compose %s", version)
		}}
}

// LookAtServices looks whether the compose files can be read and have the
// services, with all that those need of other files. It needs no engine.
func (s Subject) LookAtServices() Look {
	return Look{Name: lookServices, At: "compose's list of services", Needs: []string{lookWorkspace}, Late: Note, LateCure: "Look for a compose file that includes files of a slow network",
		Do: func(ctx context.Context) []Result {
			var found []string
			for _, project := range s.Projects {
				defined, missing, results := s.services(ctx, project)
				if results != nil {
					return results
				}
				for _, service := range missing {
					of := project.Target.Project
					if of == "" {
						of = "in " + project.Dir
					}
					results = append(results, refuse("The plan was made for another project, or COMPOSE_FILE points elsewhere",
						"Service %q is not in the compose file of project %s. Services there: %s", service, of, strings.Join(defined, ", "))...)
				}
				if results != nil {
					return results
				}
				var listed []string
				for _, service := range project.Services {
					if slices.Contains(defined, service) {
						listed = append(listed, service)
					}
				}
				if len(listed) > 0 {
					// Only this reads the services' environment files, as up does.
					_, err := s.run(ctx, project.Dir, s.Environ, s.Compose.Resolve(append(slices.Clone(project.Target.Prefix), "config", "--hash", strings.Join(listed, ","))))
					if err != nil {
						return refuse("Put the missing file in its place, or correct the compose file", "compose cannot configure service %s: %s", strings.Join(listed, ", "), s.oneLine(err.Error()))
					}
				}
				found = append(found, project.Services...)
			}
			return ok("the compose file has %s", strings.Join(found, ", "))
		}}
}

// LookAtAllServices looks which of the services that runs can repair the project
// has. That it lacks some is a note: no run may be meant for them.
func (s Subject) LookAtAllServices() Look {
	return Look{Name: lookServices, At: "compose's list of services", Needs: []string{lookWorkspace, lookCompose},
		Do: func(ctx context.Context) []Result {
			if len(s.Projects) == 0 {
				return note("Remove enabled: false from a service of the policy", "the policy refuses runs for every service")
			}
			var all []Result
			for _, project := range s.Projects {
				defined, missing, results := s.services(ctx, project)
				switch {
				case results != nil:
				case len(missing) == len(project.Services):
					results = refuse("Point COMPOSE_FILE or "+s.SettingName("WORKSPACE_ROOT")+" to MoonMind's compose file", "the compose file defines none of the services that runs can repair (%s); it defines %s", strings.Join(missing, ", "), strings.Join(defined, ", "))
				case len(missing) > 0:
					results = note("Runs for the missing services fail; ignore this if there are no such runs", "the compose file defines %s, but not %s", strings.Join(defined, ", "), strings.Join(missing, ", "))
				default:
					results = ok("project %s has %s", project.Target.Project, strings.Join(project.Services, ", "))
				}
				all = append(all, results...)
			}
			return all
		}}
}

// services asks compose which services the project defines, and which of those
// that it should have are missing. The results are nil if compose has answered.
func (s Subject) services(ctx context.Context, project Project) (defined, missing []string, results []Result) {
	argv := s.Compose.Resolve(project.Target.ServicesCommand())
	text, err := s.run(ctx, project.Dir, s.Environ, argv)
	if err != nil {
		if results := s.composeFailure(argv, err); results != nil {
			return nil, nil, results
		}
		return nil, nil, refuse("Correct the file, set COMPOSE_FILE, or set "+s.SettingName("WORKSPACE_ROOT")+" to the file's directory", "the compose file cannot be read: %s", s.oneLine(err.Error()))
	}
	defined = compose.ParseServices(text)
	if len(defined) == 0 {
		return nil, nil, nil // another program in compose's place, or a file without services: compose itself will say
	}
	for _, service := range project.Services {
		if slices.Contains(defined, service) {
			continue
		}
		// The list leaves out services whose profile is not active. A command that
		// names such a service activates it.
		argv := s.Compose.Resolve(append(slices.Clone(project.Target.Prefix), "config", "--quiet", service))
		if _, err := s.run(ctx, project.Dir, s.Environ, argv); err != nil {
			missing = append(missing, service)
		}
	}
	return defined, missing, nil
}

// LookAtTarget looks whether the containers that the run will replace can be
// inspected, with their images: a rollback needs both.
func (s Subject) LookAtTarget() Look {
	return Look{Name: lookTarget, Remote: true, At: "the docker engine's list of containers", Late: Note, LateCure: "If the docker engine hangs, restart it; docker ps shows whether it answers",
		Do: func(ctx context.Context) []Result {
			if err := s.Engine.Ping(ctx); err != nil {
				return ok("no engine to ask") // the look at the engine says so
			}
			var all []string
			for _, project := range s.Projects {
				if project.Target.Project == "" || len(project.Services) == 0 {
					continue // compose derives the name, or acts on all services
				}
				found, err := s.Engine.FindTargets(ctx, project.Target.Project, project.Services)
				if err != nil {
					return refuse("The engine's log may say more", "the containers of project %s cannot be inspected: %s", project.Target.Project, s.oneLine(err.Error()))
				}
				if len(found.Sharers) > 0 {
					together := append([]string{"up", "-d", "--no-deps"}, slices.Concat(project.Services, found.Sharers)...)
					return refuse("Have the plan replace all of them: "+strings.Join(slices.Concat(project.Target.Prefix, together), " "),
						"service %s uses the network or processes of the container of service %s, and would be cut off when that is replaced", strings.Join(found.Sharers, ", "), strings.Join(project.Services, ", "))
				}
				for _, service := range project.Services {
					if gone := found.Gone[service]; len(gone) > 0 {
						return note("Build or pull the image, or expect a rollback that has to build", "the image of a container of service %s is gone: %s", service, strings.Join(gone, ", "))
					}
				}
				all = append(all, found.Containers...)
			}
			if len(all) == 0 {
				return ok("no container to replace")
			}
			return ok("%s can be inspected", strings.Join(all, ", "))
		}}
}
