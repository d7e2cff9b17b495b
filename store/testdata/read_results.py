"""Reads task results with Celery's AsyncResult, as any producer would, and
prints what it saw as one JSON object by task id.

    python read_results.py BACKEND_URL TASK_ID...
"""
import json
import logging
import sys

import celery

logging.disable(logging.WARNING)  # 5.7 warns for each pickle that it reads
app = celery.Celery("reader", backend=sys.argv[1])
app.conf.update(result_extended=True, result_serializer="json", accept_content=["json"])


def attempt(read):
    try:
        return repr(read())
    except BaseException as error:
        return "raises %s.%s%r" % (type(error).__module__, type(error).__name__, error.args)


seen = {}
for task_id in sys.argv[2:]:
    result = app.AsyncResult(task_id)
    seen[task_id] = {
        "state": attempt(lambda: result.state),
        "get": attempt(lambda: result.get(timeout=5)),
        "result": attempt(lambda: result.result),
        "traceback": attempt(lambda: result.traceback),
        "name": attempt(lambda: result.name),
        "args": attempt(lambda: result.args),
        "kwargs": attempt(lambda: result.kwargs),
        "worker": attempt(lambda: result.worker),
        "retries": attempt(lambda: result.retries),
        "queue": attempt(lambda: result.queue),
        "date_done": attempt(lambda: result.date_done),
        "children": attempt(lambda: result.children),
    }
print(json.dumps(seen))
