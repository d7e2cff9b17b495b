// Package github is a client for the part of GitHub's REST API that publishing a change
// needs: what a token may do with a repository, and the pull request of a branch.
//
// It owns how GitHub is asked: requests, limits, retries and what an answer means. What
// is published and when is decided by its callers; branches belong to package gitrepo.
//
//   - The token is read again for each request, so that a new one counts at once. It is
//     sent to the server of Config.API only, also after a redirect, and it is in no error.
//   - Every call ends: each request has a time limit, answers are read up to 16 MiB, and
//     waits are bounded by Config.Patience and the context.
//   - GitHub's rate limits are waited for as its documentation asks.
//   - An [Error] says in words what to do, and whether the same call can succeed later.
package github
