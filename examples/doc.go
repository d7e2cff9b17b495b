// Package examples has programs that use the library. Each takes the addresses of its
// servers as arguments, and a test runs them all with a real broker and a real database:
//
//	go run ./examples/worker amqp://guest:guest@localhost:5672/ db+postgresql://shop:shop@localhost/shop
//	go run ./examples/chain amqp://guest:guest@localhost:5672/ db+postgresql://shop:shop@localhost/shop
//
// Smaller examples, which need no server, stand beside what they show: go doc worker,
// client and worker/workertest have them.
package examples
