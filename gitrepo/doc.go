// Package gitrepo clones a repository, says what was changed in the clone, applies a
// patch, commits it and pushes it.
//
// It owns how git is run for this: which programs, settings and variables have a part
// in it. What is changed and why belongs to its callers, and pull requests to package
// github.
//
//   - No hook, filter, file-system monitor or credential helper of the repository, the
//     user or the machine is run. Submodules are not fetched, and pointers of Git LFS
//     stay as they are.
//   - git may use only the protocols of Config.Schemes, and an address or a branch can
//     never be taken for an option.
//   - A token goes to git through a pipe, when git asks for the server that it belongs
//     to. It is in no argument, variable, file, address or error. Only commands that
//     talk to the server have the pipe.
//   - A clone is there as a whole, or not at all.
package gitrepo
