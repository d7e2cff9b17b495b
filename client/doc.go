// Package client calls tasks, as a Python program does with apply_async, and reads
// their results, as it does with AsyncResult. Workers in Python and in Go run the
// tasks. The program needs no running worker of its own.
//
//	c, err := client.New(client.Config{Broker: "amqp://…", Results: backend})
//	…
//	defer c.Close()
//	result, err := c.Send(ctx, client.Task("shop.add", 2, 3), client.Queue("shop"), client.Countdown(10*time.Second))
//	…
//	var sum int
//	err = result.Get(ctx, &sum)
//
// [Task] makes a [Signature]; [Chain] and [Group] combine signatures. An [Option] is
// one of apply_async's: of all sends of a signature with [Signature.With], of one
// send with [Client.Send].
//
// # Guarantees
//
//   - Send returns nil once the broker has confirmed every message and a queue has
//     it. A message that no queue receives is an error, [worker.ErrUnroutable]; Celery
//     loses it silently.
//   - When Send fails with [worker.ErrUnreachable], the task may have been sent. Send
//     has then tried four times under one task id, so that the task may run twice.
//   - A message is what Python would publish, in every field
//     (docs/celery.md#message-properties): a Python worker cannot tell the difference.
//   - Routes and declarations are those of package worker: [FromWorker] copies them.
//   - In a handler of package worker, Send with the handler's context makes the
//     running task the parent of the new one, and takes over its root.
//
// # Differences from Python
//
//   - Tasks are called by name, as by send_task: the client knows no options of their
//     registration.
//   - Arguments are encoded as JSON, when the signature is made.
//   - The client writes no chords: a group that another task follows is refused.
//   - [Result.Get] of a chain's last task also returns when an earlier task was
//     revoked or has expired, where Python waits for ever.
package client
