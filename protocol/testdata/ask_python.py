"""Answers what Python makes of a value: one JSON array in, one out.

Each question is [what, argument]; see python_test.go."""
import json
import lzma
import pickle
import sys
from uuid import UUID

from celery.utils.saferepr import saferepr
from celery.utils.time import maybe_iso8601
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from kombu.utils import json as kombu


def of_pickle(text):
    hexa, text = text
    value = pickle.loads(bytes.fromhex(hexa))
    same = kombu.loads(text)
    # repr tells types and order apart, and takes NaN for the same as NaN.
    return [repr(value), repr(same)]


def pickles(text):
    value = json.loads(text)
    return [json.dumps(value)] + [pickle.dumps(value, protocol).hex() for protocol in range(2, 6)]


def object_pickles(text):
    value = kombu.loads(text)
    return [kombu.dumps(value)] + [pickle.dumps(value, protocol).hex() for protocol in range(2, 6)]


def iso(text):
    try:
        moment = maybe_iso8601(text)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=timezone.utc)
        return moment.astimezone(timezone.utc).isoformat()
    except (ValueError, TypeError, OverflowError):
        return None


def load(text):
    try:
        json.loads(text)
        return True
    except ValueError:
        return False


def body(question):
    """As py-amqp's AbstractChannel.dispatch_method and then kombu decode a body; None where they cannot."""
    hexa, encoding = question
    body = bytes.fromhex(hexa)
    try:
        body = body.decode(encoding)
    except Exception:
        pass
    try:
        return kombu.loads(body)
    except ValueError:
        return None


def exception(question):
    hexa, _ = question
    value = pickle.loads(bytes.fromhex(hexa))
    from celery import Celery
    from celery.backends.base import Backend
    error = Backend(Celery(set_as_current=False)).exception_to_python(value)
    return [type(error).__name__, repr(error), str(error), list(value), type(value['exc_message']).__name__]


def xz(hexa):
    try:
        return lzma.decompress(bytes.fromhex(hexa)).hex()
    except (lzma.LZMAError, EOFError):
        return None


def same(question):
    """Whether two texts are the same value; NaN is the same as NaN."""
    one, other = map(kombu.loads, question)
    return one == other or repr(one) == repr(other)


def texts(source):
    """The JSON of each value of a Python list, or None where kombu cannot encode it."""
    out = []
    for value in eval(source):
        try:
            out.append(kombu.dumps(value))
        except TypeError:
            out.append(None)
    return out


answers = {
    'same': same,
    'texts': texts,
    'xz': xz,
    'dumps': lambda text: kombu.dumps(kombu.loads(text)),
    'float': lambda hexa: repr(float.fromhex(hexa)),
    'load': load,
    'of_pickle': of_pickle,
    'pickles': pickles,
    'object_pickles': object_pickles,
    'iso': iso,
    'argsrepr': lambda text: saferepr(tuple(kombu.loads(text)), 1024),
    'kwargsrepr': lambda text: saferepr(kombu.loads(text), 1024),
    'repr': lambda text: repr(json.loads(text)),
    'exception': exception,
    'body': body,
}
questions = json.load(sys.stdin)
json.dump([answers[what](argument) for what, argument in questions], sys.stdout)
