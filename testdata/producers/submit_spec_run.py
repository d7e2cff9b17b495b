"""Create a Spec workflow run and publish its chain, as POST /api/workflows/speckit/runs does.

    CELERY_BROKER_URL=amqp://… CELERY_RESULT_BACKEND=db+postgresql+psycopg2://… \
        python submit_spec_run.py --feature 014-refresh-docs

Prints {"run_id", "chain_id", "results", "celery"} as JSON; results are those of the
three tasks, as AsyncResult reads them.
"""

import argparse
import os
import uuid

import celery
from celery import Celery, chain
from kombu import Exchange, Queue
from sqlalchemy import text

import moonmind_api as api

NAMES = ("discover_next_phase", "submit_codex_job", "apply_and_publish")


def application() -> Celery:
    """The application that MoonMind publishes Spec workflow chains with."""
    app = Celery(
        "moonmind.workflows.speckit_celery",
        broker=os.environ["CELERY_BROKER_URL"],
        backend=os.environ["CELERY_RESULT_BACKEND"],
    )
    exchange = Exchange("speckit", type="direct", durable=True)
    app.conf.update(
        task_default_queue="speckit",
        task_default_exchange="speckit",
        task_default_routing_key="speckit",
        task_queues=[Queue("speckit", exchange, routing_key="speckit", durable=True)],
        task_serializer="json",
        result_serializer="json",
        accept_content=["json"],
        result_extended=True,
        broker_transport_options={"confirm_publish": True},
    )
    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--feature", required=True)
    parser.add_argument("--repository")
    parser.add_argument("--artifacts", default="var/artifacts/spec_workflows")
    parser.add_argument("--timeout", type=float, default=60)
    arguments = parser.parse_args()

    app = application()
    run_id = str(uuid.uuid4())
    with api.database().begin() as connection:
        connection.execute(
            text(
                "INSERT INTO spec_workflow_runs (id, feature_key, repository, artifacts_path, status, phase)"
                " VALUES (:id, :feature, :repository, :artifacts, 'pending', 'discover')"
            ),
            {
                "id": run_id,
                "feature": arguments.feature,
                "repository": arguments.repository,
                "artifacts": f"{arguments.artifacts}/{run_id}",
            },
        )
    discover, submit, publish = (app.signature(f"spec_workflow_runs.{name}") for name in NAMES)
    discover = discover.clone(
        args=(run_id,), kwargs={"feature_key": arguments.feature, "force_phase": None, "attempt": 1}
    )
    result = chain(discover, submit, publish).apply_async()
    with api.database().begin() as connection:
        connection.execute(
            text("UPDATE spec_workflow_runs SET celery_chain_id = :chain WHERE id = :id"),
            {"chain": result.id, "id": run_id},
        )
    results = []
    link = result
    result.get(timeout=arguments.timeout, propagate=False)
    while link is not None:
        results.insert(0, {"id": link.id, "state": link.state, "result": link.result if link.successful() else str(link.result)})
        link = link.parent
    api.answer({"run_id": run_id, "chain_id": result.id, "results": results, "celery": celery.__version__})


if __name__ == "__main__":
    main()
