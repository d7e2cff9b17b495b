"""Read task results with Celery's AsyncResult and print them as one JSON document.

    python read_results.py [--timeout SECONDS] TASK_ID…

For each id: state, result, traceback and what get() did: {"value"} or
{"raised": {"class", "module", "args", "text"}}; and "stored", the decoded
column: Celery makes a class of its own of an exception whose module is not to
be had here, so only the column has the module's name.
"""

import argparse
import json
import logging
import pickle

import celery
from celery.exceptions import TimeoutError
from sqlalchemy import text

import moonmind_api as api


def exception(error: BaseException) -> dict:
    return {
        "class": type(error).__name__,
        "module": type(error).__module__,
        "args": [argument if isinstance(argument, (str, int, float)) else repr(argument) for argument in error.args],
        "text": str(error),
    }


def read(result, timeout: float) -> dict:
    document = {}
    try:
        document["get"] = {"value": result.get(timeout=timeout)}
    except TimeoutError:
        document["get"] = {"timeout": timeout}
    except Exception as error:  # whatever class the worker's result names
        document["get"] = {"raised": exception(error)}
    stored = result.result
    document.update(
        state=result.state,
        result=exception(stored) if isinstance(stored, BaseException) else stored,
        traceback=result.traceback,
        name=result.name,
        args=result.args,
        kwargs=result.kwargs,
        worker=result.worker,
        retries=result.retries,
        queue=result.queue,
        successful=result.successful(),
        failed=result.failed(),
    )
    return document


def stored(connection, task_id: str):
    column = connection.execute(
        text("SELECT result FROM celery_taskmeta WHERE task_id = :id"), {"id": task_id}
    ).scalar_one_or_none()
    if column is None:
        return None
    column = bytes(column)
    return pickle.loads(column) if column[:1] == b"\x80" else json.loads(column)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--timeout", type=float, default=10, help="seconds that get() waits, 10 by default")
    parser.add_argument("task_ids", nargs="+")
    arguments = parser.parse_args()
    # Celery 5.7 warns with a traceback for each pickled row that it reads.
    logging.disable(logging.WARNING)
    app = api.celery_app()
    results = {task_id: read(app.AsyncResult(task_id), arguments.timeout) for task_id in arguments.task_ids}
    with api.database().connect() as connection:
        for task_id, document in results.items():
            document["stored"] = stored(connection, task_id)
    api.answer({"celery": celery.__version__, "results": results})


if __name__ == "__main__":
    main()
