// Package artifacts writes the files of a run. It decides where they may be
// (docs/moonmind.md#artifacts), hashes them while they are written, and
// replaces secrets in them (docs/moonmind.md#secrets). It imports neither a
// database driver nor the steps.
package artifacts
