"""optuna-dashboard over the studies of a storage, read-only by default.

For a browser on this machine (``serve``), or behind a proxy that authenticates (``application``,
for gunicorn).
"""

import json
import re
import signal
import socketserver
import sys
import threading
from collections.abc import Callable, Container, Iterable
from typing import Any, TypeAlias
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from optuna_dashboard import wsgi

from bdense.errors import InputError
from search.report.prometheus import Application, mount
from search.storage.engine import open_reading, open_storage, resolve_storage_url
from search.study.artifacts import Store, artifact_store

HOST = "127.0.0.1"
READING = ("GET", "HEAD", "OPTIONS")
# All that a browser has to read; none of it changes a study. Routes of other versions are refused.
READ = re.compile(
    r"/?|/dashboard(/.*)?|/incompatible-rdb-schema|/favicon\.ico|/static/.+|/csv/\d+"
    r"|/api/(meta|studies|studies/\d+|studies/\d+/param_importances|studies/\d+/plot/\w+)"
    r"|/artifacts/\d+/(\d+/)?[0-9a-fA-F-]+"
)
_PAGE = re.compile(r"/dashboard(/.*)?")
# What its page offers and a read-only one refuses: create, rename, delete, fail, edit, upload.
_HIDDEN = (
    '[aria-label="rename study"]',
    '[aria-label="delete study"]',
    '[aria-label="delete artifact"]',
    *(f'button:has([data-testid="{name}Icon"])' for name in ("AddBox", "Edit", "StopCircle")),
    '.MuiCard-root:has(input[type="file"])',
)
_STYLE = f"<style>{', '.join(_HIDDEN)} {{ display: none !important; }}</style>".encode()
# Of the page without the style: what is not asked for, and what is not told.
_NOT_ASKED = (
    "HTTP_ACCEPT_ENCODING",
    "HTTP_IF_MODIFIED_SINCE",
    "HTTP_IF_NONE_MATCH",
    "HTTP_RANGE",
)
_OF_ANOTHER_PAGE = ("content-length", "etag", "last-modified", "accept-ranges")
# What a browser may draw; an artifact of any other type (HTML, SVG) is offered as a file.
DRAWN = ("image/png", "image/jpeg", "image/gif", "image/webp")
_ARTIFACT = "/artifacts/"
SHORT = 80  # characters of an attribute on a trial's page
_POLICY = "Content-Security-Policy"
_NOTHING_RUNS = "default-src 'none'; sandbox; frame-ancestors 'none'"
_NO_FRAMES = "; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"

Headers: TypeAlias = list[tuple[str, str]]


def read_only(application: Application) -> Application:
    """Answer 403 to requests that could change a study, and to unknown ones; hide their buttons.

    Renaming a study, for one, copies its trials to new rows and orphans the running ones.
    """

    def guarded(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "").rstrip("/")
        if environ.get("REQUEST_METHOD") in READING and READ.fullmatch(path):
            shown = _without_buttons(application) if _PAGE.fullmatch(path) else application
            return shown(environ, start_response)
        start_response("403 Forbidden", [("Content-Type", "application/json")])
        return [b'{"reason": "this dashboard is read-only; start it with --writable to change"}']

    return guarded


def _without_buttons(application: Application) -> Application:
    """The dashboard's page with a style that hides what a read-only one refuses."""

    def shown(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        begun: list[Any] = []
        kept = {name: value for name, value in environ.items() if name not in _NOT_ASKED}
        kept["REQUEST_METHOD"] = "GET"  # of HEAD, too: the length is that of the page
        parts = application(kept, lambda *answer: begun.extend(answer))
        page = b"".join(parts).replace(b"</head>", _STYLE + b"</head>", 1)
        if (close := getattr(parts, "close", None)) is not None:
            close()
        headers = [each for each in begun[1] if each[0].lower() not in _OF_ANOTHER_PAGE]
        start_response(begun[0], [*headers, ("Content-Length", str(len(page)))])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [page]

    return shown


def hardened(application: Application) -> Application:
    """Add headers to every response that let only the dashboard's own page run scripts."""

    def guarded(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")

        def start(status: str, headers: Headers, *error: Any) -> Any:  # noqa: ANN401  WSGI's own
            return start_response(status, safe_headers(path, headers), *error)

        return application(environ, start)

    return guarded


def addressed_here(application: Application, port: int) -> Application:
    """Answer 403 to a request for any host but this machine's own, against DNS rebinding.

    So too to a change that a page of another site asks for.
    """
    names = (HOST, "localhost", "[::1]")
    hosts = {f"{name}:{port}" for name in names} | ({*names} if port == 80 else set())

    def guarded(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        host = environ.get("HTTP_HOST", "").lower()
        own = f"http://{host}"
        is_own = environ["REQUEST_METHOD"] in READING or environ.get("HTTP_ORIGIN", own) == own
        if host in hosts and is_own:
            return application(environ, start_response)
        headers = safe_headers("", [("Content-Type", "application/json")])
        start_response("403 Forbidden", headers)
        reason = f"this dashboard is for this machine alone; open http://{HOST}:{port}"
        return [json.dumps({"reason": reason}).encode()]

    return guarded


def safe_headers(path: str, headers: Headers) -> Headers:
    """A response's headers with those that keep a browser from running its content."""
    given = {name.lower(): value for name, value in headers}
    own = given.get(_POLICY.lower())
    kept = [
        (name, value)
        for name, value in headers
        if name.lower() not in (_POLICY.lower(), "access-control-allow-origin")
    ]
    kept += [
        (_POLICY, own + _NO_FRAMES if own else _NOTHING_RUNS),
        ("X-Content-Type-Options", "nosniff"),
        ("X-Frame-Options", "DENY"),
        ("Referrer-Policy", "no-referrer"),
        ("Cross-Origin-Resource-Policy", "same-origin"),
    ]
    kind = given.get("content-type", "").partition(";")[0].strip().lower()
    if path.startswith(_ARTIFACT) and kind not in DRAWN:
        kept.append(("Content-Disposition", "attachment"))
    return kept


class _Shortened(RDBStorage):
    """A storage whose trials have long attributes cut off, which a page would show on one line.

    For reading alone: the dashboard renames a study by a copy of what it reads.
    """

    @classmethod
    def of(cls, storage: RDBStorage) -> RDBStorage:
        """A shortening view of a storage, over its connections."""
        shortened = cls.__new__(cls)
        shortened.__dict__ = storage.__dict__
        return shortened

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        """Trials with long attributes shortened, which are copies: Optuna makes new ones."""
        found = super().get_all_trials(study_id, deepcopy, states)
        for trial in found:
            trial.user_attrs = {key: _short(each) for key, each in trial.user_attrs.items()}
        return found


def _short(value: Any) -> Any:  # noqa: ANN401  JSON
    """Mappings and lists as text of at most ``SHORT`` characters; other values unchanged."""
    if not isinstance(value, (dict, list)) or len(text := json.dumps(value)) < SHORT:
        return value
    return text[: SHORT - 1] + "\N{HORIZONTAL ELLIPSIS}"


def dashboard_application(
    storage: RDBStorage, *, writable: bool, artifacts: Store | None = None
) -> Application:
    """The dashboard as a WSGI application; ``artifacts`` holds the trials' pictures."""
    shown = storage if writable else _Shortened.of(storage)
    application: Application = wsgi(shown, artifact_store=artifacts)
    return hardened(mount(application if writable else read_only(application), storage))


def application() -> Application:
    """The read-only dashboard of BDENSE_STORAGE and BDENSE_ARTIFACTS (or BDENSE_RUNS).

    gunicorn --workers 1 --threads 8 'search.report.dashboard:application()'

    Raises:
        InputError: The database cannot be opened, or the artifacts' place is unknown.
    """
    storage = open_reading(resolve_storage_url(None))
    return dashboard_application(storage, writable=False, artifacts=artifact_store())


def serve(url: str, *, port: int, writable: bool) -> None:
    """Serve the dashboard on 127.0.0.1 until interrupted.

    Raises:
        StorageError: The database cannot be opened.
        InputError: The port cannot be had, or the artifacts' place is unknown.
    """
    storage = open_storage(url) if writable else open_reading(url)
    application = dashboard_application(storage, writable=writable, artifacts=artifact_store())
    try:
        server = make_server(HOST, port, application, _Server, _QuietHandler)
    except OSError as error:
        raise InputError(
            f"port {port} on {HOST} cannot be used ({error.strerror}); choose another --port"
        ) from error
    server.set_app(addressed_here(application, server.server_port))
    if threading.current_thread() is threading.main_thread():
        # A shell that starts it in the background makes it ignore SIGINT.
        signal.signal(signal.SIGINT, signal.default_int_handler)
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
        """Log no requests."""
