// Package archtest holds the rules about who may import whom, that every
// package says what it is for, and that what a text cites can be found. It has
// tests only.
package archtest
