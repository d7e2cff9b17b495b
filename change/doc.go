// Package change knows what a run alters and takes back.
//
// A [Record] names everything that a run has altered or is about to alter, by ids
// and refs: the content itself stays in git and in the docker engine. One record
// per run is kept in the database. It is written before each act that it
// describes, so that whoever comes after a crash can tell what may have been
// done.
//
// The state of a repository at a moment is captured as git objects under refs of
// this package. Two states are compared, and the differences are judged
// against an allow-list; both are pure functions. One executor brings a path back
// to a captured state. Every act can be repeated after a crash at any moment,
// since the next try observes and decides again.
//
// The package runs git only, through a function that its caller gives it. It
// neither knows steps and plans nor writes to a database.
package change
