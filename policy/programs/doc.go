// Package programs decides which command lines of git, docker and docker-compose a
// plan may run. Both programs can do what a shell can (git -c alias.x='!…',
// docker run -v /:/host), so a list of programs is not enough.
//
// Per program, the rules list subcommands, and per subcommand options and what its
// arguments may be. What is not listed is refused: a version of git or docker that
// learns something new gives plans nothing new. [Judge] answers with the rule that
// refuses, the word that it refuses, and what permits it. [Describe] lists the rules.
//
// The package is pure: it starts nothing, and looks at files only through
// [Line.Resolve]. It leaves to its callers which programs may run at all, and where
// an operator's permissions come from.
package programs
