package devenv

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"time"
)

//go:embed images
var imageFiles embed.FS

// image is a server's official image, and how to make a substitute where no
// registry is reachable.
type image struct {
	official   string
	substitute string
	recipe     string // folder in images/, "" for the base alone
	suite      string // of Debian, "" for the host's own
	// versions are the packages that it must contain, as name=version. It is ""
	// for a suite that does not change from day to day.
	versions string
}

// unstable is Debian's suite with the newest releases.
const unstable = "sid"

var (
	rabbitMQImage = image{official: "rabbitmq:3.13-management", substitute: "mm-rabbitmq:stable", recipe: "rabbitmq"}
	postgresImage = image{official: "postgres:15", substitute: "mm-postgres:stable", recipe: "postgres"}
	workerImage   = image{official: "debian:bookworm-slim", substitute: "mm-base:stable"}
	pythonImage   = image{official: "python:3.11-slim", substitute: "mm-base:stable"}
	// The substitute of buildImage has no Go, so it needs PREBUILT=1.
	buildImage = image{official: "golang:1.26-bookworm", substitute: "mm-base:stable"}

	newestRabbitMQImage = image{official: "rabbitmq:management", substitute: "mm-rabbitmq:newest", recipe: "rabbitmq", suite: unstable}
	newestPostgresImage = image{official: "postgres:latest", substitute: "mm-postgres:newest", recipe: "postgres", suite: unstable}
)

// basePackages are the packages of the base image that all substitutes share.
const basePackages = "rabbitmq-server,postgresql,git,ca-certificates,util-linux,python3"

// recipeLabel is the label with the digest of a substitute's recipe.
const recipeLabel = "mm-orchestrator.recipe"

// pullLimit is the limit on the time to pull an image.
const pullLimit = 10 * time.Minute

// stackImages exports the images of docker-compose.yaml.
func (b *startup) stackImages(ctx context.Context) error {
	if err := b.waitEngine(ctx); err != nil {
		return err
	}
	for _, wanted := range []struct {
		variable string
		image    image
	}{
		{"RABBITMQ_IMAGE", rabbitMQImage},
		{"POSTGRES_IMAGE", postgresImage},
		{"WORKER_BASE_IMAGE", workerImage},
		{"BUILD_IMAGE", buildImage},
		{"PYTHON_IMAGE", pythonImage},
	} {
		if given := os.Getenv(wanted.variable); given != "" {
			b.export(wanted.variable, given)
			continue
		}
		name, err := b.image(ctx, wanted.image)
		if err != nil {
			return err
		}
		b.export(wanted.variable, name)
		if wanted.image == buildImage && name == buildImage.substitute {
			b.export("PREBUILT", "1")
		}
	}
	return nil
}

// image returns the name of an image that the engine has: the official image if
// it is present or can be pulled, otherwise the substitute, which is made if it
// is missing.
func (b *startup) image(ctx context.Context, wanted image) (string, error) {
	if _, err := output(ctx, "docker", "image", "inspect", wanted.official); err == nil {
		return wanted.official, nil
	}
	if imageRecipe(ctx, wanted.substitute) == wanted.digest() {
		return wanted.substitute, nil
	}
	unlock, err := b.lockImage(ctx, wanted)
	if err != nil {
		return "", err
	}
	defer unlock()
	pullErr := b.pull(ctx, wanted.official)
	if pullErr == nil {
		return wanted.official, nil
	}
	if ctx.Err() != nil {
		return "", ctx.Err()
	}
	if err := b.substitute(ctx, wanted); err != nil {
		return "", fmt.Errorf("image %s cannot be pulled (%v), and a substitute cannot be made from Debian's packages: %w", wanted.official, pullErr, err)
	}
	return wanted.substitute, nil
}

// newestImage returns the name of an image with the newest release of a server.
// It is made from Debian's unstable suite; if that fails, it is the official
// image, pulled again.
func (b *startup) newestImage(ctx context.Context, wanted image) (string, error) {
	wanted = b.newest.of(ctx, b, wanted)
	var makeErr error
	if wanted.versions != "" {
		if imageRecipe(ctx, wanted.substitute) == wanted.digest() {
			return wanted.substitute, nil
		}
		unlock, err := b.lockImage(ctx, wanted)
		if err != nil {
			return "", err
		}
		defer unlock()
		if makeErr = b.substitute(ctx, wanted); makeErr == nil {
			return wanted.substitute, nil
		}
		if ctx.Err() != nil {
			return "", ctx.Err()
		}
	}
	pullErr := b.pull(ctx, wanted.official)
	switch {
	case pullErr == nil:
		return wanted.official, nil
	case ctx.Err() != nil:
		return "", ctx.Err()
	case makeErr == nil && imageRecipe(ctx, wanted.substitute) != "":
		return wanted.substitute, nil // made on an earlier day; a progress line has said so
	}
	return "", fmt.Errorf("the newest image %s can neither be made from Debian's packages (%v) nor be pulled: %w", wanted.substitute, errors.Join(b.newest.err, makeErr), pullErr)
}

// lockImage prevents other runs from making the same substitute at once.
func (b *startup) lockImage(ctx context.Context, wanted image) (unlock func(), err error) {
	return b.cache.lock(ctx, "image-"+strings.NewReplacer(":", "-", "/", "-").Replace(wanted.substitute))
}

func (b *startup) pull(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, pullLimit)
	defer cancel()
	w := b.progress.start("pulling", "image "+name)
	if err := b.run(ctx, w, exec.Command("docker", "pull", name)); err != nil {
		w.end("image "+name, "not available")
		return err
	}
	w.done("image " + name)
	return nil
}

// substitute makes an image from the distribution's packages: mmdebstrap makes
// the shared base, and docker build adds a layer.
func (b *startup) substitute(ctx context.Context, wanted image) error {
	base, err := b.baseImage(ctx, wanted)
	if err != nil || wanted.recipe == "" {
		return err
	}
	if imageRecipe(ctx, wanted.substitute) == wanted.digest() {
		return nil // another run made it while this one waited for the lock
	}
	w := b.progress.start("building", "image "+wanted.substitute)
	defer w.failed()
	source, err := buildContext(wanted.recipe)
	if err != nil {
		return err
	}
	build := exec.Command("docker", "build", "--build-arg", "BASE="+base, "--label", recipeLabel+"="+wanted.digest(), "--tag", wanted.substitute, "-")
	build.Stdin = source
	if err := b.run(ctx, w, build); err != nil {
		return err
	}
	w.done("image " + wanted.substitute)
	return nil
}

// baseImage makes the base image of a suite unless it exists.
func (b *startup) baseImage(ctx context.Context, wanted image) (string, error) {
	suite := wanted.suite
	base := image{substitute: "mm-base:stable"}
	if suite != "" {
		base = image{substitute: "mm-base:" + suite, suite: suite, versions: wanted.versions}
	}
	unlock, err := b.cache.lock(ctx, "base-"+strings.TrimPrefix(base.substitute, "mm-base:"))
	if err != nil {
		return "", err
	}
	defer unlock()
	if imageRecipe(ctx, base.substitute) == base.digest() {
		return base.substitute, nil
	}
	if err := b.debian.wait(ctx, "mmdebstrap"); err != nil {
		return "", err
	}
	if _, err := exec.LookPath("mmdebstrap"); err != nil {
		return "", errors.New("mmdebstrap is not installed; on Debian as root: apt-get install mmdebstrap")
	}
	mirror, err := debianMirror(ctx)
	if err != nil {
		return "", err
	}
	if suite == "" {
		if suite, err = debianRelease(); err != nil {
			return "", err
		}
	}
	w := b.progress.start("building", "image "+base.substitute)
	defer w.failed()
	archive := filepath.Join(b.dir, "base-"+suite+".tar")
	defer os.Remove(archive)
	bootstrap := exec.Command("mmdebstrap", "--variant=minbase", "--include="+basePackages,
		// The index of a mirror's unstable suite may be weeks old.
		`--aptopt=Acquire::Check-Valid-Until "false"`,
		"--dpkgopt=force-unsafe-io", "--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/man/*",
		"--dpkgopt=path-exclude=/usr/share/locale/*",
		// No PostgreSQL cluster: the entrypoint makes one.
		`--essential-hook=mkdir -p "$1/etc/postgresql-common" && echo "create_main_cluster = false" > "$1/etc/postgresql-common/createcluster.conf"`,
		suite, archive, "deb "+mirror+" "+suite+" main")
	bootstrap.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	if err := b.run(ctx, w, bootstrap); err != nil {
		return "", err
	}
	load := exec.Command("docker", "import", "--change", "LABEL "+recipeLabel+"="+base.digest(), archive, base.substitute)
	if err := b.run(ctx, w, load); err != nil {
		return "", err
	}
	w.done("image " + base.substitute)
	return base.substitute, nil
}

// debianMirror returns the mirror that the host's apt uses.
func debianMirror(ctx context.Context) (string, error) {
	sites, err := output(ctx, "apt-get", "indextargets", "--format", "$(ORIGIN) $(LABEL) $(SITE)", "Created-By: Packages")
	if err != nil {
		return "", fmt.Errorf("find the Debian mirror: %w", err)
	}
	for line := range strings.Lines(sites) {
		// The security archive has another label, and is not a complete suite.
		if site, found := strings.CutPrefix(strings.TrimSpace(line), "Debian Debian "); found {
			return site, nil
		}
	}
	return "", errors.New("apt knows no Debian mirror; run apt-get update")
}

// debianRelease returns the host's code name, such as bookworm.
func debianRelease() (string, error) {
	content, err := os.ReadFile("/etc/os-release")
	if err != nil {
		return "", err
	}
	values := map[string]string{}
	for line := range strings.Lines(string(content)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		values[name] = strings.Trim(value, `"`)
	}
	if values["ID"] != "debian" || values["VERSION_CODENAME"] == "" {
		return "", fmt.Errorf("images are made from Debian's packages, this is %s", values["PRETTY_NAME"])
	}
	return values["VERSION_CODENAME"], nil
}

// imageRecipe returns the recipe label of a substitute, or "" if there is no
// such image.
func imageRecipe(ctx context.Context, name string) string {
	label, err := output(ctx, "docker", "image", "inspect", "--format", `{{index .Config.Labels "`+recipeLabel+`"}}`, name)
	if err != nil {
		return ""
	}
	return label
}

// digest changes with the recipe, so that outdated substitutes are made again.
func (i image) digest() string {
	hash := sha256.New()
	fmt.Fprintln(hash, basePackages, i.suite)
	if i.versions != "" {
		fmt.Fprintln(hash, i.versions)
	}
	if i.recipe != "" {
		content, err := buildContext(i.recipe)
		if err != nil {
			panic(err) // the files are embedded
		}
		io.Copy(hash, content)
	}
	return hex.EncodeToString(hash.Sum(nil))[:16]
}

// buildContext packs an embedded folder as the context of docker build.
func buildContext(recipe string) (io.Reader, error) {
	var packed bytes.Buffer
	archive := tar.NewWriter(&packed)
	folder := path.Join("images", recipe)
	entries, err := fs.ReadDir(imageFiles, folder)
	if err != nil {
		return nil, err
	}
	for _, entry := range entries {
		content, err := fs.ReadFile(imageFiles, path.Join(folder, entry.Name()))
		if err != nil {
			return nil, err
		}
		if err := archive.WriteHeader(&tar.Header{Name: entry.Name(), Mode: 0o755, Size: int64(len(content))}); err != nil {
			return nil, err
		}
		if _, err := archive.Write(content); err != nil {
			return nil, err
		}
	}
	return &packed, archive.Close()
}
