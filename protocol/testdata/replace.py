"""Publishes what Celery's Task.replace publishes: one JSON array of questions in, one of answers out.

A question has the headers, the properties and the body of a task's message, and the signature that
replaces the task; see replace_test.go."""
import json
import sys

from celery import Celery, signature
from celery._state import _task_stack
from celery.app.task import Context

app = Celery("shop", broker="memory://", backend="cache+memory://")


@app.task(name="shop.add", bind=True)
def add(self, *args, **kwargs):
    pass


def replace(question):
    """Takes the task for running, as celery.app.trace does."""
    args, kwargs, embed = question["body"]
    request = dict(question["headers"], args=args, kwargs=kwargs, **embed)
    request.update(reply_to=question["reply_to"], correlation_id=request["id"], delivery_info={"exchange": "", "routing_key": "orders"}, hostname="w1@shop")
    sent = []
    app.amqp.send_task_message = lambda producer, name, message, **options: sent.append((message, options))
    replacement = signature(question["signature"], app=app)
    replacement.args = tuple(replacement.args)
    add.request_stack.push(Context(request, called_directly=False))
    _task_stack.push(add)
    try:
        add.replace(replacement)
    except Exception as error:
        if type(error).__name__ != "Ignore":
            return {"error": type(error).__name__}
    finally:
        _task_stack.pop()
        add.request_stack.pop()
    (message, options), = sent
    # send_task_message merges the option headers.
    return {"headers": dict(message.headers, **(options.get("headers") or {})), "properties": message.properties, "body": message.body}


json.dump([replace(question) for question in json.load(sys.stdin)], sys.stdout, default=str)
