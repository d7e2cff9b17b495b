"""A Celery worker with the tasks of the benchmark, in the settings of the pilot's winner, or a sender."""

import json
import os
import signal
import threading
import time

from celery import Celery

spec = json.loads(os.environ["MM_BENCH_CONTENDER"])
pipe = os.open(spec["Pipe"], os.O_WRONLY)

app = Celery("bench", broker=spec["Broker"])
app.conf.update(
    task_default_queue=spec["Queue"],
    task_acks_late=True,
    task_ignore_result=not spec["Results"],
    # A chain's next message is as safe as ours only with a confirm.
    broker_transport_options={"confirm_publish": True},
    worker_prefetch_multiplier=max(1, spec["Prefetch"] // max(1, spec["Slots"])),
    worker_enable_remote_control=False,
    worker_send_task_events=False,
    broker_connection_retry_on_startup=True,
)
if spec["Results"]:
    address = spec["Database"].split("://", 1)[1]
    app.conf.result_backend = "db+postgresql+" + spec["Driver"] + "://" + address


@app.task(name="bench.noop")
def noop(value):
    return value


@app.task(name="bench.timed")
def timed(sent):
    os.write(pipe, b"age %d\n" % (time.time_ns() - sent))
    return 0


@app.task(name="bench.mark")
def mark(value):
    os.write(pipe, b"mark %d\n" % time.time_ns())
    return 0


def end_with_parent():
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)


def send():
    for count in (20, spec["Count"]):
        for _ in range(count):
            noop.apply_async((3,), queue=spec["Queue"])
        os.write(pipe, b"mark %d\n" % time.time_ns())
    signal.sigwait({signal.SIGTERM})


if __name__ == "__main__":
    if spec["Job"] == "send":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=end_with_parent, daemon=True).start()
    if spec["Job"] == "send":
        send()
        raise SystemExit
    app.worker_main([
        "worker", "--pool", spec["Pool"], "--concurrency", str(spec["Slots"]), "--loglevel", "WARNING",
        "--without-gossip", "--without-mingle", "--without-heartbeat",
    ])
