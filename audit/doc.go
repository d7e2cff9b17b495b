// Package audit defines the audit trail of a run: the records, their encoding, the
// hash chain that joins them, and the check that nobody has altered them.
//
// It is pure. Package store appends records to the database and reads them;
// docs/audit.md is the description for those who read a trail.
package audit
