"""A Celery worker without code of this project, for what package client sends.

    python shop.py BROKER BACKEND
"""
import sys

from celery import Celery
from kombu import Exchange, Queue

app = Celery("shop", broker=sys.argv[1], backend=sys.argv[2])
app.conf.update(
    task_default_queue="orders",
    task_queues=[Queue("orders", Exchange("orders"), routing_key="orders"), Queue("mail", Exchange("shop"), routing_key="mail.send")],
    result_extended=True, task_acks_late=True, worker_prefetch_multiplier=1, result_serializer="json", accept_content=["json"],
)


class OutOfStock(Exception):
    pass


@app.task(name="shop.add")
def add(x, y):
    return x + y


@app.task(name="shop.join")
def join(*args, **kwargs):
    return [list(args), kwargs]


@app.task(name="shop.types")
def types(*args):
    return [type(arg).__name__ for arg in args]


@app.task(name="shop.fail")
def fail(sku):
    raise OutOfStock(sku, 7)


@app.task(name="shop.note")
def note(*args):
    return list(args)


@app.task(name="shop.told")
def told(failed_id):
    return failed_id


@app.task(name="shop.request", bind=True)
def request(self):
    r = self.request
    stamps = {name: (r.stamps or {}).get(name) for name in (r.stamped_headers or [])}
    return {"root": r.root_id, "parent": r.parent_id, "group": r.group, "shadow": r.shadow, "headers": r.headers,
            "priority": r.delivery_info.get("priority"), "queue": r.delivery_info.get("routing_key"), "stamps": stamps,
            "timelimit": list(r.timelimit or [])}


if __name__ == "__main__":
    app.worker_main(["worker", "--pool=solo", "--loglevel=WARNING", "-Q", "orders,mail", "--without-gossip", "--without-mingle", "-n", "python@test"])
