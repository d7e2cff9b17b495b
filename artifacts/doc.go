// Package artifacts is a run's files: where they may lie, how they are
// written, and what must not be read in them.
//
// It owns the rules of the artifact root (docs/moonmind.md#artifacts),
// streaming files that are hashed and redacted while they are written, and the
// redaction rules (docs/moonmind.md#secrets). It knows no database and no
// steps.
package artifacts
