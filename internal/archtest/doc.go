// Package archtest tests rules for the whole repository: which package may
// import which, that every package has a package doc, and that every citation
// leads to an existing heading. It has only tests.
package archtest
