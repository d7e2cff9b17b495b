// Package contender has what package bench compares, each as a process of its own:
// the floor, a worker of package worker, and a Celery worker.
//
// The floor ([Floor]) is a bare loop over amqp091-go and pgx. It has the input and
// output that no worker for Celery's promises can avoid, and nothing else: the
// delivery, a confirmed message for the next task of a chain, one committed row for
// a result, the acknowledgement after that. It decodes no message, retries nothing
// and survives nothing. Whoever thinks that it does too much or too little can read
// all of it in floor.go.
//
// All three handle the same messages:
//
//   - bench.noop returns its argument.
//   - bench.timed writes how old its argument is, a time in nanoseconds since 1970.
//   - bench.mark writes that it runs. Marks tell the measuring process where a
//     measurement begins and ends.
//
// What a contender writes are lines in a named pipe.
package contender
