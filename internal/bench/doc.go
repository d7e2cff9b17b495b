// Package bench measures a worker of this project beside real Celery and beside the
// floor of what the machine, the broker and the database allow
// (docs/benchmarks/README.md). It measures and never judges: no figure makes a run
// fail.
//
// All contenders use the same RabbitMQ and PostgreSQL, which [Run] starts for itself
// with durable commits. They take turns: a round runs each of them once, each round
// begins with another one, and a ratio is made of two values of one round. A machine
// that is slow for a minute is therefore slow for all of them.
//
// Each contender is a process of its own, started anew for each sample (package
// contender). A sample in which a message is left in the queue or a result is missing
// is an error, since a contender that does less is faster.
package bench
