package devenv

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
)

// kept is the content of the state file of `make services-up`.
type kept struct {
	Vars    map[string]string `json:"vars"`
	Remains remains           `json:"remains"`
}

func (c *cache) keptPath() string { return c.path("services", "up.json") }

func (c *cache) readKept() (kept, error) {
	var k kept
	content, err := os.ReadFile(c.keptPath())
	if errors.Is(err, os.ErrNotExist) {
		return k, nil
	}
	if err == nil {
		err = json.Unmarshal(content, &k)
	}
	if err != nil {
		return k, fmt.Errorf("state of services-up: %w; remove %s", err, c.keptPath())
	}
	return k, nil
}

// keptServices returns the variables of the services that services-up has left
// running. If one of its processes has died since, it returns none.
func (c *cache) keptServices() map[string]string {
	k, err := c.readKept()
	if err != nil {
		return nil
	}
	for _, g := range k.Remains.Groups {
		if !g.alive() {
			return nil
		}
	}
	return k.Vars
}

// keep records for Down what is running, and ends the guard without ending that.
func (e *Environment) keep() error {
	k, err := e.cache.readKept()
	if err != nil {
		return err
	}
	started := e.guard.remains
	if e.cache.keptServices() == nil {
		// Up has found none, or some of them dead; its new services replace
		// them.
		if err := k.Remains.end(); err != nil {
			return err
		}
		k.Remains = remains{}
	}
	k.Vars = e.vars
	k.Remains.Groups = append(k.Remains.Groups, started.Groups...)
	k.Remains.Containers = append(k.Remains.Containers, started.Containers...)
	k.Remains.Folders = append(k.Remains.Folders, started.Folders...)
	k.Remains.Engine = k.Remains.Engine || started.Engine
	content, err := json.MarshalIndent(k, "", "  ")
	if err != nil {
		return err
	}
	temporary := e.cache.keptPath() + ".new"
	if err := os.WriteFile(temporary, append(content, '\n'), 0o600); err != nil {
		return err
	}
	if err := os.Rename(temporary, e.cache.keptPath()); err != nil {
		return err
	}
	if k.Remains.Engine {
		if err := keepEngine(true); err != nil {
			return err
		}
	}
	if err := e.guard.tell(change{Keep: true}); err != nil {
		return err
	}
	return e.guard.close()
}

// Down ends what an Up with Config.Keep has left running. It returns the number
// of servers.
func Down() (int, error) {
	cache, err := openCache()
	if err != nil {
		return 0, err
	}
	k, err := cache.readKept()
	if err != nil {
		return 0, err
	}
	if k.Remains.Engine {
		if err := keepEngine(false); err != nil {
			return 0, err
		}
	}
	if err := k.Remains.end(); err != nil {
		return 0, err
	}
	if err := os.Remove(cache.keptPath()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return 0, err
	}
	ended := len(k.Remains.Groups) + len(k.Remains.Containers)
	if k.Remains.Engine {
		ended++
	}
	return ended, nil
}
