// Package protocol is Celery on the wire: task messages of protocol 2 and 1,
// signatures, Python's dialect of JSON, pickled result values, and exception
// dictionaries.
//
// It owns the translation between bytes and Go values, in both directions,
// and every fact about it (Celery 5.4 to 5.7, kombu 5.3 to 5.7). It does no
// I/O, knows no broker library and no database, and keeps no state.
//
// What arrives is never re-encoded unless it is changed: arguments, options
// and whole signatures are kept as the JSON text that Python wrote, so that
// NaN, integers of any size, type wrappers and the order of keys survive a
// republication byte for byte.
package protocol
