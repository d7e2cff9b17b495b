// Package change knows what a run alters and takes back.
//
// The state of a repository at a moment is captured as git objects under refs of
// this package. Two states are compared, and the differences are judged
// against an allow-list; both are pure functions. One executor brings a path back
// to a captured state.
//
// The package runs git only, through a function that its caller gives it. It
// neither knows steps and plans nor writes to a database.
package change
