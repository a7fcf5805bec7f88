"""Downloads, from a server in this process that can do what real ones do to a transfer."""

import errno
import hashlib
import http.server
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from bdense.downloads import fetch
from bdense.errors import InputError
from tests.disks import small_disk

CONTENT = bytes(range(256)) * 4096  # 1 MiB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Server:
    """What it serves, how it misbehaves, and what it was asked for."""

    content: bytes = CONTENT
    tag: str | None = '"1"'
    ranges: bool = True
    status: int = 200
    length: bool = True
    stop_after: list[int] = field(default_factory=list)  # bytes of the answers to come
    asked: list[str | None] = field(default_factory=list)  # Range of each request
    url: str = ""

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        asked = handler.headers.get("Range")
        self.asked.append(asked)
        body, status = self.content, self.status
        first = 0
        if asked and self.ranges and handler.headers.get("If-Range") == self.tag:
            first = int(asked.removeprefix("bytes=").rstrip("-"))
            body, status = self.content[first:], 206 if first < len(self.content) else 416
        handler.send_response(status)
        if self.length:
            handler.send_header("Content-Length", str(len(body)))
        if self.tag:
            handler.send_header("ETag", self.tag)
        if not self.ranges:
            handler.send_header("Accept-Ranges", "none")
        if status == 206:
            last = len(self.content) - 1
            handler.send_header("Content-Range", f"bytes {first}-{last}/{len(self.content)}")
        handler.end_headers()
        handler.wfile.write(body[: self.stop_after.pop(0)] if self.stop_after else body)


@pytest.fixture
def server() -> Iterator[Server]:
    serving = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            serving.answer(self)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        serving.url = f"http://127.0.0.1:{running.server_port}/net.pkl"
        threading.Thread(target=running.serve_forever, args=(0.01,)).start()
        yield serving
        running.shutdown()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "net.pkl"


def left(path: Path) -> set[str]:
    """Files beside ``path``, the lock apart."""
    return {file.name for file in path.parent.iterdir()} - {f".{path.name}.lock"}


def refusal(server: Server, path: Path, **pins: object) -> str:
    with pytest.raises(InputError) as caught:
        fetch(server.url, path, what="the test net", **pins)
    (line,) = str(caught.value).splitlines()
    assert f"fetch {server.url} by hand and put it at {path}" in line
    assert "the test net" in line
    return line


def test_a_file_is_fetched_once_with_a_bar_on_stderr(server, path, capsys):
    for _ in range(2):
        assert fetch(server.url, path, what="the test net", sha256=SHA256, size=1 << 20) == path
    assert path.read_bytes() == CONTENT
    assert server.asked == [None]
    assert left(path) == {"net.pkl"}
    out, err = capsys.readouterr()
    assert out == ""
    assert "the test net: 100%" in err


def test_what_an_earlier_call_left_is_carried_on_with(server, path):
    server.stop_after = [300_000, 0, 0]
    line = refusal(server, path)
    assert "300000 of 1048576 bytes" in line
    assert left(path) == {"net.pkl.partial", "net.pkl.partial.version"}
    server.stop_after, server.asked = [], []
    fetch(server.url, path, what="the test net", sha256=SHA256)
    assert server.asked == ["bytes=300000-"]
    assert path.read_bytes() == CONTENT
    assert left(path) == {"net.pkl"}


def test_a_connection_that_breaks_is_taken_up_in_the_same_call(server, path):
    server.stop_after = [100, 5000, 700_000]
    fetch(server.url, path, what="the test net")
    assert path.read_bytes() == CONTENT
    assert server.asked == [None, "bytes=100-", "bytes=5100-", "bytes=705100-"]


def test_another_version_on_the_server_starts_over(server, path):
    server.stop_after = [300_000, 0]
    refusal(server, path)
    server.content, server.tag = CONTENT[::-1], '"2"'
    fetch(server.url, path, what="the test net")
    assert path.read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("tag", ['"1"', None])
def test_a_server_without_ranges_or_versions_starts_over(server, path, tag):
    server.ranges, server.tag = False, tag
    server.stop_after = [300_000, 0]
    refusal(server, path)
    fetch(server.url, path, what="the test net", sha256=SHA256)
    assert path.read_bytes() == CONTENT
    assert set(server.asked) == {None}


def test_a_partial_file_that_is_whole_or_too_long_starts_over(server, path):
    path.parent.mkdir()
    path.with_name("net.pkl.partial").write_bytes(CONTENT + b"more")
    path.with_name("net.pkl.partial.version").write_text('"1"')
    fetch(server.url, path, what="the test net", sha256=SHA256)
    assert path.read_bytes() == CONTENT
    assert server.asked == [f"bytes={len(CONTENT) + 4}-", None]


def test_an_answer_without_its_length_is_taken_as_it_is(server, path):
    server.length = False
    fetch(server.url, path, what="the test net", size=1 << 20)
    assert path.read_bytes() == CONTENT


def test_another_file_than_expected_leaves_nothing(server, path):
    line = refusal(server, path, sha256="0" * 64)
    assert f"its sha256 is {SHA256}, not {'0' * 64}" in line
    # The size is known before the transfer.
    server.stop_after = [0]
    assert "it has 1048576 bytes, not 7" in refusal(server, path, size=7)
    assert left(path) == set()


def test_a_file_that_lies_there_is_checked_and_left_alone(server, path):
    path.parent.mkdir()
    path.write_bytes(b"mine")
    assert "it has 4 bytes, not 1048576; delete it" in refusal(server, path, size=1 << 20)
    assert "its sha256 is " in refusal(server, path, sha256=SHA256)
    assert path.read_bytes() == b"mine"
    assert server.asked == []
    assert fetch(server.url, path, what="the test net") == path


def test_a_missing_page_is_one_line(server, path):
    server.status = 404
    assert "cannot download the test net (the server answered 404 Not Found)" in refusal(
        server, path
    )
    assert len(server.asked) == 1


def test_a_full_disk_is_what_it_is_and_what_came_is_kept(server, path):
    """A file fetched by hand would not fit there either."""
    with small_disk(path.parent, 512) as disk:
        with pytest.raises(OSError, match="No space left on device for the test net") as caught:
            fetch(server.url, path, what="the test net")
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
        disk.resize(4096)
        assert fetch(server.url, path, what="the test net", sha256=SHA256) == path
        assert len(server.asked) == 2
        assert server.asked[1].startswith("bytes=")


def test_a_host_that_is_not_there_is_one_line(server, path):
    server.url = "http://host.invalid/net.pkl"
    assert "host cannot be found" in refusal(server, path)
    server.url = "http://127.0.0.1:9/net.pkl"
    assert "(Connection refused)" in refusal(server, path)


def test_the_proxy_is_the_one_that_is_set_now(server, path, monkeypatch):
    """Whatever was set when the process fetched its first file."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert "(Connection refused)" in refusal(server, path)
    monkeypatch.delenv("http_proxy")
    assert fetch(server.url, path, what="the test net").read_bytes() == CONTENT


def test_two_at_once_fetch_once(server, path):
    threads = [
        threading.Thread(target=fetch, args=(server.url, path), kwargs={"what": "the test net"})
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() == CONTENT
    assert server.asked == [None]
