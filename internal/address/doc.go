// Package address reads the addresses that the program is given, of brokers
// and of databases, and says how each may be shown.
//
// One parser per kind gives a value that both connects and masks, so that the
// two can never disagree about where a password ends. The parsers read what
// kombu and SQLAlchemy read, in the same way: a worker that takes another's
// place gets that one's addresses. What cannot be parsed is shown as nothing
// but its scheme, and so is what can be read in two ways: an address with an
// unescaped @ behind its host may hold the rest of a password there.
//
// It knows no driver and opens no connection; those who connect ask it.
package address
