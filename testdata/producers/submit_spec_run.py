"""Create a Spec workflow run and publish its chain, as POST /api/workflows/speckit/runs does.

    CELERY_BROKER_URL=amqp://… CELERY_RESULT_BACKEND=db+postgresql+psycopg2://… \
        python submit_spec_run.py --feature 014-refresh-docs

Prints {"run_id", "chain_id", "task_ids", "results", "celery"} as JSON; results are those of
the three tasks, as AsyncResult reads them.
"""

import argparse
import uuid

import celery
from sqlalchemy import text

import moonmind_api as api
import spec_api


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--feature", required=True)
    parser.add_argument("--repository")
    parser.add_argument("--artifacts", default="var/artifacts/spec_workflows")
    parser.add_argument("--timeout", type=float, default=60)
    parser.add_argument("--no-wait", action="store_true", help="publish only; results are []")
    arguments = parser.parse_args()

    app = spec_api.application()
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
    result, task_ids = spec_api.publish(app, 0, run_id, feature_key=arguments.feature, force_phase=None, attempt=1)
    with api.database().begin() as connection:
        connection.execute(
            text("UPDATE spec_workflow_runs SET celery_chain_id = :chain WHERE id = :id"),
            {"chain": result.id, "id": run_id},
        )
    results = [] if arguments.no_wait else spec_api.read(result, arguments.timeout)
    api.answer(
        {"run_id": run_id, "chain_id": result.id, "task_ids": task_ids, "results": results, "celery": celery.__version__}
    )


if __name__ == "__main__":
    main()
