// Package workertest helps to test tasks and workers: it runs handlers
// without a broker, runs a whole worker for the length of a test, keeps
// results in memory, makes task messages, and stands as a faulty network
// between a worker and its broker.
package workertest
