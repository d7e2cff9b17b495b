// Package worker is a Celery worker: it consumes task messages from RabbitMQ,
// runs the handlers registered for them, publishes what follows, stores the
// result, and acknowledges, in this order.
//
// It owns the connection, the declarations, the deliveries and everything
// that happens to them until they are acknowledged, reconnection and
// shutdown. It knows no SQL (results go to a [ResultBackend]) and no domain
// (handlers are given). Everything about bytes on the wire is left to
// package protocol.
package worker
