"""Retry a run, as POST /orchestrator/runs/{id}/retry does.

The rows of the steps to run again are reset in place and their attempt is
raised by one; the run goes back to pending and keeps its times; then a new
chain is published. Prints {"run_id", "task_ids": {step: id}} as JSON.
"""

import argparse

from sqlalchemy import text

import moonmind_api as api


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_id")
    parser.add_argument("--from-step", help="first step to run again; all by default")
    parser.add_argument("--reason")
    arguments = parser.parse_args()

    app = api.celery_app()
    with api.database().begin() as connection:
        status, steps = connection.execute(
            text(
                "SELECT r.status::text, p.steps FROM orchestrator_runs r"
                " JOIN orchestrator_action_plans p ON p.id = r.action_plan_id WHERE r.id = CAST(:run AS uuid)"
            ),
            {"run": arguments.run_id},
        ).one()
        if status in ("running", "awaiting_approval"):
            raise SystemExit(f"retry_not_allowed: the run is {status}")
        names = [step["name"] for step in steps]
        if arguments.from_step:
            names = names[names.index(arguments.from_step) :]
        for name in names:
            connection.execute(
                text(
                    "UPDATE spec_workflow_task_states SET attempt = attempt + 1, plan_step_status = 'pending',"
                    " celery_state = 'PENDING', message = :reason, started_at = NULL, finished_at = NULL"
                    " WHERE orchestrator_run_id = CAST(:run AS uuid) AND plan_step = CAST(:name AS orchestratorplanstep)"
                ),
                {"run": arguments.run_id, "name": name, "reason": arguments.reason},
            )
        connection.execute(
            text("UPDATE orchestrator_runs SET status = 'pending', updated_at = now() WHERE id = CAST(:run AS uuid)"),
            {"run": arguments.run_id},
        )
    api.answer({"run_id": arguments.run_id, "task_ids": api.publish(app, arguments.run_id, names)})


if __name__ == "__main__":
    main()
