// Package workertest helps to test handlers and workers. [Call] runs a handler
// without a broker, [Run] a chain, a group or another canvas with all that follows.
// [Start] runs a worker for the duration of a test, [Results] keeps results in memory,
// [Message] makes task messages, and [Proxy] injects network faults between a worker
// and its broker.
//
// Call and Run need no server: a [worker.Config] with any valid Broker and Queues is
// enough. A worker that Start runs needs none either if its Transport is that of package
// worker/broker/memory. Otherwise Start and Proxy need a RabbitMQ; give each test a
// virtual host of its own.
package workertest
