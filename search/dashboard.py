"""optuna-dashboard over a study's storage, for one person's browser, read-only unless asked."""

import socketserver
import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from optuna.storages import RDBStorage
from optuna_dashboard import wsgi

from bdense.errors import InputError
from search.storage import open_storage

HOST = "127.0.0.1"
READING = ("GET", "HEAD", "OPTIONS")

Application: TypeAlias = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def read_only(application: Application) -> Application:
    """Answer 403 to every request that could change a study.

    The stock dashboard lets anybody rename a study, which copies its trials to new rows and
    orphans the running ones.
    """

    def guarded(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ.get("REQUEST_METHOD") in READING:
            return application(environ, start_response)
        start_response("403 Forbidden", [("Content-Type", "application/json")])
        return [b'{"reason": "this dashboard is read-only; start it with --writable to change"}']

    return guarded


def dashboard_application(storage: RDBStorage, *, writable: bool) -> Application:
    """The dashboard as a WSGI application."""
    application: Application = wsgi(storage)
    return application if writable else read_only(application)


def serve(url: str, *, port: int, writable: bool) -> None:
    """Serve the dashboard on 127.0.0.1 until interrupted.

    Raises:
        StorageError: The database cannot be opened.
        InputError: The port cannot be had.
    """
    application = dashboard_application(open_storage(url), writable=writable)
    try:
        server = make_server(HOST, port, application, _Server, _QuietHandler)
    except OSError as error:
        raise InputError(
            f"port {port} on {HOST} cannot be used ({error.strerror}); choose another --port"
        ) from error
    with server:
        mode = "changes are allowed" if writable else "read-only"
        sys.stderr.write(
            f"dashboard on http://{HOST}:{server.server_port} ({mode}); Ctrl-C ends\n"
        )
        server.serve_forever()


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: ANN401
        """One line a request would bury everything else."""
