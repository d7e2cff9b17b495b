package devenv

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
)

// newest looks up, once per Up, which RabbitMQ and PostgreSQL Debian's unstable
// suite has. The suite changes daily: an image made from it last month would
// prove nothing about the newest servers.
type newest struct {
	once     sync.Once
	versions map[string]string // package to version
	err      error
}

// newestPackages are the packages whose versions decide whether an image is up
// to date.
var newestPackages = []string{"rabbitmq-server", "postgresql"}

// of returns the image for a server, with the package versions that it must
// contain. If the suite's index cannot be read, it accepts an existing image of
// any version, and a progress line says so.
func (n *newest) of(ctx context.Context, b *startup, wanted image) image {
	n.once.Do(func() {
		w := b.progress.start("looking up", "newest servers in Debian "+unstable)
		n.versions, n.err = b.unstableVersions(ctx, w)
		if n.err != nil {
			w.end(fmt.Sprintf("newest servers in Debian %s: not known, %s", unstable, shorten(strings.Join(strings.Fields(n.err.Error()), " "), 80)), "images as they are")
			return
		}
		var found []string
		for _, name := range newestPackages {
			found = append(found, name+" "+n.versions[name])
		}
		w.done("newest in Debian " + unstable + ": " + strings.Join(found, ", "))
	})
	for _, name := range newestPackages {
		if n.err == nil {
			wanted.versions += name + "=" + n.versions[name] + " "
		}
	}
	return wanted
}

// unstableVersions reads the versions of the packages from the suite's index.
func (b *startup) unstableVersions(ctx context.Context, w *work) (map[string]string, error) {
	apt, err := b.aptOf(ctx, w, unstable)
	if err != nil {
		return nil, err
	}
	text, err := captured(ctx, apt("apt-cache", append([]string{"madison"}, newestPackages...)...))
	if err != nil {
		return nil, err
	}
	versions := map[string]string{}
	lines := bufio.NewScanner(strings.NewReader(text))
	for lines.Scan() {
		// "rabbitmq-server | 4.3.6-1 | http://… sid/main amd64 Packages"
		if fields := strings.Split(lines.Text(), "|"); len(fields) == 3 {
			name := strings.TrimSpace(fields[0])
			if versions[name] == "" { // madison lists the highest version first
				versions[name] = strings.TrimSpace(fields[1])
			}
		}
	}
	for _, name := range newestPackages {
		if versions[name] == "" {
			return nil, fmt.Errorf("the suite has no package %s", name)
		}
	}
	return versions, nil
}

// aptOf downloads the index of a suite of Debian into a folder of its own, so that
// the host's apt configuration stays unchanged, and returns what makes commands of
// apt for that suite.
func (b *startup) aptOf(ctx context.Context, w *work, suite string) (func(program string, args ...string) *exec.Cmd, error) {
	mirror, err := debianMirror(ctx)
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(b.dir, "apt-"+suite+"-")
	if err != nil {
		return nil, err
	}
	lists := filepath.Join(dir, "lists")
	if err := os.MkdirAll(filepath.Join(lists, "partial"), 0o755); err != nil {
		return nil, err
	}
	sources := filepath.Join(dir, "sources.list")
	if err := os.WriteFile(sources, []byte("deb "+mirror+" "+suite+" main\n"), 0o644); err != nil {
		return nil, err
	}
	apt := func(program string, args ...string) *exec.Cmd {
		cmd := exec.Command(program, append([]string{
			"-o", "Dir::Etc::SourceList=" + sources, "-o", "Dir::Etc::SourceParts=/dev/null",
			"-o", "Dir::State::Lists=" + lists, "-o", "Dir::Cache::PkgCache=", "-o", "Dir::Cache::SrcPkgCache=",
			// apt's own user may not write to the folder.
			"-o", "APT::Sandbox::User=", "-o", "Acquire::Languages=none",
			// The index of a mirror's unstable suite may be weeks old.
			"-o", "Acquire::Check-Valid-Until=false", "-q"}, args...)...)
		cmd.Env = append(os.Environ(), "LC_ALL=C")
		cmd.Dir = dir
		return cmd
	}
	return apt, b.run(ctx, w, apt("apt-get", "-o", "APT::Update::Error-Mode=any", "update"))
}
