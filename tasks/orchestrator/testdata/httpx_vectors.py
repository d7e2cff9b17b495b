"""Writes httpx_vectors.json: what httpx 0.28.1, which MoonMind pins, makes of URLs.

    python3 -m venv /tmp/v && /tmp/v/bin/pip install httpx==0.28.1 idna==3.20
    /tmp/v/bin/python httpx_vectors.py > httpx_vectors.json
"""
import json
import random

import httpx

URLS = """
http://api:5000/health
http://u:p@127.0.0.1:8080/auth
http://u%40x:p%2Fw@h/
http://u:@h/
http://:p@h/
http://u@h/
http://u:p:q@h/
http://a@b@h/
http://ü:ß@h/
http://u%C3%A4:p@h/
http://u p:p q@h/
http://u%:p%zz@h/
http://[::1]:80/ok
http://[::1]:8080/ok
http://[::1]
http://[::1
http://[zz]/
http://[fe80::1%eth0]:80/
http://1.2.3.4/
http://1.2.3.256/
http://01.2.3.4/
http://1.2.3/
http://HOST.Example:80/
HTTP://host:80/
https://host:443/
https://host:80/
http://host:443/
http://host:0/
http://host:/x
http://host:x/
http://host:8 0/
http://host: 80/
http://host:080/
http://host:65536/
http://bücher.example/
http://BÜCHER.example/
http://straße.example/
http://xn--bcher-kva.example/
http://例え.テスト/
http://例え。テスト/
http://☃.example/
http://-ä.example/
http://ä-.example/
http://abä--c.example/
http://a_b.example/
http://a b.example/
http://a%20b.example/
http://%41.example/
http://пример.испытание:8080/путь?запрос=да
http://host
http://host?x
http://host#x
http://host/?
http://host/?#
http://host//a//b
http://host//
http://host/a/../b
http://host/a/./b/
http://host/../../a
http://host/..
http://host/a/..
http://host/.a/..b
http://host/a/%2e%2e/b
http://host/%2F/%2f
http://host/%
http://host/%zz%41%
http://host/a b
http://host/ä
http://host/a+b&c=d;e
http://host/"<>`{}|\\\\^[]@:!$'()*,
http://host/?"<>`{}|\\\\^[]@:!$'()*,
http://host/?a b=ä&c=%zz%41
http://host/?a?b??
http://host/?a#b#c
http://host/a#b?c
http:/host/a
http:host/a
http:///a
http://
http://u:p@
//host/a
host/a
host:80/a
/a
None
:80
ftp://host/
foo+bar://host/
1http://host/
 http://host/
http://host /
http ://host/
http://host/\t
http://host/\x7f
http://ho\nst/
http://host/\x00
http://host\\\\path
http://host;x/
http://host,y/
http://ho{s}t|/
http://ho<s>t/
http://*.host/
http://host./
http://host../
http://.host/
http://@host/
http://:@host/
http://host:80:90/
http://host:-1/
""".strip("\n").split("\n")


def unescaped(text):
    for escape, char in (("\\t", "\t"), ("\\x7f", "\x7f"), ("\\n", "\n"), ("\\x00", "\0")):
        text = text.replace(escape, char)
    return text.replace("\\\\", "\\")


def random_urls(count):
    source = random.Random(8)
    parts = ["a", "B", "ä", "%41", "%", "%zz", " ", "/", "//", ".", "..", "/../", "?", "#", "@", ":", "&", "=", "+", "[", "]", "{", "|", "\\", '"', "<", "^", "`", "~", "日", ";", ",", "'", "$", "1"]
    for _ in range(count):
        yield "http://host" + source.choice(["", ":81", "/"]) + "/" + "".join(source.choice(parts) for _ in range(source.randint(1, 9)))
    for _ in range(count // 2):
        yield "http://" + "".join(source.choice(parts) for _ in range(source.randint(1, 5))) + "@host/"


def reading(text):
    client = httpx.Client(transport=httpx.MockTransport(lambda request: httpx.Response(200)))
    try:
        request = client.build_request("GET", text)
        if not request.url.scheme or not request.url.host or request.url.scheme not in ("http", "https"):
            httpx.Client(timeout=1).get(text)  # raises
        auth = client._build_request_auth(request)
        request = next(auth.sync_auth_flow(request))
    except KeyError:
        return {"error": "Request URL is missing an 'http://' or 'https://' protocol."}
    except Exception as error:
        return {"error": str(error)}
    return {
        "scheme": request.url.scheme,
        "host": request.url.raw_host.decode(),
        "port": request.url.port,
        "target": request.url.raw_path.decode(),
        "header": request.headers["host"],
        "authorization": request.headers.get("authorization", ""),
    }


vectors = [{"url": text, **reading(text)} for text in [*map(unescaped, URLS), *random_urls(300)]]
print("[" + ",\n ".join(json.dumps(v) for v in vectors) + "]")
