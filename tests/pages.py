"""Requests to WSGI applications in this process."""

import gzip
import io
import json
from typing import Any


def answer_of(
    application: Any, method: str, path: str, body: object = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers with lower-case names, and content, unzipped, of one request."""
    content = b"" if body is None else json.dumps(body).encode()
    environ = {
        "REQUEST_METHOD": method,
        "PATH_INFO": path,
        "SERVER_NAME": "127.0.0.1",
        "SERVER_PORT": "80",
        "CONTENT_TYPE": "application/json",
        "CONTENT_LENGTH": str(len(content)),
        "HTTP_ACCEPT_ENCODING": "gzip",
        "wsgi.errors": io.StringIO(),
        "wsgi.input": io.BytesIO(content),
        "wsgi.url_scheme": "http",
        **headers,
    }
    answers: list[Any] = []
    text = b"".join(application(environ, lambda *answer: answers.append(answer)))
    status, headers = int(answers[-1][0].split()[0]), {n.lower(): v for n, v in answers[-1][1]}
    zipped = headers.get("content-encoding") == "gzip"
    return status, headers, gzip.decompress(text) if zipped and text else text
