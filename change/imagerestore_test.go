package change

import (
	"maps"
	"slices"
	"strings"
	"testing"
	"time"
)

// imageTest is a project with a target and another service, as it was before a run.
func imageTest() (*Image, ImageNow) {
	started := time.Date(2026, 1, 14, 9, 0, 0, 0, time.UTC)
	web := Container{ID: "aaaaaaaaaaaa1", Name: "p-web-1", Service: "web", Number: 1, ImageID: "sha256:old", Image: "p-web", ConfigHash: "hash", State: "running", StartedAt: started}
	other := Container{ID: "bbbbbbbbbbbb1", Name: "p-other-1", Service: "other", Number: 1, ImageID: "sha256:other", Image: "p-other", ConfigHash: "other", State: "running", StartedAt: started, Health: "healthy"}
	i := &Image{
		EngineSeen: true, Project: "p", Services: []string{"web"}, Compose: []string{"docker", "compose"}, RestartBegun: &started,
		Before: Project{Containers: []Container{other, web}, Networks: []Network{{Name: "p_default", ID: "n1"}}},
		Names:  []ImageName{{"p-web", "sha256:old"}},
	}
	now := ImageNow{
		Project: Project{Containers: []Container{other, web}, Networks: []Network{{Name: "p_default", ID: "n1"}}},
		Images:  map[string]bool{"sha256:old": true, "sha256:other": true}, Names: map[string]string{"p-web": "sha256:new", "p-other": "sha256:other"},
		Differing: map[string][]string{}, Hashes: map[string]string{"web": "hash"}, Tried: map[string]bool{}, Kept: map[string]bool{},
	}
	return i, now
}

func (n *ImageNow) web() *Container { return &n.Project.Containers[1] }

// young makes the target's container one that the run has created.
func (n *ImageNow) young() *Container {
	web := n.web()
	web.ID, web.ImageID, web.replaces, web.StartedAt = "cccccccccccc1", "sha256:new", true, web.StartedAt.Add(time.Hour)
	return web
}

func TestRestoreDecides(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		change func(i *Image, now *ImageNow)
		want   string // the acts, each with what it acts on
	}{
		"all as before":           {func(_ *Image, now *ImageNow) { now.Names["p-web"] = "sha256:old" }, ""},
		"built and not restarted": {func(*Image, *ImageNow) {}, "tag image p-web sha256:old"},
		"restarted":               {func(_ *Image, now *ImageNow) { now.young() }, "tag image p-web sha256:old; compose up web 1 start"},
		"restarted, the name is as before": {func(_ *Image, now *ImageNow) { now.young(); now.Names["p-web"] = "sha256:old" },
			"compose up web 1 start"},
		"image gone": {func(_ *Image, now *ImageNow) { now.young(); delete(now.Images, "sha256:old") },
			"load image sha256:old; tag image p-web sha256:old; compose up web 1 start"},
		"compose has run": {func(_ *Image, now *ImageNow) { now.young(); now.Tried["web"] = true },
			"tag image p-web sha256:old; replace container p-web-1"},
		"other files": {func(_ *Image, now *ImageNow) { now.young(); now.Hashes["web"] = "another" },
			"tag image p-web sha256:old; replace container p-web-1"},
		"compose does not tell": {func(_ *Image, now *ImageNow) { now.young(); now.Hashes["web"] = "" },
			"tag image p-web sha256:old; compose up web 1 start"},
		"depends on another service": {func(i *Image, now *ImageNow) {
			now.young()
			i.Before.Containers[1].DependsOn = "other:service_started:false"
		},
			"tag image p-web sha256:old; replace container p-web-1"},
		"created by digest": {func(i *Image, now *ImageNow) { now.young(); i.Before.Containers[1].Image = "p-web@sha256:1" },
			"replace container p-web-1"},
		"same image, other configuration": {func(_ *Image, now *ImageNow) { web := now.young(); web.ImageID = "sha256:old"; web.ConfigHash = "x" },
			"tag image p-web sha256:old; compose up web 1 start"},
		"made like it": {func(_ *Image, now *ImageNow) { now.young().ImageID = "sha256:old" }, "tag image p-web sha256:old"},
		"made like it, not started": {func(_ *Image, now *ImageNow) {
			web := now.young()
			web.ImageID, web.State, web.StartedAt = "sha256:old", "created", time.Time{}
		}, "start container p-web-1"},
		"made like it, ended by itself": {func(_ *Image, now *ImageNow) {
			web := now.young()
			web.ImageID, web.State, web.ExitCode = "sha256:old", "exited", 1
		},
			"tag image p-web sha256:old"},
		"made almost like it": {func(_ *Image, now *ImageNow) {
			now.young().ImageID = "sha256:old"
			now.Differing["cccccccccccc1"] = []string{"Config.Env"}
		}, "tag image p-web sha256:old; compose up web 1 start"},
		"other volumes": {func(_ *Image, now *ImageNow) {
			web := now.young()
			web.ImageID, web.Volumes = "sha256:old", map[string]string{"/x": "v"}
		}, "tag image p-web sha256:old; compose up web 1 start"},
		"old one stopped":     {func(_ *Image, now *ImageNow) { now.web().State, now.web().ExitCode = "exited", 143 }, "start container p-web-1"},
		"old one missing":     {func(_ *Image, now *ImageNow) { now.Project.Containers = now.Project.Containers[:1] }, "tag image p-web sha256:old; compose up web 1 start"},
		"stopped before":      {func(i *Image, now *ImageNow) { i.Before.Containers[1].State = "exited"; now.young() }, "tag image p-web sha256:old; compose up web 1"},
		"stopped, now runs":   {func(i *Image, _ *ImageNow) { i.Before.Containers[1].State = "exited" }, "stop container p-web-1"},
		"paused before":       {func(i *Image, _ *ImageNow) { i.Before.Containers[1].State = "paused" }, "pause container p-web-1"},
		"restarting before":   {func(i *Image, now *ImageNow) { i.Before.Containers[1].State = "restarting"; now.web().State = "exited" }, "tag image p-web sha256:old"},
		"no container before": {func(i *Image, now *ImageNow) { i.Before.Containers = i.Before.Containers[:1]; now.young() }, "remove container p-web-1"},
		"no image before":     {func(i *Image, _ *ImageNow) { i.Names[0].ID = "" }, "untag image p-web"},
		"name is in use":      {func(i *Image, now *ImageNow) { i.Names[0].ID = ""; now.Kept["p-web"] = true }, ""},
		"new network": {func(_ *Image, now *ImageNow) {
			now.Project.Networks = append(now.Project.Networks, Network{Name: "p_new", ID: "n2"})
		},
			"tag image p-web sha256:old; remove network p_new"},
		"new network before the restart": {func(i *Image, now *ImageNow) {
			i.RestartBegun = nil
			now.Project.Networks = append(now.Project.Networks, Network{Name: "p_new", ID: "n2"})
		}, "tag image p-web sha256:old"},
		"interrupted, old one is there": {func(_ *Image, now *ImageNow) {
			temporary := *now.web()
			temporary.ID, temporary.Name, temporary.replaces, temporary.State, temporary.StartedAt = "c", "aaaaaaaaaaaa_p-web-1", true, "created", time.Time{}
			now.Project.Containers = append(now.Project.Containers, temporary)
		}, "mend container remove aaaaaaaaaaaa_p-web-1"},
		"interrupted, old one is gone":               {func(_ *Image, now *ImageNow) { now.young().Name = "aaaaaaaaaaaa_p-web-1" }, "mend container rename aaaaaaaaaaaa_p-web-1 p-web-1"},
		"other service was changed by somebody else": {func(_ *Image, now *ImageNow) { now.Project.Containers[0].ID = "x" }, "tag image p-web sha256:old"},
		"other service was changed by the run": {func(i *Image, now *ImageNow) {
			now.Project.Containers[0].ID, now.Project.Containers[0].ConfigHash = "x", "y"
			i.Touched = []string{"other"}
		}, "compose up other 1 start"},
		"other service was stopped by the run": {func(i *Image, now *ImageNow) {
			now.Project.Containers[0].State = "exited"
			i.Touched = []string{"other"}
		}, "start container p-other-1"},
		"a new service of somebody else": {func(_ *Image, now *ImageNow) { now.add("third", "t") }, "tag image p-web sha256:old"},
		"a new service of the run":       {func(i *Image, now *ImageNow) { now.add("third", "t"); i.Appeared = []string{"t"} }, "remove container p-third-1"},
		"whole project": {func(i *Image, now *ImageNow) {
			i.Services = nil
			now.Project.Containers[0].ID, now.Project.Containers[0].ImageID = "x", "y"
		},
			"compose up other 1 start"},
		"scaled": {func(i *Image, now *ImageNow) {
			second := i.Before.Containers[1]
			second.ID, second.Name, second.Number = "d", "p-web-2", 2
			i.Before.Containers = append(i.Before.Containers, second)
			now.young()
		}, "tag image p-web sha256:old; compose up web 2 start"},
		"one of two was stopped before, the other one is replaced": {func(i *Image, now *ImageNow) {
			second := i.Before.Containers[1]
			second.ID, second.Name, second.Number, second.State, second.ExitCode = "d", "p-web-2", 2, "exited", 3
			i.Before.Containers = append(i.Before.Containers, second)
			now.Project.Containers = append(now.Project.Containers, second)
			now.young()
		}, "tag image p-web sha256:old; replace container p-web-1"},
	} {
		i, now := imageTest()
		test.change(i, &now)
		var acts []string
		for _, act := range i.Restore(now) {
			text := act.Do
			switch act.Do {
			case LoadImage:
				text += " " + act.ID
			case MendContainer:
				verb := " rename "
				if act.Repair.Name == "" {
					verb = " remove "
				}
				text = strings.TrimSpace(text + verb + act.Container.Name + " " + act.Repair.Name)
			case TagImage:
				text += " " + act.Name + " " + act.ID
			case UntagImage:
				text += " " + act.Name
			case ComposeUp:
				text += " " + act.Service + " " + string(rune('0'+act.Count))
				if act.Start {
					text += " start"
				}
			case ReplaceContainer:
				text += " " + act.Before.Name
			case RemoveNetwork:
				text += " " + act.Network.Name
			default:
				text += " " + act.Container.Name
			}
			if act.Why == "" && act.Do != MendContainer || act.String() == act.Do {
				t.Errorf("%s: %s has no reason or no line for the log", name, act.Do)
			}
			acts = append(acts, text)
		}
		if got := strings.Join(acts, "; "); got != test.want {
			t.Errorf("%s: %s\nwant %s", name, got, test.want)
		}
	}
}

func (n *ImageNow) add(service, id string) {
	n.Project.Containers = append(n.Project.Containers, Container{ID: id, Name: "p-" + service + "-1", Service: service, State: "running"})
}

func TestEqualNamesWhatDiffers(t *testing.T) {
	t.Parallel()
	i, now := imageTest()
	now.Names["p-web"] = "sha256:old"
	images, configurations, differences := i.Equal(now)
	if images != "sha256:old" || configurations != "hash" || len(differences) > 0 {
		t.Errorf("%s, %s, %v", images, configurations, differences)
	}
	now.young().ConfigHash = "x"
	now.web().State = "exited"
	now.Names["p-web"] = "sha256:new"
	_, _, differences = i.Equal(now)
	want := []string{
		"container p-web-1: image sha256:new instead of sha256:old", "container p-web-1: configuration x instead of hash",
		"container p-web-1: it was running, is exited", "image name p-web: it stands for sha256:new instead of sha256:old",
	}
	if !slices.Equal(differences, want) {
		t.Errorf("%q, want %q", differences, want)
	}
	now.Project.Containers = nil
	if _, _, differences = i.Equal(now); !slices.Contains(differences, "container p-web-1: it is missing") {
		t.Errorf("%q", differences)
	}
}

func TestOtherChanges(t *testing.T) {
	t.Parallel()
	for want, change := range map[string]func(*Container){
		"": func(*Container) {},
		"other (container bbbbbbbbbbbb was started again)":        func(c *Container) { c.StartedAt = c.StartedAt.Add(1) },
		"other (container bbbbbbbbbbbb was running, is exited)":   func(c *Container) { c.State, c.ExitCode = "exited", 137 },
		"other (container bbbbbbbbbbbb was healthy, is starting)": func(c *Container) { c.Health = "starting" },
	} {
		i, now := imageTest()
		change(&now.Project.Containers[0])
		changes, touched, appeared := i.OtherChanges(now.Project, true)
		if strings.Join(changes, "") != want || (len(touched) > 0) != (want != "") || len(appeared) > 0 {
			t.Errorf("%q, %q, %q, want %q", changes, touched, appeared, want)
		}
	}
	for name, change := range map[string]func(before, now *Container){
		"restarted by its policy": func(_, now *Container) { now.StartedAt, now.Restarts = now.StartedAt.Add(1), 1 },
		"crashes, as before": func(before, now *Container) {
			before.State, now.State = "restarting", "running"
			before.Health, now.Health = "", ""
		},
		"a job that has ended by itself": func(_, now *Container) { now.State, now.Health = "exited", "" },
	} {
		i, now := imageTest()
		change(&i.Before.Containers[0], &now.Project.Containers[0])
		if changes, _, _ := i.OtherChanges(now.Project, false); len(changes) > 0 {
			t.Errorf("%s: %q", name, changes)
		}
	}
}

func TestRepairs(t *testing.T) {
	t.Parallel()
	temporary := func(id, name, state string, started int) Container {
		c := Container{ID: id, Name: name, Service: "web", State: state, replaces: true}
		if started > 0 {
			c.StartedAt = time.Unix(int64(started), 0)
		}
		return c
	}
	plain := Container{ID: "old", Name: "p-web-1", Service: "web", State: "running"}
	for name, test := range map[string]struct {
		containers []Container
		want       map[string]string // new names, "" for removed, by id
	}{
		"nothing":                             {[]Container{plain}, map[string]string{}},
		"beside":                              {[]Container{temporary("t", "aaaaaaaaaaaa_p-web-1", "created", 0), plain}, map[string]string{"t": ""}},
		"alone":                               {[]Container{temporary("t", "aaaaaaaaaaaa_p-web-1", "running", 1)}, map[string]string{"t": "p-web-1"}},
		"two, one runs":                       {[]Container{temporary("t", "aaaaaaaaaaaa_p-web-1", "created", 0), temporary("u", "bbbbbbbbbbbb_p-web-1", "running", 1)}, map[string]string{"t": "", "u": "p-web-1"}},
		"replaced before, under its own name": {[]Container{temporary("t", "p-web-1", "running", 1)}, map[string]string{}},
		"such a name without compose":         {[]Container{{ID: "x", Name: "aaaaaaaaaaaa_p-web-1", Service: "web"}}, map[string]string{}},
	} {
		got := map[string]string{}
		for _, repair := range (Project{Containers: test.containers}).Repairs(func(service string) bool { return service == "web" }) {
			got[repair.Container.ID] = repair.Name
		}
		if !maps.Equal(got, test.want) {
			t.Errorf("%s: %v, want %v", name, got, test.want)
		}
		project := Project{Containers: test.containers}
		mended := project.Mended(func(service string) bool { return service == "web" })
		if repairs := mended.Repairs(func(string) bool { return true }); len(repairs) > 0 || len(project.Containers) != len(test.containers) {
			t.Errorf("%s: mended, and to be mended again: %v", name, repairs)
		}
	}
	if repairs := (Project{Containers: []Container{temporary("t", "aaaaaaaaaaaa_p-web-1", "running", 1)}}).Repairs(func(string) bool { return false }); len(repairs) > 0 {
		t.Errorf("a service that is not the run's: %v", repairs)
	}
}

// TestWhoseAnonymousVolumes: only those that the engine has made for a container of the
// run are the run's.
func TestWhoseAnonymousVolumes(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		change func(i *Image, now *ImageNow)
		want   string
	}{
		"the run's":         {func(*Image, *ImageNow) {}, "new"},
		"no restart":        {func(i *Image, _ *ImageNow) { i.LastRestart = nil }, ""},
		"known":             {func(i *Image, _ *ImageNow) { i.Anonymous = []string{"new"} }, "new"},
		"of before":         {func(_ *Image, now *ImageNow) { now.web().ID = "aaaaaaaaaaaa1" }, ""},
		"used before":       {func(i *Image, _ *ImageNow) { i.Before.Containers[0].Volumes = map[string]string{"/x": "new"} }, ""},
		"an operator's":     {func(i *Image, now *ImageNow) { now.web().created = i.LastRestart.Add(-time.Second) }, ""},
		"another service's": {func(_ *Image, now *ImageNow) { now.web().Service = "third" }, ""},
		"a service's that the run has changed": {func(i *Image, now *ImageNow) {
			now.web().Service, i.Touched = "third", []string{"third"}
		}, "new"},
		"a service's that the run has created": {func(i *Image, now *ImageNow) {
			now.web().Service, i.Appeared = "third", []string{now.web().ID}
		}, "new"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			i, now := imageTest()
			i.LastRestart = i.RestartBegun
			web := now.young()
			web.created, web.ownVolumes = i.LastRestart.Add(time.Second), []string{"new"}
			test.change(i, &now)
			known := len(i.Anonymous)
			added := i.AddAnonymous(now.Project)
			if got := strings.Join(i.Anonymous, " "); got != test.want || added != (len(i.Anonymous) > known) {
				t.Errorf("%q, added %t", got, added)
			}
		})
	}
}

// TestAServiceThatWasCutOffIsSeenAndMadeAgain has a service beside the target that
// uses the network of the target's container, which the run has replaced.
func TestAServiceThatWasCutOffIsSeenAndMadeAgain(t *testing.T) {
	t.Parallel()
	i, now := imageTest()
	web := i.Before.Containers[1].ID
	i.Before.Containers[0].Shares, now.Project.Containers[0].Shares = []string{web}, []string{web}
	if changes, _, _ := i.OtherChanges(now.Project, false); len(changes) > 0 {
		t.Errorf("before the restart: %v", changes)
	}
	now.young()
	changes, touched, _ := i.OtherChanges(now.Project, false)
	if got, want := strings.Join(changes, "; "), "other (container bbbbbbbbbbbb uses the network or processes of p-web-1, which was removed: name both services in the plan's restart)"; got != want {
		t.Errorf("changes are %s, want %s", got, want)
	}
	i.AddOthers(touched, nil)
	now.Differing["bbbbbbbbbbbb1"] = []string{"cut off"}
	now.Tried["web"] = true
	var acts []string
	for _, act := range i.Restore(now) {
		acts = append(acts, act.String())
	}
	if got := strings.Join(acts, "; "); !strings.Contains(got, "Creating container p-web-1 again") || strings.Contains(got, "p-other-1") {
		t.Errorf("while web is not as before: %s", got)
	}
	now.web().ID, now.web().ImageID, now.web().StartedAt = "dddddddddddd1", "sha256:old", i.Before.Containers[1].StartedAt
	acts = nil
	for _, act := range i.Restore(now) {
		acts = append(acts, act.String())
	}
	if got, want := strings.Join(acts, "; "), "Creating container p-other-1 again: cut off"; !strings.Contains(got, want) {
		t.Errorf("then: %s, want %s", got, want)
	}
	if _, _, differences := i.Equal(now); !slices.Contains(differences, "container p-other-1: cut off") {
		t.Errorf("differences are %v", differences)
	}
}

// TestContainersWithoutTheirNetworks has a compose that has failed to replace a
// network: the container of before is there, and not connected.
func TestContainersWithoutTheirNetworks(t *testing.T) {
	t.Parallel()
	i, now := imageTest()
	now.Names["p-web"] = "sha256:old"
	i.Before.Containers[1].Networks = map[string]string{"p_default": "n1", "p_back": "n2"}
	for text, networks := range map[string]map[string]string{
		"":                                      {"p_default": "n1", "p_back": "n2"},
		"it is not connected to network p_back": {"p_default": "n1"},
		"it is connected to a network p_default that was removed": {"p_default": "n0", "p_back": "n2"},
	} {
		now.web().Networks = networks
		_, _, differences := i.Equal(now)
		acts := i.Restore(now)
		if text == "" {
			if len(differences) > 0 || len(acts) > 0 {
				t.Errorf("%v, %v", differences, acts)
			}
			continue
		}
		if !slices.Contains(differences, "container p-web-1: "+text) || len(acts) != 1 || acts[0].Do != ComposeUp {
			t.Errorf("%s: %v, %v", text, differences, acts)
		}
	}
}
