"""Compresses bodies with every method of kombu: python compressed.py > compressed_kombu-VERSION.json

It needs the packages brotli and, for kombu before 5.7, zstandard, else backports.zstd."""
import base64
import json
import sys

import kombu
from kombu import compression

bodies = {
    "small": '[[1, "x"], {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]',
    "large": json.dumps([[[i * 7919 % 10007, "text %d" % i] for i in range(3000)], {}, {}]),
}
messages = []
for body, text in bodies.items():
    for name in ("zlib", "gzip", "bzip2", "bzip", "lzma", "xz", "brotli", "zstd", "zstandard"):
        compressed, header = compression.compress(text, name)
        messages.append({"name": name, "header": header, "body": body, "compressed": base64.b64encode(compressed).decode()})
json.dump({"kombu": kombu.__version__, "bodies": bodies, "messages": messages}, sys.stdout, indent=1)
