"""Publishes what follows a task in a Celery worker: one JSON array of questions in, one of answers out.

A question has the headers and the body of a task's message, and whether the task fails; see
canvas_celery_test.go. Delays are given as the seconds that are left, rounded."""
import json
import sys
from datetime import datetime, timezone

from celery import Celery
from celery.app.trace import build_tracer

app = Celery("shop", broker="memory://", backend="cache+memory://")


@app.task(name="shop.add")
def add(*args, **kwargs):
    return "value"


@app.task(name="shop.fail")
def fail(*args, **kwargs):
    raise ValueError("broken")


# Groups keep their members in the backend.
app.backend.client.set = lambda *args, **kwargs: None


def seconds_left(text):
    return text and round((datetime.fromisoformat(text) - datetime.now(timezone.utc)).total_seconds() / 100) * 100


def follow(question):
    args, kwargs, embed = question["body"]
    task = app.tasks[question["headers"]["task"]]
    request = dict(question["headers"], args=args, kwargs=kwargs, **embed)
    request.update(reply_to="client", correlation_id=request["id"], delivery_info={"exchange": "", "routing_key": "orders", "priority": 3}, hostname="w1@shop", is_eager=False)
    sent = []
    app.amqp.send_task_message = lambda producer, name, message, **options: sent.append((message, options))
    build_tracer(task.name, task, app=app)(request["id"], args, kwargs, request)
    answers = []
    for message, options in sent:
        headers = dict(message.headers, **(options.get("headers") or {}))
        headers["eta"], headers["expires"] = seconds_left(headers["eta"]), seconds_left(headers["expires"])
        queue = options.get("queue")
        answers.append({
            "headers": headers, "body": message.body, "queue": getattr(queue, "name", queue) or "",
            "routing_key": options.get("routing_key") or "", "priority": options.get("priority") or 0,
        })
    return answers


json.dump([follow(question) for question in json.load(sys.stdin)], sys.stdout, default=str)
