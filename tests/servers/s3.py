"""An S3 server on this machine: moto's, whose conditional writes are made one after another, as S3 promises.

moto looks at `If-None-Match` and `If-Match` and then writes, in many threads: two of them may both be the first.
Usage: python tests/servers/s3.py PORT
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import run_simple

application = DomainDispatcherApplication(create_backend_app)
writing = threading.Lock()


def serve(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Answer a request; one that writes under a condition has the server for itself."""
    if environ["REQUEST_METHOD"] == "PUT" and {"HTTP_IF_NONE_MATCH", "HTTP_IF_MATCH"} & set(environ):
        with writing:
            return list(application(environ, start_response))
    return application(environ, start_response)


if __name__ == "__main__":
    run_simple("127.0.0.1", int(sys.argv[1]), serve, threaded=True, request_handler=MotoRequestHandler)
