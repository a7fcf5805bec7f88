"""docker compose for real: a study over two workers survives a crash, and nobody gets in."""

import contextlib
import dataclasses
import ssl
import subprocess
import urllib.error
import urllib.request
from typing import Any

import pytest
import yaml

from search.storage.tables import RELEASED
from tests.e2e.stack import APP_USER, ROOT, SECRETS, Engine, Stack
from tests.e2e.study import small_study, wait_until

# Never at its end while it is killed, again and again.
TRIALS = 40
STUDY = small_study(plan={"trials": TRIALS}, method={"kimg": 19.2})
OURS = ("ray-head", "ray-worker", "launcher", "dashboard", "proxy")
pytestmark = [pytest.mark.slow, pytest.mark.faults]


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    """Tests use it one after the other, as the one before left it."""
    engine = Engine.find()
    if isinstance(engine, str):
        pytest.skip(f"docker compose is not tried: {engine}")
    folder = tmp_path_factory.mktemp("studies")
    folder.chmod(0o755)
    (folder / "small.yaml").write_text(yaml.safe_dump(STUDY))
    mounted = {"volumes": [f"{folder}:/srv/bdense/studies:ro"]}
    services = dict.fromkeys(("fetch", "ray-worker", "launcher"), mounted)
    (folder / "studies.yml").write_text(yaml.safe_dump({"services": services}))
    files = (ROOT / "docker-compose.yml", folder / "studies.yml")
    stack = Stack(engine, "studies/small.yaml", files=files)
    stack.build()
    stack.down("--volumes")  # of a session that was ended before its end
    try:
        yield stack
    finally:
        stack.down("--volumes")
        engine.end()


def wait_for_training(stack: Stack) -> None:
    """In a row that is claimed from now on; those of dead workers keep what they said last."""
    now = "extract(epoch FROM now())"
    began = asked(stack, f"SELECT {now}")
    question = f"""SELECT count(*) FROM bdense_lease
        WHERE claimed > {began} AND expires > {now} AND progress LIKE 'training%'"""
    wait_until(lambda: asked(stack, question), seconds=900, what="a trial")


def wait_for_the_end(stack: Stack, status: int = 0) -> None:
    """Of the launcher."""
    wait_until(lambda: stack.launcher_status()[0] == "exited", seconds=1800, what="its end")
    assert stack.launcher_status()[1] == status, stack.logs("launcher")


def held(stack: Stack) -> float:
    """Rows that a worker holds, or held when it died."""
    return asked(stack, f"SELECT count(*) FROM bdense_lease WHERE expires <> {RELEASED}")


def asked(stack: Stack, question: str) -> float:
    """What the database answers."""
    command = ("psql", "-U", "bdense", "-d", "bdense", "--tuples-only", "--command", question)
    return float(stack.pipe("exec", "-T", "postgres", *command))


def test_a_study_survives_a_crash_and_a_restart_and_its_workers_save(stack):
    """A worker's container, then the launcher by Docker, which lets its workers save, then all."""
    stack.up()
    wait_for_training(stack)
    (worker, *_) = stack.containers("ray-worker")
    before = stack.inspect(worker)[0]["RestartCount"]
    stack.crash(worker)
    wait_until(
        lambda: stack.inspect(worker)[0]["RestartCount"] > before,
        what="the worker's container is started again",
    )
    assert held(stack) > 0
    stack.compose("stop", "launcher")
    assert stack.launcher_status() == ("exited", 130), stack.logs("launcher")
    # What the dead worker held is nobody's to give back.
    assert held(stack) <= 1
    stack.down()


def test_a_launcher_joins_the_next_head_and_stop_ends_it_for_good(stack):
    stack.up()
    wait_for_training(stack)
    stack.compose("kill", "ray-head")  # one that is back at once is not missed
    missed = "joining the cluster again"
    wait_until(lambda: missed in stack.logs("launcher"), what="the head is missed")
    stack.up()
    wait_for_training(stack)
    command = ("bdense-search", "stop", "small", "--wait")
    done = stack.compose("run", "--rm", "--no-deps", "launcher", *command)
    assert "is stopped: no trial is worked on" in done.stdout
    wait_for_the_end(stack)
    assert stack.search("status")["trials"]["complete"] < TRIALS
    (launcher,) = stack.containers("launcher")
    restarts = stack.inspect(launcher)[0]["RestartCount"]
    before, dump, files = back_up(stack)
    # Meanwhile Docker would have started it again, had it ended by an error.
    assert stack.launcher_status() == ("exited", 0)
    assert stack.inspect(launcher)[0]["RestartCount"] == restarts
    restore(stack, dump, files)
    assert stack.search("best") == before


def test_a_restored_study_ends_and_given_again_finds_nothing_to_do(stack):
    """With fewer trials: the two that were begun, and one that was not."""
    trials = stack.search("status")["trials"]["complete"] + 3
    stack.options = f"--trials {trials}"
    stack.up()
    wait_for_the_end(stack)
    answer = stack.search("best")
    states = {"planned": trials, "complete": trials, "pruned": 0, "failed": 0, "running": 0}
    assert answer["trials"] == states
    assert list(answer["baselines"]) == ["sfd", "uniform"]
    # From within the cluster the doctor sees its machines.
    doctor = stack.compose("run", "--rm", "--no-deps", "launcher", "launch.sh", "doctor", "small")
    assert f"{stack.workers} CPUs and 0 GPUs" in doctor.stdout
    stack.compose("up", "--detach", "launcher")
    wait_for_the_end(stack)
    assert "nothing is left to do" in stack.logs("launcher")


def back_up(stack: Stack) -> tuple[dict[str, Any], bytes, bytes]:
    """As docs/running.md says: what is best, the database, the runs."""
    best = stack.search("best")
    dumping = ["pg_dump", "-U", "bdense", "--format=custom", "bdense"]
    dump = stack.pipe("exec", "-T", "postgres", *dumping)
    taking = ["tar", "-C", "/srv/bdense/runs", "-cz", "."]
    return best, dump, stack.pipe("run", "--rm", "--no-deps", "-T", "launcher", *taking)


def restore(stack: Stack, dump: bytes, files: bytes) -> None:
    """Into a stack whose volumes are gone."""
    stack.down("--volumes")
    stack.compose("up", "--detach", "--wait", "postgres")
    command = ["pg_restore", "-U", "bdense", "-d", "bdense", "--no-owner", "--no-privileges"]
    stack.pipe("exec", "-T", "postgres", *command, given=dump)
    putting = ["tar", "-C", "/srv/bdense/runs", "-xz"]
    stack.pipe("run", "--rm", "--no-deps", "-T", "launcher", *putting, given=files)
    stack.compose("run", "--rm", "--no-deps", "storage-init")  # the roles' passwords


def test_tls_or_nothing(stack):
    """By a certificate of its own https; one that cannot be read ends the proxy.

    So does another address than this machine's own without TLS.
    """
    opened = dataclasses.replace(stack, bind="0.0.0.0")
    opened.put_anew("proxy")
    wait_until(
        lambda: "BIND=0.0.0.0 without TLS would send the password" in stack.logs("proxy"),
        seconds=30,
        what="the refusal of plain http",
    )
    with pytest.raises((urllib.error.URLError, ConnectionError)):
        stack.ask("/")
    for name in ("tls_certificate", "tls_key"):
        assert not (SECRETS / name).exists(), "a real certificate lies there"
    try:
        command = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
        files = ("-keyout", SECRETS / "tls_key", "-out", SECRETS / "tls_certificate")
        subprocess.run(
            ["openssl", *command, "-subj", "/CN=localhost", *files],
            check=True,
            capture_output=True,
        )
        for name in ("tls_certificate", "tls_key"):
            (SECRETS / name).chmod(0o644)
        files = (*stack.files, ROOT / "docker-compose.tls.yml")
        tls = dataclasses.replace(stack, files=files, bind="0.0.0.0")
        tls.put_anew("proxy")
        wait_until(lambda: https(stack.port) == 401, seconds=30, what="https")
        (SECRETS / "tls_key").chmod(0o600)
        tls.compose("restart", "proxy")
        wait_until(
            lambda: "the secret file tls_key is missing, empty" in stack.logs("proxy"),
            seconds=60,
            what="the refusal",
        )
        assert https(stack.port) is None
    finally:
        for name in ("tls_certificate", "tls_key"):
            (SECRETS / name).unlink(missing_ok=True)
        stack.put_anew("proxy")


def https(port: int) -> int | None:
    """What the port answers by TLS to somebody without a password; None where it does not."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with urllib.request.urlopen(f"https://127.0.0.1:{port}/", timeout=5, context=context):
            return 200
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def test_the_proxy_asks_for_a_password_and_lets_nothing_change(stack):
    password = stack.secrets()["dashboard"]

    def answers() -> bool:
        with contextlib.suppress(OSError):  # a proxy that only starts
            return stack.ask("/api/studies", password=password)[0] == 200
        return False

    wait_until(answers, what="the dashboard")
    assert stack.ask("/api/studies")[0] == 401
    assert stack.ask("/api/studies", password="wrong")[0] == 401
    assert stack.ask("/api/studies", password=password, user="admin")[0] == 401
    assert b"small.baselines" in stack.ask("/api/studies", password=password)[1]
    for method, path in (
        ("DELETE", "/api/studies/1"),
        ("POST", "/api/studies/1/rename"),
        ("PUT", "/api/studies/1/note"),
        ("POST", "/api/trials/1/tell"),
    ):
        assert stack.ask(path, method=method, password=password)[0] == 403
    for path in ("/", "/metrics", "/alive", "/static/", "/artifacts/1/1/x"):
        assert stack.ask(path)[0] == 401


def test_no_port_but_the_proxys_is_published(stack):
    for described in stack.inspect(*stack.containers()):
        service = described["Config"]["Labels"]["com.docker.compose.service"]
        published = {
            (port, each["HostIp"], each["HostPort"])
            for port, bindings in (described["NetworkSettings"]["Ports"] or {}).items()
            for each in bindings or ()
        }
        mine = {("8080/tcp", "127.0.0.1", str(stack.port))} if service == "proxy" else set()
        assert published == mine, service
        networks = {
            name.removeprefix(f"{stack.project}_")
            for name in described["NetworkSettings"]["Networks"]
        }
        outside = {"proxy": {"internal", "edge"}, "fetch": {"edge"}}
        assert networks == outside.get(service, {"internal"}), service
    networks = stack.inspect(f"{stack.project}_internal")
    assert [network["Internal"] for network in networks] == [True]


REACH = """
import socket, sys
for host, port in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        socket.create_connection((host, int(port)), 3).close()
        print(host, "answers")
    except OSError as error:
        print(host, error)
"""


def test_from_the_outer_network_neither_database_nor_ray_answers(stack):
    ports = {"postgres": "5432", "ray-head": "6379"}
    for service in list(ports):
        (described,) = stack.inspect(*stack.containers(service))
        address = described["NetworkSettings"]["Networks"][f"{stack.project}_internal"]
        ports[address["IPAddress"]] = ports[service]
    asked = [text for pair in ports.items() for text in pair]
    for network, expected in (("internal", len(ports)), ("edge", 0)):
        done = stack.docker(
            *("run", "--rm", "--network", f"{stack.project}_{network}"),
            *(f"{stack.project}-service", "python", "-c", REACH, *asked),
        )
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) == len(ports)
        assert done.stdout.count("answers") == expected, (network, done.stdout)


def test_ray_refuses_whoever_has_no_token(stack):
    ask = "ray status --address ray-head:6379 2>&1; echo status $?;"
    wrong = f"export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=wrong; {ask}"
    run = ("run", "--rm", "--no-deps")
    done = stack.compose(*run, "--entrypoint", "sh", "launcher", "-c", f"{ask} {wrong}")
    assert done.stdout.count("Unauthenticated") >= 2, done.stdout
    assert "status 0" not in done.stdout
    known = stack.compose(*run, "launcher", "ray", "status", "--address", "ray-head:6379")
    assert "node_" in known.stdout


def test_processes_have_no_rights(stack):
    for service in OURS:
        for container in stack.containers(service):
            described = stack.inspect(container)[0]
            host = described["HostConfig"]
            assert host["CapDrop"] == ["ALL"], service
            assert host["ReadonlyRootfs"] is True, service
            assert "no-new-privileges:true" in host["SecurityOpt"], service
            if described["State"]["Running"]:
                done = stack.docker("exec", container, "id", "-u")
                assert done.stdout.strip() == APP_USER, service


def secrets_in_image(stack: Stack, image: str) -> str:
    """Files that hold a secret, found by its own words; one that is put there is."""
    pattern = "|".join(stack.secrets().values())
    planted = next(iter(stack.secrets().values()))
    search = f"echo {planted} > /tmp/planted; exec grep -rIlEs '{pattern}' "
    search += "/srv /etc /usr/local /home /root /tmp /var /opt"
    found = stack.docker("run", "--rm", "--user", "0", "--entrypoint", "sh", image, "-c", search)
    files = found.stdout.split()
    assert "/tmp/planted" in files, found.stderr
    return " ".join(file for file in files if file != "/tmp/planted")


def test_no_secret_is_in_a_description_an_image_a_process_list_or_a_log(stack):
    containers = stack.containers()
    seen = stack.docker("inspect", *containers).stdout + stack.logs()
    for container in containers:
        seen += stack.docker("top", container, "-eo", "args").stdout
    for image in (f"{stack.project}-{kind}" for kind in ("service", "engine", "proxy")):
        seen += stack.docker("history", "--no-trunc", image).stdout
        seen += stack.docker("inspect", image).stdout
        assert secrets_in_image(stack, image) == ""
    assert "gunicorn" in seen
    assert "tables are there" in seen
    dumped = stack.compose("exec", "-T", "postgres", "pg_dumpall", "-U", "bdense").stdout
    assert "small.baselines" in dumped
    leaked = [name for name, secret in stack.secrets().items() if secret in seen + dumped]
    assert leaked == []
