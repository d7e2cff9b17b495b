"""Stores a result as a Python worker does, removes results older than an hour as
Celery's daily cleanup does, and prints what AsyncResult.date_done gives then, by
task id: text, or null.

    python dates.py BACKEND_URL TASK_ID_TO_STORE TASK_ID...
"""
import json
import logging
import sys

import celery

logging.disable(logging.WARNING)  # 5.7 warns for each pickle that it reads
app = celery.Celery("dates", backend=sys.argv[1])
app.conf.update(result_serializer="json", accept_content=["json"], result_expires=3600)
app.backend.store_result(sys.argv[2], 3, "SUCCESS")
app.backend.cleanup()
dates = {}
for task_id in sys.argv[2:]:
    done = app.AsyncResult(task_id).date_done
    dates[task_id] = done and done.isoformat()
print(json.dumps(dates))
