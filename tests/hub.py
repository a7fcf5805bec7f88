"""A local server that speaks what huggingface_hub's client needs of the Hub."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

TOKEN = "hf_aSecretOfTheTests"
SHA = "1" * 40


class Hub(ThreadingHTTPServer):
    """``files``: of each repository, name to bytes. Reads need no token, writes need ``TOKEN``.

    ``full``: whether it takes no more files.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.full = False
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def say(self, found: object, status: int = 200, **headers: str) -> None:
        self.answer(json.dumps(found).encode(), status, Content_Type="application/json", **headers)

    @property
    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def no_repo(self) -> None:
        self.say({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = urlsplit(self.path).path.strip("/").split("/")
        if parts == ["api", "whoami-v2"]:
            self.say({"name": "me", "type": "user"}, 200 if self.known else 401)
            return
        of_api = parts[:2] == ["api", "models"]
        repo = "/".join(parts[2:4] if of_api else parts[:2])
        files = self.server.files.get(repo)
        if files is None:
            self.no_repo()
        elif of_api and "tree" in parts:
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": _oid(content)}
                for name, content in files.items()
            ]
            self.say(entries)
        elif of_api:
            siblings = [{"rfilename": name} for name in files]
            self.say({"_id": "1", "id": repo, "sha": SHA, "siblings": siblings, "tags": []})
        else:
            content = files["/".join(parts[4:])]
            self.answer(content, ETag=f'"{_oid(content)}"', X_Repo_Commit=SHA)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path).path.strip("/").split("/")
        if parts[-1] == "validate-yaml":
            self.say({"errors": [], "warnings": []})
        elif not self.known:
            self.say({"error": "refused"}, 401)
        elif parts[-2:] == ["repos", "create"]:
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.server.files.setdefault(repo, {".gitattributes": b""})
            self.say({"url": f"{self.server.url}/{repo}"})
        elif self.server.full:
            self.say({"error": "no space is left"}, 403)
        elif "preupload" in parts:
            paths = [each["path"] for each in json.loads(body)["files"]]
            regular = {"uploadMode": "regular", "shouldIgnore": False}
            self.say({"files": [{"path": path, **regular} for path in paths]})
        else:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.server.files["/".join(parts[2:4])][entry["value"]["path"]] = content
            place = f"{self.server.url}/{'/'.join(parts[2:4])}/commit/{SHA}"
            self.say({"success": True, "commitOid": SHA, "commitUrl": place})


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
