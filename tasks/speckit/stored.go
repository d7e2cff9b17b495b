package speckit

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/store"
)

// storedFile checks a file that an earlier worker or attempt has stored: it must be in
// the run's directory and have the digest with which it was recorded, if it was.
func (a *attempt) storedFile(kind, path string) (store.SpecArtifact, error) {
	found, err := a.measureStored(kind, path)
	if err != nil {
		return found, err
	}
	if recorded := a.run.Digests[found.SpecFile]; recorded != "" && recorded != "sha256:"+found.SHA256 {
		return store.SpecArtifact{}, valueError("the stored %s %s has changed since it was recorded (%s, now sha256:%s)%s", storedAs(kind), path, recorded, found.SHA256, discoverAgain)
	}
	return found, nil
}

// discoverAgain is what to do without a stored file.
const discoverAgain = ": retry the run from discovery"

func storedAs(kind string) string {
	if kind == "codex_patch" {
		return "patch"
	}
	return "file"
}

// measureStored returns size and digest of a file that an earlier worker has stored, as
// they are now.
func (a *attempt) measureStored(kind, path string) (store.SpecArtifact, error) {
	what, cure := storedAs(kind), discoverAgain
	name := a.inDirectory(path)
	if !filepath.IsLocal(name) {
		return store.SpecArtifact{}, valueError("the stored %s %s is not in the directory of run %s%s", what, path, a.runID, cure)
	}
	root, err := os.OpenRoot(a.place.Dir)
	if err != nil {
		return store.SpecArtifact{}, &failure{class: "OSError", text: fmt.Sprintf("%s cannot be read: %v", a.place.Dir, cause(err))}
	}
	defer root.Close()
	info, err := root.Lstat(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return store.SpecArtifact{}, &failure{class: "FileNotFoundError", text: "the stored " + what + " " + path + " does not exist any more" + cure}
	case err != nil:
		return store.SpecArtifact{}, &failure{class: "OSError", text: fmt.Sprintf("the stored %s %s cannot be read: %v", what, path, cause(err))}
	case !info.Mode().IsRegular():
		return store.SpecArtifact{}, valueError("the stored %s %s is not a regular file%s", what, path, cure)
	}
	file, err := root.Open(name)
	if err != nil {
		return store.SpecArtifact{}, &failure{class: "OSError", text: fmt.Sprintf("the stored %s %s cannot be read: %v", what, path, cause(err))}
	}
	defer file.Close()
	hash := sha256.New()
	size, err := io.Copy(hash, file)
	if err != nil {
		return store.SpecArtifact{}, &failure{class: "OSError", text: fmt.Sprintf("the stored %s %s cannot be read: %v", what, path, cause(err))}
	}
	return store.SpecArtifact{SpecFile: store.SpecFile{Type: kind, Path: path}, SizeBytes: size, SHA256: hex.EncodeToString(hash.Sum(nil))}, nil
}

// inDirectory is the path below the run's directory of a file as rows and context have
// it, "" if it is not below it.
func (a *attempt) inDirectory(path string) string {
	for _, base := range []string{a.base, a.place.RowPath, a.place.Dir} {
		if rest, found := strings.CutPrefix(path, base+"/"); found {
			return rest
		}
	}
	return ""
}
