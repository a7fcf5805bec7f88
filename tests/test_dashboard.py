"""The dashboard over a real study: shows it, and changes nothing unless it may."""

import contextlib
import io
import json
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

import optuna
import pytest

from bdense.errors import InputError
from search.dashboard import Application, dashboard_application, serve
from search.errors import StorageError
from search.ledger import Ledger
from search.space import search_space
from search.storage import open_storage
from tests.studies import spec


@dataclass
class Study:
    """A study with one finished trial."""

    url: str
    key: int

    def names(self) -> list[str]:
        return optuna.get_all_study_names(open_storage(self.url))

    def contents(self) -> list[object]:
        """All that the dashboard could change."""
        storage = open_storage(self.url)
        return [
            [(each.study_name, each._study_id) for each in storage.get_all_studies()],
            storage.get_study_system_attrs(self.key),
            storage.get_study_user_attrs(self.key),
            storage.get_all_trials(self.key),
        ]

    def application(self, *, writable: bool) -> Application:
        return dashboard_application(open_storage(self.url), writable=writable)


@pytest.fixture
def study(tmp_path) -> Study:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    ledger = Ledger.open(url, "digits", budget=2)
    claim = ledger.claim(search_space(spec()), lambda offset: optuna.samplers.RandomSampler(0))
    ledger.complete(claim, 12.5, {})
    (summary,) = open_storage(url).get_all_studies()
    return Study(url, summary._study_id)


def ask(application: Application, method: str, path: str, body: object = None) -> tuple[int, dict]:
    """Status and JSON of one request."""
    content = b"" if body is None else json.dumps(body).encode()
    environ = {
        "REQUEST_METHOD": method,
        "PATH_INFO": path,
        "SERVER_NAME": "127.0.0.1",
        "SERVER_PORT": "80",
        "CONTENT_TYPE": "application/json",
        "CONTENT_LENGTH": str(len(content)),
        "wsgi.input": io.BytesIO(content),
        "wsgi.url_scheme": "http",
    }
    answers = []
    chunks = application(environ, lambda status, headers, *error: answers.append(status))
    text = b"".join(chunks)
    return int(answers[-1].split()[0]), json.loads(text) if text else {}


WRITES = [
    ("DELETE", "/api/studies/{key}", {}),
    ("POST", "/api/studies/{key}/rename", {"study_name": "mine"}),
    ("POST", "/api/studies", {"study_name": "new", "directions": ["minimize"]}),
    ("PUT", "/api/studies/{key}/note", {"body": "hello", "version": 1}),
    ("POST", "/api/trials/1/tell", {"state": "Complete", "values": [0.1]}),
    ("PATCH", "/api/studies/{key}", {}),
]


@pytest.mark.parametrize("writable", [False, True])
def test_the_study_is_listed_with_its_trial(study, writable):
    application = study.application(writable=writable)
    status, answer = ask(application, "GET", "/api/studies")
    assert status == 200
    assert [each["study_name"] for each in answer["study_summaries"]] == ["digits"]
    status, answer = ask(application, "GET", f"/api/studies/{study.key}")
    assert status == 200
    assert [trial["values"] for trial in answer["trials"]] == [[12.5]]


@pytest.mark.parametrize(("method", "path", "body"), WRITES)
def test_no_request_changes_a_study(study, method, path, body):
    before = study.contents()
    application = study.application(writable=False)
    status, answer = ask(application, method, path.format(key=study.key), body)
    assert status == 403
    assert "--writable" in answer["reason"]
    assert study.contents() == before


def test_a_writable_dashboard_renames(study):
    """What the read-only one is for: the rows move to a study with another key."""
    application = study.application(writable=True)
    status, answer = ask(
        application, "POST", f"/api/studies/{study.key}/rename", {"study_name": "mine"}
    )
    assert (status, answer["study_name"]) == (201, "mine")
    assert answer["study_id"] != study.key
    assert study.names() == ["mine"]


def test_a_port_in_use_is_named(study):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"port {port} on 127\.0\.0\.1 cannot be used \(Add"):
            serve(study.url, port=port, writable=False)


def test_a_file_that_is_no_database_is_named(tmp_path):
    (tmp_path / "study.db").write_text("no database " * 100)
    with pytest.raises(StorageError, match=r"cannot open the study database .*study\.db"):
        serve(f"sqlite:///{tmp_path / 'study.db'}", port=0, writable=False)


@contextlib.contextmanager
def running(url: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """The real server in a process of its own, and its address."""
    program = "import sys; from search.dashboard import serve\n"
    program += "serve(sys.argv[1], port=0, writable=False)"
    with subprocess.Popen(
        [sys.executable, "-c", program, url], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            line = process.stderr.readline()
            assert "(read-only); Ctrl-C ends" in line
            yield process, line.split()[2]
        finally:
            process.kill()


def test_the_server_answers_on_this_machine_and_ends_with_ctrl_c(study):
    with running(study.url) as (process, address):
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(f"{address}/api/studies", timeout=20) as answer:
            names = [each["study_name"] for each in json.load(answer)["study_summaries"]]
        assert names == ["digits"]
        delete = urllib.request.Request(f"{address}/api/studies/{study.key}", method="DELETE")
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(delete, timeout=20)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == -signal.SIGINT
    assert study.names() == ["digits"]
