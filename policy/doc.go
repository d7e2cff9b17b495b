// Package policy says what runs may do to which service: the files that they may
// change, the programs that they may start, limits, and what verify asks for.
//
// A [Policy] comes from the built-in file profiles.yaml, from the operator's file
// ([Load]), and from settings that are for all services ([Policy.With]). For each
// value it keeps where that came from. [Policy.Find] answers for one service at one
// moment, because an override in the file may end on a day.
//
// The package reads one file and decides nothing else: steps apply the values, and
// package policy/programs has the rules for command lines.
package policy
