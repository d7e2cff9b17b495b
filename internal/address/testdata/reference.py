"""Parses addresses with the libraries that Celery uses, one JSON line each.

In:  {"kind": "broker" | "database", "text": "..."}
Out: {"brokers": [[tls, user, password, host, port, vhost, heartbeat], ...]}
     {"database": {"host": ..., "port": ..., "user": ..., ...}}
     {"error": "..."} where the library refuses it.
"""
import json
import sys
import warnings

from kombu import Connection
from psycopg2.extensions import make_dsn
from sqlalchemy.dialects.postgresql.psycopg2 import dialect
from sqlalchemy.engine import make_url

warnings.simplefilter("ignore")


def broker(text):
    connection = Connection(text)
    found = []
    # Python keeps empty addresses and would try them in turn; the test drops them.
    for i, address in enumerate(connection.alt or [text]):
        if i > 0:
            connection.switch(address.lstrip())
        defaults = connection.transport.default_connection_params
        parts = {k: getattr(connection, k) or defaults[k] for k in ("userid", "password", "hostname", "port")}
        host = "127.0.0.1" if parts["hostname"] == "localhost" else parts["hostname"]
        tls = connection.transport_cls == "amqps" or bool(connection.ssl)
        found.append([tls, parts["userid"], parts["password"], host, parts["port"], connection.virtual_host, float(connection.heartbeat or 0)])
    return {"brokers": found}


def database(text):
    if text.startswith("db+"):  # as celery.app.backends.by_url does
        text = text.split("+", 1)[1]
    url = make_url(text)
    if url.get_backend_name() != "postgresql":
        raise ValueError("not PostgreSQL")
    _, options = dialect().create_connect_args(url)
    make_dsn(**options)  # libpq validates the names of options
    return {"database": {k: str(v) for k, v in options.items()}}


for line in sys.stdin:
    question = json.loads(line)
    try:
        answer = {"broker": broker, "database": database}[question["kind"]](question["text"])
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), flush=True)
