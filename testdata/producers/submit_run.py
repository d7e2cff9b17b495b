"""Create a run and publish its chain, as POST /orchestrator/runs does.

    CELERY_BROKER_URL=amqp://… CELERY_RESULT_BACKEND=db+postgresql+psycopg2://… \
        python submit_run.py --artifacts /srv/artifacts --instruction "Pin httpx"

Prints {"run_id", "task_ids": {step: id}, "celery"} as JSON.
"""

import argparse

import celery

import moonmind_api as api


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--service", choices=sorted(api.PROFILES), default="api")
    parser.add_argument("--instruction", default="Pin the base image so that the service builds again")
    parser.add_argument("--priority", choices=("normal", "high"), default="normal")
    parser.add_argument("--artifacts", required=True, help="folder in which the run's directory is made")
    parser.add_argument("--project", default="moonmind", help="compose project that the plan names")
    parser.add_argument("--health-url", help="short for --set 'verify.healthcheck.url=\"…\"'")
    parser.add_argument(
        "--set", action="append", default=[], metavar="STEP.PARAMETER=JSON", help="change a parameter of the plan"
    )
    parser.add_argument("--without", action="append", default=[], metavar="STEP", help="leave a step out of the plan")
    arguments = parser.parse_args()

    steps = api.action_plan(arguments.service, arguments.instruction, arguments.project)
    steps = [step for step in steps if step["name"] not in arguments.without]
    if arguments.health_url:
        next(s for s in steps if s["name"] == "verify")["parameters"]["healthcheck"]["url"] = arguments.health_url
    for assignment in arguments.set:
        api.override(steps, assignment)

    app = api.celery_app()
    engine = api.database()
    run_id = api.create_run(
        engine,
        service=arguments.service,
        instruction=arguments.instruction,
        priority=arguments.priority,
        steps=steps,
        context=api.service_context(arguments.service, arguments.project),
        artifacts=arguments.artifacts,
    )
    # After the commit and with no outbox, as MoonMind does it.
    task_ids = api.publish(app, run_id, [step["name"] for step in steps])
    api.answer({"run_id": run_id, "task_ids": task_ids, "celery": celery.__version__})


if __name__ == "__main__":
    main()
