// Package githubtest is a server like GitHub Enterprise on loopback, for tests and the
// demo: repositories of git behind TLS and a token, and as much of the REST API as a
// pull request needs, as strict as GitHub is about it.
//
// It owns its repositories, and shares nothing with packages gitrepo and github, which
// are tested against it.
package githubtest
