// Package address parses the addresses of brokers and databases, and masks their
// passwords.
//
// Each kind of address has one parser, whose result is used both to connect and to
// mask, so that the two cannot disagree about where a password ends. The parsers
// accept what kombu and SQLAlchemy accept, with the same result, because a worker
// that replaces a Python worker gets its addresses. An invalid address is shown
// only by its scheme. So is an ambiguous one: with an unescaped @ after its host,
// the parts around that @ may belong to the password.
//
// The package uses no driver and opens no connection.
package address
