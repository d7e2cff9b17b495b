package worker

import "net"

// OpenWire lets tests publish what amqp091-go cannot say by itself.
func OpenWire(conn net.Conn) net.Conn { return newWireConn(conn) }

// PriorityZero marks a delivery mode, see wire.go.
const PriorityZero = priorityZero
