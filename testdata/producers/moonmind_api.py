"""What MoonMind's API does with a run, in one file and with nothing of the worker under test.

It stands for MoonMind's API: a Celery application configured as
MoonMind configures its own, the rows that the API inserts before it publishes,
and the chain that it publishes. The scripts beside it are its commands.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import uuid
from datetime import datetime, timezone

from celery import Celery, chain
from kombu import Exchange, Queue
from sqlalchemy import create_engine, text

TASK = "moonmind.workflows.orchestrator.tasks.execute_plan_step"
QUEUE = "orchestrator.run"

# Compose service, allow-list and health check of each service that MoonMind manages.
PROFILES = {
    "api": {
        "allowlist": [
            "api_service/Dockerfile",
            "api_service/Dockerfile.*",
            "api_service/pyproject.toml",
            "api_service/poetry.lock",
            "api_service/requirements*.txt",
            "pyproject.toml",
            "poetry.lock",
        ],
        "healthcheck": {
            "url": "http://api:5000/health",
            "method": "GET",
            "timeoutSeconds": 120,
            "intervalSeconds": 5.0,
            "expectedStatus": 200,
        },
    },
    "celery-worker": {
        "allowlist": [
            "celery_worker/Dockerfile",
            "celery_worker/Dockerfile.*",
            "celery_worker/requirements*.txt",
            "celery_worker/pyproject.toml",
            "celery_worker/poetry.lock",
        ],
        "healthcheck": None,
    },
    "orchestrator": {
        "allowlist": [
            "services/orchestrator/**",
            "moonmind/workflows/orchestrator/**",
            "docker-compose*.y*ml",
            "pyproject.toml",
            "poetry.lock",
        ],
        "healthcheck": None,
    },
}


def celery_app() -> Celery:
    """The application that a MoonMind process publishes and reads results with."""
    app = Celery(
        "moonmind.workflows.orchestrator",
        broker=os.environ["CELERY_BROKER_URL"],
        backend=os.environ["CELERY_RESULT_BACKEND"],
    )
    exchange = Exchange("moonmind.jobs", type="direct", durable=True)
    app.conf.update(
        task_default_queue=QUEUE,
        task_default_exchange="moonmind.jobs",
        task_default_exchange_type="direct",
        task_default_routing_key=QUEUE,
        task_queues=[Queue(QUEUE, exchange, routing_key=QUEUE, durable=True)],
        task_serializer="json",
        result_serializer="json",
        accept_content=["json"],
        result_extended=True,
        result_expires=604800,
        task_acks_late=True,
        task_acks_on_failure_or_timeout=True,
        task_reject_on_worker_lost=True,
        worker_prefetch_multiplier=1,
        # MoonMind's API lives on after it has published; a script that ends at once
        # may lose the message on RabbitMQ 4.3 without this.
        broker_transport_options={"confirm_publish": True},
    )

    @app.task(name=TASK)
    def execute_plan_step(run_id: str, step_name: str) -> dict:
        raise RuntimeError("a producer runs no tasks")

    return app


def database():
    """The database that the API shares with the worker."""
    url = os.environ["CELERY_RESULT_BACKEND"].removeprefix("db+")
    return create_engine(url)


def action_plan(service: str, instruction: str, project: str = "moonmind") -> list[dict]:
    """The plan that MoonMind's API generates for a service (its parameters are constants)."""
    profile = PROFILES[service]
    build = ["docker", "compose", "--project-name", project, "build", service]
    up = ["docker", "compose", "--project-name", project, "up", "-d", "--no-deps", service]
    verify = {"service": service, "logArtifact": "verify.log"}
    if profile["healthcheck"]:
        verify["healthcheck"] = dict(profile["healthcheck"])
    parameters = {
        "analyze": {
            "instruction": instruction.strip(),
            "service": service,
            "workspace": ".",
            "notes": "Review recent logs and dependency manifests for the service.",
            "logArtifact": "analyze.log",
        },
        "patch": {
            "service": service,
            "workspace": ".",
            "allowlist": profile["allowlist"],
            "diffArtifact": "patch.diff",
            "commands": [["git", "status", "--short"]],
        },
        "build": {
            "service": service,
            "composeProject": project,
            "logArtifact": "build.log",
            "command": build,
        },
        "restart": {
            "service": service,
            "composeProject": project,
            "logArtifact": "restart.log",
            "command": up,
            "restartTimeoutSeconds": 60,
        },
        "verify": verify,
        "rollback": {
            "service": service,
            "logArtifact": "rollback.log",
            "strategies": [
                {"type": "git-revert", "commands": [["git", "reset", "--hard", "HEAD"]]},
                {"type": "rebuild", "commands": [build, up]},
            ],
        },
    }
    return [{"name": name, "parameters": values} for name, values in parameters.items()]


def service_context(service: str, project: str) -> dict:
    profile = PROFILES[service]
    return {
        "service": service,
        "composeProject": project,
        "workspace": ".",
        "allowlist": profile["allowlist"],
        "healthcheck": profile["healthcheck"],
        "restartTimeoutSeconds": 60,
    }


def create_run(
    engine, *, service: str, instruction: str, priority: str, steps: list[dict], context: dict, artifacts: str
) -> str:
    """Insert plan, run and one seeded state per step in one transaction, and make the run directory."""
    run_id, plan_id = str(uuid.uuid4()), str(uuid.uuid4())
    root = os.path.join(artifacts, run_id)
    os.makedirs(root, exist_ok=True)
    snapshot = {
        "approval": {
            "required": False,
            "requirement": "none",
            "status": "awaiting",
            "grantedAt": datetime.now(timezone.utc).isoformat(),
        }
    }
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO orchestrator_action_plans (id, steps, service_context, generated_by)"
                " VALUES (:id, CAST(:steps AS jsonb), CAST(:context AS jsonb), 'system')"
            ),
            {"id": plan_id, "steps": json.dumps(steps), "context": json.dumps(context)},
        )
        connection.execute(
            text(
                "INSERT INTO orchestrator_runs"
                " (id, instruction, target_service, priority, status, metrics_snapshot, artifact_root, action_plan_id)"
                " VALUES (:id, :instruction, :service, CAST(:priority AS orchestratorrunpriority), 'pending',"
                " CAST(:snapshot AS jsonb), :root, :plan)"
            ),
            {
                "id": run_id,
                "instruction": instruction,
                "service": service,
                "priority": priority,
                "snapshot": json.dumps(snapshot),
                "root": root,
                "plan": plan_id,
            },
        )
        for step in steps:
            connection.execute(
                text(
                    "INSERT INTO spec_workflow_task_states"
                    " (id, orchestrator_run_id, task_name, status, attempt, plan_step, plan_step_status, artifact_refs)"
                    " VALUES (:id, :run, CAST(:name AS varchar), 'queued', 1, CAST(:name AS orchestratorplanstep),"
                    " 'pending', '[]'::jsonb)"
                ),
                {"id": str(uuid.uuid4()), "run": run_id, "name": step["name"]},
            )
    return run_id


def publish(app: Celery, run_id: str, names: list[str]) -> dict[str, str]:
    """Publish the chain of a run and return the task id of each link.

    Every link is immutable and carries the rollback as its error callback,
    when the plan has one. Only the first message is given the queue; the
    worker sends the others to its default queue.
    """
    task = app.tasks[TASK]
    links = [task.si(run_id, name) for name in names if name != "rollback"]
    if not links:
        raise SystemExit("Action plan does not contain executable steps")
    if "rollback" in names:
        for link in links:
            link.link_error(task.si(run_id, "rollback").set(queue=QUEUE))
    result = chain(*links).apply_async(queue=QUEUE)
    ids = []
    while result is not None:
        ids.append(result.id)
        result = result.parent
    return dict(zip((name for name in names if name != "rollback"), reversed(ids)))


def override(steps: list[dict], assignment: str) -> None:
    """Apply "step.parameter[.key]=JSON" to a plan; JSON null removes the parameter."""
    path, separator, value = assignment.partition("=")
    step, *keys = path.split(".")
    if not separator or not keys:
        raise argparse.ArgumentTypeError(f"{assignment!r} is not step.parameter=JSON")
    target = next(entry for entry in steps if entry["name"] == step)["parameters"]
    for key in keys[:-1]:
        target = target[key]
    decoded = json.loads(value)
    if decoded is None:
        target.pop(keys[-1], None)
    else:
        target[keys[-1]] = decoded


def answer(document: dict) -> None:
    """Print one JSON document, the scripts' only output."""
    json.dump(document, sys.stdout)
    sys.stdout.write("\n")
