package contender

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"os"
	"os/signal"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	amqp "github.com/rabbitmq/amqp091-go"
)

// HeaderLeft is a header that only the floor reads: how many tasks of a chain
// follow. HeaderCut is by how many bytes the body of the next message is shorter.
const (
	HeaderLeft = "x-left"
	HeaderCut  = "x-cut"
)

// insertResult is the smallest statement that stores a result where AsyncResult
// reads it. It keeps no stored SUCCESS, which a real worker has to.
const insertResult = `
	INSERT INTO celery_taskmeta (id, task_id, status, result, date_done, children)
	VALUES (nextval('task_id_sequence'), $1, 'SUCCESS', $2, $3, $4)
	ON CONFLICT (task_id) DO UPDATE
	SET status = EXCLUDED.status, result = EXCLUDED.result, date_done = EXCLUDED.date_done, children = EXCLUDED.children`

// pickledValue is a small number and pickledChildren the empty list, as Python's
// pickle writes them.
var (
	pickledValue    = []byte("\x80\x04K\x03.")
	pickledChildren = []byte("\x80\x04].")
)

// Floor runs the floor until SIGTERM.
func Floor(s Spec) error {
	p, err := s.open()
	if err != nil {
		return err
	}
	go endWithParent()
	conn, err := amqp.Dial(s.Broker)
	if err != nil {
		return err
	}
	defer conn.Close()
	channel, err := conn.Channel()
	if err != nil {
		return err
	}
	if err := channel.Qos(s.Prefetch, 0, false); err != nil {
		return err
	}
	deliveries, err := channel.Consume(s.Queue, "floor", false, false, false, false, nil)
	if err != nil {
		return err
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	go func() {
		<-stop
		_ = channel.Cancel("floor", false)
	}()
	failures := make(chan error, s.Slots)
	var slots sync.WaitGroup
	for range s.Slots {
		slots.Go(func() {
			if err := slot(s, conn, deliveries, p); err != nil {
				failures <- err
				_ = channel.Cancel("floor", true)
			}
		})
	}
	slots.Wait()
	select {
	case err := <-failures:
		return err
	default:
		return nil
	}
}

func slot(s Spec, conn *amqp.Connection, deliveries <-chan amqp.Delivery, p pipe) error {
	ctx := context.Background()
	publishing, err := conn.Channel()
	if err != nil {
		return err
	}
	if err := publishing.Confirm(false); err != nil {
		return err
	}
	var database *pgx.Conn
	if s.Results {
		if database, err = pgx.Connect(ctx, s.Database); err != nil {
			return err
		}
		defer database.Close(ctx)
		statements := map[string]string{"store": insertResult}
		if s.Folder != "" {
			maps.Copy(statements, stepStatements)
		}
		for name, statement := range statements {
			if _, err := database.Prepare(ctx, name, statement); err != nil {
				return err
			}
		}
	}
	for d := range deliveries {
		left, _ := d.Headers[HeaderLeft].(int32)
		switch task := d.Headers["task"]; {
		case task == Timed:
			err = p.age(sentAt(d.Body))
		case task == Mark:
			err = p.mark()
		case task == Step:
			err = step(ctx, database, s, d, left)
		}
		if err == nil && left > 0 {
			err = next(ctx, publishing, s.Queue, d, left)
		}
		if err == nil && s.Results {
			_, err = database.Exec(ctx, "store", d.CorrelationId, pickledValue, time.Now().UTC(), pickledChildren)
		}
		if err == nil {
			err = d.Ack(false)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// sentAt reads the argument of bench.timed: the body begins with "[[1700…".
func sentAt(body []byte) int64 {
	end := bytes.IndexByte(body, ']')
	if end < 2 {
		return 0
	}
	sent, _ := strconv.ParseInt(string(body[2:end]), 10, 64)
	return sent
}

// next publishes the next message of a chain and waits until the broker has
// confirmed it. The body gets shorter by one task, as a real one does; what it
// contains does not matter.
func next(ctx context.Context, channel *amqp.Channel, queue string, d amqp.Delivery, left int32) error {
	cut, _ := d.Headers[HeaderCut].(int32)
	headers := amqp.Table{}
	for name, value := range d.Headers {
		headers[name] = value
	}
	headers[HeaderLeft] = left - 1
	if headers["task"] != Step {
		headers["task"] = Noop
	}
	if left == 1 {
		headers["task"] = Mark
	}
	confirmation, err := channel.PublishWithDeferredConfirmWithContext(ctx, "", queue, true, false, amqp.Publishing{
		Headers: headers, ContentType: d.ContentType, ContentEncoding: d.ContentEncoding, DeliveryMode: amqp.Persistent,
		CorrelationId: d.CorrelationId[:len(d.CorrelationId)-4] + fmt.Sprintf("%04x", left), ReplyTo: d.ReplyTo,
		Body: d.Body[:len(d.Body)-int(cut)],
	})
	if err != nil {
		return err
	}
	if confirmed, err := confirmation.WaitContext(ctx); err != nil || !confirmed {
		return fmt.Errorf("the broker did not confirm a message: %v", err)
	}
	return nil
}
