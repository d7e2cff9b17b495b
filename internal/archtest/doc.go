// Package archtest holds the rules about who may import whom, and that every
// package says what it is for. It has tests only.
package archtest
