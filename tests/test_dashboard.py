"""The dashboard over a real study: shows it, and changes nothing unless it may."""

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import optuna
import optuna_dashboard
import pytest
from optuna_dashboard import wsgi

from bdense.errors import InputError
from search.report.dashboard import (
    Application,
    addressed_here,
    dashboard_application,
    hardened,
    serve,
)
from search.spec.space import search_space
from search.storage.engine import open_reading, open_storage
from search.storage.ledger import Ledger
from search.storage.studies import read_studies
from search.study.artifacts import FolderStore, attach
from tests.pages import answer_of
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

    def application(self, *, writable: bool = False) -> Application:
        return dashboard_application(open_storage(self.url), writable=writable)


@pytest.fixture
def study(tmp_path) -> Study:
    return one_trial(f"sqlite:///{tmp_path / 'study.db'}")


def one_trial(url: str) -> Study:
    ledger = Ledger.open(url, "digits", budget=2)
    claim = ledger.claim(search_space(spec()), lambda offset: optuna.samplers.RandomSampler(0))
    ledger.complete(claim, 12.5, {})
    return Study(url, ledger.study._study_id)


def ask(application: Application, method: str, path: str, body: object = None) -> tuple[int, dict]:
    """Status and JSON of one request."""
    status, _, content = answer_of(application, method, path, body)
    return status, json.loads(content) if content else {}


WRITES = [
    ("DELETE", "/api/studies/{key}", {}),
    ("POST", "/api/studies", {"study_name": "new", "directions": ["minimize"]}),
    ("PATCH", "/api/studies/{key}", {}),
    # A way round: some frameworks take the method from here.
    ("POST", "/api/studies/{key}?_method=GET", {}),
    # Unknown routes are refused, whatever the method.
    ("GET", "/sql-profiler", None),
    ("GET", "/api/studies/{key}/unknown", None),
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


def test_no_request_changes_a_study(study):
    before, application = study.contents(), study.application()
    for method, path, body in WRITES:
        status, answer = ask(application, method, path.format(key=study.key), body)
        assert (status, "--writable" in answer["reason"]) == (403, True), path
        assert study.contents() == before, path


def test_a_read_only_page_hides_the_buttons_of_changes(study):
    """Those that this version of the dashboard has; a cached page of before is not taken."""
    script = Path(optuna_dashboard.__file__).with_name("public").joinpath("bundle.js").read_text()
    later = {"HTTP_IF_MODIFIED_SINCE": "Sat, 01 Jan 2050 00:00:00 GMT"}
    for path in ("/dashboard", "/dashboard/studies/1/trials"):
        status, headers, page = answer_of(study.application(), "GET", path, **later)
        assert (status, headers["content-length"]) == (200, str(len(page)))
        assert not {"etag", "last-modified"} & headers.keys()
        tag = re.search(r"<style>(.*?) { display: none !important; }</style>", page.decode())
        for label in re.findall(r'aria-label="(.+?)"', tag[1]):
            assert f'"aria-label":"{label}"' in script
        for kind, attribute, value in re.findall(
            r'\.(Mui\w+)-root:has\(input\[(\w+)="(\w+)"', tag[1]
        ):
            # MUI makes the class from the component's name.
            assert f'{{name:"{kind}",slot:"Root"' in script
            assert f'"input",{{{attribute}:"{value}"' in script
        assert ":has(input" in tag[1]
        icons = re.findall(r'data-testid="(\w+)Icon"', tag[1])
        assert "AddBox" in icons
        for icon in icons:
            assert f'"{icon}")' in script
        _, asked, nothing = answer_of(study.application(), "HEAD", path)
        assert (asked["content-length"], nothing) == (headers["content-length"], b"")
        whole = answer_of(study.application(writable=True), "GET", path)[2]
        assert page.decode().replace(tag[0], "") == whole.decode()


def test_a_long_attribute_is_cut_for_the_page_alone(study):
    storage = open_storage(study.url)
    long = {"value": 12.5, "effects": [0.25] * 200}
    optuna.load_study(study_name="digits", storage=storage).add_trial(
        optuna.trial.create_trial(value=1.0, user_attrs={"fid": long, "seeds": {"training": 0}})
    )
    for writable in (False, True):
        _, answer = ask(study.application(writable=writable), "GET", f"/api/studies/{study.key}")
        shown = {each["key"]: each["value"] for each in answer["trials"][-1]["user_attrs"]}
        assert (len(shown["fid"]) > 100) == writable
        assert json.loads(shown["seeds"]) == {"training": 0}
    assert storage.get_all_trials(study.key)[-1].user_attrs["fid"] == long


def test_a_change_is_asked_for_by_the_dashboards_own_page(study):
    """A page of another site may send the browser here too."""
    application = addressed_here(study.application(writable=True), 8080)
    method, path, body = WRITES[0]
    asked = (application, method, path.format(key=study.key), body)
    before = study.contents()
    here = {"HTTP_HOST": "127.0.0.1:8080"}
    for origin in ("https://elsewhere.example", "null", "http://localhost:8081"):
        assert answer_of(*asked, **here, HTTP_ORIGIN=origin)[0] == 403
        assert study.contents() == before
    assert answer_of(*asked, **here, HTTP_ORIGIN="http://127.0.0.1:8080")[0] < 300
    assert not read_studies(open_storage(study.url).engine)


def test_every_route_of_the_dashboard_is_known(study):
    """A new version's are refused until this test is changed."""
    routes = wsgi(open_storage(study.url)).routes
    application = study.application()
    before, answers = study.contents(), {}
    for route in routes:
        path = re.sub(r"<:re:.*?>(?=$)", "", route.rule)
        path = re.sub(r"<artifact_id[^>]*>", "0a", re.sub(r"<(\w+):int>", "999", path))
        path = re.sub(r"<plot_type>", "edf", re.sub(r"<[^>]*>", "x", path))
        answers[route.method, route.rule] = answer_of(application, route.method, path, {})[0]
    assert len(answers) > 25
    refused = {key for key, status in answers.items() if status == 403}
    assert {method for method, _ in answers.keys() - refused} == {"GET"}
    assert {method for method, _ in refused} == {"POST", "PUT", "DELETE"}
    assert study.contents() == before


def test_a_port_in_use_is_named(study):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"port {port} on 127\.0\.0\.1 cannot be used \(Add"):
            serve(study.url, port=port, writable=False)


@pytest.mark.postgres
def test_reading_a_server(postgres):
    """Every page but what changes something, over a connection that may only read."""
    study = one_trial(postgres.new_database())
    application, key = dashboard_application(open_reading(study.url), writable=False), study.key
    for path in ("/dashboard", "/api/studies", f"/api/studies/{key}", f"/csv/{key}"):
        assert answer_of(application, "GET", path)[0] == 200
    _, answer = ask(application, "GET", f"/api/studies/{key}")
    assert [trial["values"] for trial in answer["trials"]] == [[12.5]]


def test_the_page_runs_its_own_scripts_alone_and_in_no_frame(study):
    _, headers, _ = answer_of(study.application(), "GET", "/dashboard")
    policy = [part.strip() for part in headers["content-security-policy"].split(";")]
    assert "script-src 'self' 'unsafe-eval'" in policy
    assert {"default-src 'self'", "object-src 'none'", "frame-ancestors 'none'"} <= {*policy}
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


def test_nothing_else_runs_at_all(study):
    def plain(environ, start_response):
        """An answer without headers."""
        start_response("200 OK", [])
        return [b""]

    own, paths = study.application(), ("/api/studies", "/static/x", "/nowhere")
    for application, path in (*((own, path) for path in paths), (hardened(plain), "/")):
        _, headers, _ = answer_of(application, "GET", path)
        policy = headers["content-security-policy"]
        assert policy == "default-src 'none'; sandbox; frame-ancestors 'none'"


@pytest.mark.parametrize(
    ("name", "kind", "is_file"),
    [
        ("samples.png", "image/png", False),
        ("page.html", "text/html", True),
        ("drawing.svg", "image/svg+xml", True),
        ("unknown", "application/octet-stream", True),
    ],
)
def test_an_artifact_is_drawn_or_offered_as_a_file_and_never_runs(
    study, tmp_path, name, kind, is_file
):
    ledger = Ledger.open(study.url, "digits", budget=None)
    claim = ledger.claim(search_space(spec()), lambda offset: optuna.samplers.RandomSampler(1))
    path = tmp_path / name
    path.write_bytes(b"<script>alert(1)</script>")
    store = FolderStore(tmp_path / "artifacts")
    artifact = attach(ledger.storage, claim.trial_id, [path], store)[name]
    application = dashboard_application(open_storage(study.url), writable=False, artifacts=store)
    address = f"/artifacts/{study.key}/{claim.trial_id}/{artifact}"
    status, headers, content = answer_of(application, "GET", address)
    assert (status, content) == (200, b"<script>alert(1)</script>")
    assert headers["content-type"].partition(";")[0] == kind
    assert headers["content-security-policy"].startswith("default-src 'none'; sandbox")
    assert headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in headers
    assert (headers.get("content-disposition") == "attachment") == is_file


@pytest.mark.parametrize("artifact", ["..%2f..%2fstudy.db", "../../study.db", "0a/../../study.db"])
def test_no_address_leads_out_of_the_artifacts(study, tmp_path, artifact):
    (tmp_path / "artifacts").mkdir()
    application = dashboard_application(
        open_storage(study.url), writable=False, artifacts=FolderStore(tmp_path / "artifacts")
    )
    for path in (f"/artifacts/{study.key}/1/{artifact}", f"/static/{artifact}"):
        status, _, content = answer_of(application, "GET", path)
        assert status in (403, 404)
        assert b"SQLite" not in content


OWN_HOSTS = ["127.0.0.1:8080", "localhost:8080", "LocalHost:8080", "[::1]:8080"]
OTHER_HOSTS = ["127.0.0.1:8081", "127.0.0.1", "evil.org:8080", "127.0.0.1.evil.org:8080", None]


def test_a_name_that_is_made_to_mean_this_machine_is_refused(study):
    application = addressed_here(study.application(writable=True), 8080)
    for host in (*OWN_HOSTS, *OTHER_HOSTS):

        def named(environ, start_response, given=host):
            own = {} if given is None else {"HTTP_HOST": given}
            return application({**environ, **own}, start_response)

        status, answer = ask(named, "GET", "/api/studies")
        if host in OWN_HOSTS:
            assert status == 200, host
        else:
            assert (status, "open http://127.0.0.1:8080" in answer["reason"]) == (403, True), host


@contextlib.contextmanager
def running(url: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """The real server in a process of its own, and its address."""
    # Ignored, as by a shell that starts a command in the background, these tests perhaps.
    program = "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    program += "from search.report.dashboard import serve\n"
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
        other = urllib.request.Request(f"{address}/api/studies", headers={"Host": "evil.example"})
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(other, timeout=20)
        delete = urllib.request.Request(f"{address}/api/studies/{study.key}", method="DELETE")
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(delete, timeout=20)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == -signal.SIGINT
    assert study.names() == ["digits"]
