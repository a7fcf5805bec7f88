"""docker compose for real: a study over two workers survives a crash, and nobody gets in."""

import dataclasses
import ssl
import subprocess
import time
import urllib.error
import urllib.request

import pytest
import yaml

from search.storage.leases import RELEASED
from tests.e2e.stack import APP_USER, ROOT, SECRETS, Engine, Stack
from tests.e2e.study import small_study, wait_until

TRIALS = 4
# Long enough to be killed in.
STUDY = small_study(plan={"trials": TRIALS}, method={"kimg": 38.4})
OURS = ("ray-head", "ray-worker", "launcher", "dashboard", "proxy")
pytestmark = [pytest.mark.slow, pytest.mark.faults]


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
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
    stack = Stack(engine, "studies/small.yaml", options=f"--trials {TRIALS}", files=files)
    stack.build()
    stack.down("--volumes")  # of a session that was ended before its end
    try:
        yield stack
    finally:
        stack.down("--volumes")
        engine.end()


def ended(stack: Stack) -> bool:
    return stack.launcher_status()[0] == "exited"


def wait_for_training(stack: Stack, seconds: float = 300) -> None:
    wait_until(
        lambda: "running: training" in stack.logs("launcher"), seconds=seconds, what="a trial"
    )


def held(stack: Stack) -> int:
    """Rows that a worker holds, or held when it died."""
    question = f"SELECT count(*) FROM bdense_lease WHERE expires <> {RELEASED}"
    return int(stack.pipe("exec", "-T", "postgres", *psql(question)))


def psql(question: str) -> list[str]:
    return ["psql", "-U", "bdense", "-d", "bdense", "--tuples-only", "--command", question]


def test_a_study_survives_crashes_and_a_restart(stack):
    """A worker's container, then everything, then Ray's head; the launcher joins the next one."""
    stack.up()
    wait_for_training(stack, seconds=900)
    (worker, *_) = stack.containers("ray-worker")
    before = stack.inspect(worker)[0]["RestartCount"]
    stack.crash(worker)
    wait_until(
        lambda: stack.inspect(worker)[0]["RestartCount"] > before,
        seconds=60,
        what="the worker's container is started again",
    )
    time.sleep(5)
    stack.down()
    stack.up()
    wait_for_training(stack)
    stack.compose("kill", "ray-head")  # one that is back at once is not missed
    wait_until(
        lambda: "joining the cluster again" in stack.logs("launcher"),
        seconds=120,
        what="the launcher misses the head",
    )
    stack.up()
    wait_until(lambda: ended(stack), seconds=900, what="the end of the study")
    assert stack.launcher_status() == ("exited", 0), stack.logs("launcher")
    answer = stack.search("best")
    assert answer["trials"] == {
        "planned": TRIALS,
        "complete": TRIALS,
        "pruned": 0,
        "failed": 0,
        "running": 0,
    }
    assert list(answer["baselines"]) == ["sfd", "uniform"]
    # From within the cluster the doctor sees its machines.
    doctor = stack.compose("run", "--rm", "--no-deps", "launcher", "launch.sh", "doctor", "small")
    assert f"{stack.workers} CPUs and 0 GPUs" in doctor.stdout
    # Given again it finds nothing to do.
    stack.compose("up", "--detach", "launcher")
    wait_until(lambda: ended(stack), seconds=120, what="the end of a launch without work")
    assert stack.launcher_status() == ("exited", 0)
    assert "nothing is left to do" in stack.logs("launcher")


def test_a_launcher_that_docker_stops_lets_its_workers_save(stack):
    stack.options = f"--trials {TRIALS + 2}"
    stack.up()
    wait_for_training(stack)
    assert held(stack) > 0
    stack.compose("stop", "launcher")
    assert stack.launcher_status() == ("exited", 130), stack.logs("launcher")
    assert held(stack) == 0


def test_stop_ends_the_launcher_for_good_and_up_carries_on(stack):
    stack.options = f"--trials {TRIALS + 2}"
    stack.compose("rm", "--force", "launcher")  # and its log
    stack.up()
    wait_for_training(stack)
    command = ("bdense-search", "stop", "small", "--wait")
    done = stack.compose("run", "--rm", "--no-deps", "launcher", *command)
    assert "is stopped: no trial is worked on" in done.stdout
    wait_until(lambda: ended(stack), seconds=60, what="the launcher's end")
    time.sleep(15)
    assert stack.launcher_status() == ("exited", 0)
    assert stack.search("status")["trials"]["complete"] < TRIALS + 2
    backup_and_restore(stack)
    stack.up()
    wait_until(lambda: ended(stack), seconds=600, what="the end of the study")
    assert stack.launcher_status() == ("exited", 0)
    assert stack.search("status")["trials"]["complete"] == TRIALS + 2


def backup_and_restore(stack: Stack) -> None:
    """As docs/running.md says, into a stack whose volumes are gone."""
    before = stack.search("best")
    exec_, run = ("exec", "-T", "postgres"), ("run", "--rm", "--no-deps", "-T", "launcher")
    dump = stack.pipe(*exec_, *["pg_dump", "-U", "bdense", "--format=custom", "bdense"])
    files = stack.pipe(*run, *["tar", "-C", "/srv/bdense/runs", "-cz", "."])
    stack.down("--volumes")
    stack.compose("up", "--detach", "--wait", "postgres")
    restore = ["pg_restore", "-U", "bdense", "-d", "bdense", "--no-owner", "--no-privileges"]
    stack.pipe(*exec_, *restore, given=dump)
    stack.pipe(*run, *["tar", "-C", "/srv/bdense/runs", "-xz"], given=files)
    stack.compose("up", "--detach", "storage-init")
    wait_until(lambda: stack.search("best") == before, seconds=60, what="the roles")


def test_tls_or_nothing(stack):
    """By a certificate of its own https; one that cannot be read ends the proxy.

    So does another address than this machine's own without TLS.
    """
    opened = dataclasses.replace(stack, bind="0.0.0.0")
    opened.compose("up", "--detach", "--no-deps", "--force-recreate", "proxy")
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
        tls.compose("up", "--detach", "--no-deps", "--force-recreate", "proxy")
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
        stack.compose("up", "--detach", "--no-deps", "--force-recreate", "proxy")


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
    stack.up()
    password = stack.secrets()["dashboard"]
    wait_until(
        lambda: stack.ask("/api/studies", password=password)[0] == 200,
        seconds=60,
        what="the dashboard",
    )
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
    stack.up()
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


def test_from_the_outer_network_neither_database_nor_ray_answers(stack):
    stack.up()
    addresses = {
        service: described["NetworkSettings"]["Networks"][f"{stack.project}_internal"]["IPAddress"]
        for service in ("postgres", "ray-head")
        for described in stack.inspect(*stack.containers(service))
    }
    program = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 3)"
    image = f"{stack.project}-service"
    for network, reached in (("internal", True), ("edge", False)):
        for service, port in (("postgres", 5432), ("ray-head", 6379)):
            for host in (service, addresses[service]):
                done = stack.docker(
                    *("run", "--rm", "--network", f"{stack.project}_{network}", image),
                    *("python", "-c", program, host, str(port)),
                )
                assert (done.returncode == 0) is reached, (network, service, host, done.stderr)


def test_ray_refuses_whoever_has_no_token(stack):
    stack.up()
    for given in ("", "RAY_AUTH_MODE=token RAY_AUTH_TOKEN=wrong"):
        done = stack.compose(
            *("run", "--rm", "--no-deps", "--entrypoint", "sh", "launcher", "-c"),
            f"{given} ray status --address ray-head:6379",
            check=False,
        )
        assert done.returncode != 0
        assert "Unauthenticated" in done.stdout + done.stderr, done.stdout + done.stderr
    done = stack.compose(
        *("run", "--rm", "--no-deps", "launcher", "ray", "status", "--address", "ray-head:6379")
    )
    assert "node_" in done.stdout


def test_processes_have_no_rights(stack):
    stack.up()
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
    stack.up()
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
