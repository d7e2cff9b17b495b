"""Retry a Spec workflow run, as POST /api/workflows/speckit/runs/{id}/retry does.

The chain begins at the first task whose newest attempt has not succeeded, with all that the
rows have as its argument; with --mode restart_from_discovery at discovery. Prints the same
as submit_spec_run.py, and the context that was sent.
"""

import argparse
import hashlib
import json
import os
import uuid

import celery
from sqlalchemy import text

import moonmind_api as api
import spec_api

PHASES = {"discover_next_phase": "discover", "submit_codex_job": "submit", "apply_and_publish": "apply"}


def newest_states(connection, run_id: str) -> dict:
    rows = connection.execute(
        text(
            "SELECT DISTINCT ON (task_name) task_name, status::text, attempt, payload"
            " FROM spec_workflow_task_states WHERE workflow_run_id = :run ORDER BY task_name, attempt DESC"
        ),
        {"run": run_id},
    )
    return {row.task_name: row for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_id")
    parser.add_argument("--mode", default="resume_failed_task", choices=("resume_failed_task", "restart_from_discovery"))
    parser.add_argument("--notes")
    parser.add_argument("--root", required=True, help="directory from which relative paths start")
    parser.add_argument("--timeout", type=float, default=60)
    arguments = parser.parse_args()

    app = spec_api.application()
    with api.database().begin() as connection:
        run = connection.execute(
            text("SELECT *, status::text AS status_text FROM spec_workflow_runs WHERE id = :run"), {"run": arguments.run_id}
        ).one()
        if run.status_text != "failed":
            raise SystemExit(f"retry_not_allowed: the run is {run.status_text}")
        states = newest_states(connection, arguments.run_id)
        first = 0
        if arguments.mode != "restart_from_discovery":
            first = next(i for i, name in enumerate(spec_api.TASKS) if name not in states or states[name].status != "succeeded")
        start = spec_api.TASKS[first]
        attempt = states[start].attempt + 1 if start in states else 1
        token = {
            "runId": arguments.run_id,
            "mode": arguments.mode,
            "resumeFrom": start,
            "attempt": attempt,
            "notes": arguments.notes,
            "codexTaskId": run.codex_task_id,
            "codexLogsPath": run.codex_logs_path,
            "codexPatchPath": run.codex_patch_path,
            "branchName": run.branch_name,
            "prUrl": run.pr_url,
        }
        for name in spec_api.TASKS[first:]:
            connection.execute(
                text(
                    "INSERT INTO spec_workflow_task_states (id, workflow_run_id, task_name, status, attempt, payload)"
                    " VALUES (:id, :run, :name, 'queued', :attempt, '{}')"
                    " ON CONFLICT (workflow_run_id, task_name, attempt) DO NOTHING"
                ),
                {"id": str(uuid.uuid4()), "run": arguments.run_id, "name": name, "attempt": attempt},
            )
        connection.execute(
            text(
                "UPDATE spec_workflow_runs SET status = 'running', finished_at = NULL,"
                " phase = CAST(:phase AS specworkflowrunphase) WHERE id = :run"
            ),
            {"phase": PHASES[start], "run": arguments.run_id},
        )
        folder = os.path.join(arguments.root, run.artifacts_path)
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, f"retry_context_attempt_{attempt}.json")
        content = json.dumps(token, indent=2).encode()
        with open(path, "wb") as file:
            file.write(content)
        connection.execute(
            text(
                "INSERT INTO workflow_artifacts (id, workflow_run_id, artifact_type, path, size_bytes, digest)"
                " VALUES (:id, :run, 'retry_context', :path, :size, :digest)"
                " ON CONFLICT (workflow_run_id, artifact_type, path)"
                " DO UPDATE SET size_bytes = EXCLUDED.size_bytes, digest = EXCLUDED.digest"
            ),
            {
                "id": str(uuid.uuid4()),
                "run": arguments.run_id,
                "path": path,
                "size": len(content),
                "digest": "sha256:" + hashlib.sha256(content).hexdigest(),
            },
        )

    context = {
        "run_id": arguments.run_id,
        "feature_key": run.feature_key,
        "artifacts_path": run.artifacts_path,
        "repository": run.repository,
        "attempt": attempt,
        "retry": attempt > 1,
    }
    if arguments.notes:
        context["retry_notes"] = arguments.notes
    if first == 0:
        arguments_of_first, keywords = (arguments.run_id,), {"feature_key": run.feature_key, "force_phase": None, "attempt": attempt}
        if arguments.notes:
            keywords["retry_notes"] = arguments.notes
    else:
        found = states["discover_next_phase"].payload
        context["task"] = {key: found.get(key) for key in ("taskId", "title", "phase", "lineNumber")}
        for key in ("codex_task_id", "codex_logs_path", "codex_patch_path", "branch_name"):
            if getattr(run, key):
                context[key] = getattr(run, key)
        context["resume_token"], context["resume_artifact_path"] = token, path
        arguments_of_first, keywords = (context,), {}
    result, task_ids = spec_api.publish(app, first, *arguments_of_first, **keywords)
    with api.database().begin() as connection:
        connection.execute(
            text("UPDATE spec_workflow_runs SET celery_chain_id = :chain WHERE id = :run"),
            {"chain": result.id, "run": arguments.run_id},
        )
    api.answer(
        {
            "run_id": arguments.run_id,
            "chain_id": result.id,
            "task_ids": task_ids,
            "context": context,
            "results": spec_api.read(result, arguments.timeout),
            "celery": celery.__version__,
        }
    )


if __name__ == "__main__":
    main()
