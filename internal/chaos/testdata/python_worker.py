"""A stand-in for MoonMind's Python worker, for trials beside workers under test.

It is a real Celery worker, configured as MoonMind configures its own. Its task
writes what MoonMind's does, in the same order, and, like it, holds one
transaction open for the whole of a step: the state row and the run stay locked,
and nobody sees any of it before the commit.

    CELERY_BROKER_URL=amqp://… CELERY_RESULT_BACKEND=db+postgresql+psycopg2://… \
        python python_worker.py NODE_NAME
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from datetime import datetime, timezone

from celery import Celery
from kombu import Exchange, Queue
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

TASK = "moonmind.workflows.orchestrator.tasks.execute_plan_step"
QUEUE = "orchestrator.run"

TYPES = {"verify": "verify_log", "rollback": "rollback_log"}

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
    broker_connection_retry_on_startup=True,
)


class StepFailed(RuntimeError):
    """A command or the health check of a step has failed."""


def now() -> datetime:
    return datetime.now(timezone.utc)


UPSERT = text(
    "INSERT INTO spec_workflow_task_states"
    " (id, orchestrator_run_id, plan_step, attempt, task_name, status, plan_step_status, celery_state, celery_task_id,"
    "  message, artifact_refs, started_at, finished_at)"
    " VALUES (:id, CAST(:run AS uuid), CAST(:step AS orchestratorplanstep), 1, CAST(:step AS varchar),"
    "  CAST(:status AS specworkflowtaskstatus), CAST(:plan_status AS orchestratorplanstepstatus),"
    "  CAST(:state AS orchestratortaskstate), :task, :message, CAST(:refs AS jsonb), :started, :finished)"
    " ON CONFLICT (orchestrator_run_id, plan_step, attempt) DO UPDATE"
    " SET status = EXCLUDED.status, plan_step_status = EXCLUDED.plan_step_status, celery_state = EXCLUDED.celery_state,"
    "  celery_task_id = COALESCE(EXCLUDED.celery_task_id, spec_workflow_task_states.celery_task_id),"
    "  message = COALESCE(EXCLUDED.message, spec_workflow_task_states.message),"
    "  artifact_refs = COALESCE(EXCLUDED.artifact_refs, spec_workflow_task_states.artifact_refs),"
    "  started_at = COALESCE(EXCLUDED.started_at, spec_workflow_task_states.started_at),"
    "  finished_at = COALESCE(EXCLUDED.finished_at, spec_workflow_task_states.finished_at)"
)


class Step:
    """One step of a run within its transaction."""

    def __init__(self, connection, run_id: str, name: str, task_id: str) -> None:
        self.connection, self.run_id, self.name, self.task_id = connection, run_id, name, task_id
        self.status, self.root, plan = connection.execute(
            text(
                "SELECT r.status::text, r.artifact_root, p.steps FROM orchestrator_runs AS r"
                " JOIN orchestrator_action_plans AS p ON p.id = r.action_plan_id WHERE r.id = CAST(:run AS uuid)"
            ),
            {"run": run_id},
        ).one()
        self.plan = {entry["name"]: entry.get("parameters") or {} for entry in plan}
        self.lines: list[str] = []

    def state(self, name: str, status: str, plan_status: str, celery: str, **values) -> None:
        row = {"task": None, "message": None, "refs": None, "started": None, "finished": None}
        row.update(values, id=str(uuid.uuid4()), run=self.run_id, step=name, status=status, plan_status=plan_status, state=celery)
        self.connection.execute(UPSERT, row)

    def run_status(self, status: str, **times: datetime) -> None:
        columns = "".join(f", {name} = :{name}" for name in times)
        self.connection.execute(
            text(
                f"UPDATE orchestrator_runs SET status = CAST(:status AS orchestratorrunstatus), updated_at = now(){columns}"
                " WHERE id = CAST(:run AS uuid)"
            ),
            {"status": status, "run": self.run_id, **times},
        )

    def begin(self) -> None:
        began = now()
        self.state(self.name, "running", "in_progress", "STARTED", task=self.task_id, started=began)
        if self.status == "pending":
            self.run_status("running", started_at=began)
        os.makedirs(self.root, exist_ok=True)
        self.connection.execute(
            text("UPDATE orchestrator_runs SET artifact_root = :root WHERE id = CAST(:run AS uuid)"),
            {"root": self.root, "run": self.run_id},
        )

    def command(self, argv: list[str]) -> None:
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        self.lines += ["$ " + " ".join(argv), done.stdout, done.stderr]
        if done.returncode != 0:
            raise StepFailed(f"Command failed with exit code {done.returncode}: {' '.join(argv)}")

    def health(self, check: dict) -> None:
        deadline = time.monotonic() + float(check["timeoutSeconds"])
        while True:
            try:
                with urllib.request.urlopen(check["url"], timeout=5) as answer:
                    status = answer.status
            except urllib.error.HTTPError as error:
                status = error.code
            self.lines.append(f"{check['url']} answered {status}")
            if status == check["expectedStatus"]:
                return
            if time.monotonic() > deadline:
                raise StepFailed(f"Health check timed out for {check['url']}")
            time.sleep(float(check["intervalSeconds"]))

    def work(self) -> None:
        parameters = self.plan[self.name]
        commands = list(parameters.get("commands", []))
        if "command" in parameters:
            commands.append(parameters["command"])
        for strategy in parameters.get("strategies", []):
            commands += strategy["commands"]
        for argv in commands:
            self.command(argv)
        if "healthcheck" in parameters:
            self.health(parameters["healthcheck"])

    def artifact(self) -> str:
        """Write the step's log, register it, and return the list of ids as the state row has it."""
        path = self.name + ".log"
        content = "\n".join(self.lines).encode() + b"\n"
        with open(os.path.join(self.root, path), "wb") as file:
            file.write(content)
        artifact = str(uuid.uuid4())
        self.connection.execute(
            text(
                "INSERT INTO orchestrator_run_artifacts (id, run_id, artifact_type, path, checksum, size_bytes)"
                " VALUES (:id, CAST(:run AS uuid), CAST(:type AS orchestratorrunartifacttype), :path, :checksum, :size)"
            ),
            {
                "id": artifact,
                "run": self.run_id,
                "type": TYPES.get(self.name, "build_log"),
                "path": path,
                "checksum": hashlib.sha256(content).hexdigest(),
                "size": len(content),
            },
        )
        return json.dumps([artifact])

    def succeed(self) -> dict:
        refs, finished = self.artifact(), now()
        message = f"{self.name} completed"
        self.state(self.name, "succeeded", "succeeded", "SUCCESS", task=self.task_id, message=message, refs=refs, finished=finished)
        if self.name == "verify":
            self.run_status("succeeded", completed_at=finished)
            if "rollback" in self.plan:
                self.state("rollback", "skipped", "skipped", "SUCCESS", message="Rollback not required", finished=finished)
        elif self.name == "rollback":
            self.run_status("rolled_back", completed_at=finished)
        return {"message": message, "artifacts": [self.name + ".log"], "metadata": {}}

    def fail(self, error: StepFailed) -> None:
        refs, finished = self.artifact(), now()
        self.state(self.name, "failed", "failed", "FAILURE", task=self.task_id, message=str(error), refs=refs, finished=finished)
        if self.name == "rollback" or "rollback" not in self.plan:
            self.run_status("failed", completed_at=finished)
        else:
            self.run_status("failed")


@app.task(name=TASK, bind=True)
def execute_plan_step(self, run_id: str, step_name: str) -> dict:
    engine = create_engine(os.environ["CELERY_RESULT_BACKEND"].removeprefix("db+"), poolclass=NullPool)
    connection = engine.connect()
    try:
        step = Step(connection, run_id, step_name, self.request.id)
        step.begin()
        try:
            step.work()
        except StepFailed as error:
            step.fail(error)
            connection.commit()
            raise
        outcome = step.succeed()
        connection.commit()
        return outcome
    finally:
        connection.close()
        engine.dispose()


if __name__ == "__main__":
    app.worker_main(
        ["worker", "--pool=prefork", "--concurrency=1", "--loglevel=INFO", "--without-gossip", "--without-mingle", "-n", sys.argv[1]]
    )
