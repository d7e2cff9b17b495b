"""What MoonMind's API does with a run of the Spec workflow, with nothing of the worker under test.

The Celery application, the tasks' names, the router that chooses queues and adds headers,
and the rows of the API. The scripts submit_spec_run.py and retry_spec_run.py are its commands.
"""

from __future__ import annotations

import hashlib
import os

from celery import Celery, chain
from kombu import Exchange, Queue

TASKS = ("discover_next_phase", "submit_codex_job", "apply_and_publish")
CODEX_TASKS = {f"spec_workflow_runs.{name}" for name in TASKS[1:]}
SHARDS = int(os.environ.get("CODEX_SHARDS", "3"))


def shard(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % SHARDS


def affinity(context: dict) -> str:
    if context.get("codex_affinity_key"):
        return context["codex_affinity_key"]
    task = context.get("task") or {}
    repository = context.get("repository") or os.environ.get("GITHUB_REPOSITORY")
    parts = (repository, context.get("feature_key"), task.get("taskId"))
    return "|".join(part.strip() for part in parts if part) or context["run_id"]


def route(name, args, kwargs, options, task=None, **_):
    """The router of MoonMind's Celery application: it also adds to the context and the headers."""
    if name not in CODEX_TASKS or not args or not isinstance(args[0], dict):
        return None
    context = args[0]
    key = affinity(context)
    context.setdefault("codex_affinity_key", key)
    index = shard(key)
    queue = context.setdefault("codex_queue", f"codex-{index}")
    context.setdefault("codex_shard_index", index)
    headers = dict(options.get("headers") or {})
    headers.setdefault("codex-affinity", key)
    headers.setdefault("codex-queue", queue)
    return {"queue": queue, "routing_key": queue, "headers": headers}


def application() -> Celery:
    """The application that MoonMind publishes Spec workflow chains with."""
    app = Celery(
        "moonmind.workflows.speckit_celery",
        broker=os.environ["CELERY_BROKER_URL"],
        backend=os.environ["CELERY_RESULT_BACKEND"],
    )
    exchange = Exchange("speckit", type="direct", durable=True)
    names = ["speckit", *(f"codex-{index}" for index in range(SHARDS))]
    app.conf.update(
        task_default_queue="speckit",
        task_default_exchange="speckit",
        task_default_exchange_type="direct",
        task_default_routing_key="speckit",
        task_queues=[Queue(name, exchange, routing_key=name, durable=True) for name in names],
        task_routes=(route,),
        task_serializer="json",
        result_serializer="json",
        accept_content=["json"],
        result_extended=True,
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        worker_prefetch_multiplier=1,
        # MoonMind's API lives on after it has published; a script that ends at once
        # may lose the message on RabbitMQ 4.3 without this.
        broker_transport_options={"confirm_publish": True},
    )
    for name in TASKS:
        app.task(nothing, name=f"spec_workflow_runs.{name}")
    return app


def nothing(*_args, **_kwargs):
    raise RuntimeError("a producer runs no tasks")


def publish(app: Celery, first: int, *args, **kwargs):
    """Publish the chain from a task on; the first one gets the arguments, the others the results."""
    links = [app.tasks[f"spec_workflow_runs.{name}"] for name in TASKS[first:]]
    result = chain(links[0].s(*args, **kwargs), *(link.s() for link in links[1:])).apply_async()
    ids = []
    link = result
    while link is not None:
        ids.insert(0, link.id)
        link = link.parent
    return result, dict(zip(TASKS[first:], ids))


def read(result, timeout: float) -> list[dict]:
    """The results of a chain, in its order, as AsyncResult reads them."""
    result.get(timeout=timeout, propagate=False)
    results = []
    while result is not None:
        value = result.result if result.successful() else str(result.result)
        results.insert(0, {"id": result.id, "name": result.name, "state": result.state, "result": value, "worker": result.worker})
        result = result.parent
    return results
