"""A small hub on loopback: the few addresses of the Hugging Face Hub that its library uses, and what can go wrong.

GET /api/models/OWNER/NAME[/revision/REVISION]     commit and files, with sizes and hashes
HEAD, GET /OWNER/NAME/resolve/REVISION/FILE        a file, also from a byte on
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT, OTHER = "a" * 40, "b" * 40
LARGE = 1000  # bytes from which a file is kept by git-lfs


class Hub(ThreadingHTTPServer):
    """Serves folders as repositories.

    repositories: by name, the folder of each revision.
    requests: method and path of all that was asked.
    head: the commit of branches.
    cuts: how often the connection breaks in the middle of a file of this name.
    lies: how often such a file comes with other bytes than its hash says.
    short: how often such a file comes shorter than the hub has said.
    token: without it every repository is refused.
    stalls: the name of a file of which half is sent, then nothing until `released`; `stalled` says that it is so.
    xet: the address that the hub names for large files, in place of its own; "" for none.
    gated, down: every request is answered with 403, with 500.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, Path]] = {}
        self.requests: list[tuple[str, str]] = []
        self.cuts, self.lies, self.short = {}, {}, {}
        self.head = COMMIT
        self.token, self.xet, self.gated, self.down = "", "", False, False
        self.stalls, self.stalled, self.released = "", threading.Event(), threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        pass  # a client that has gone

    def files(self, repository: str) -> list[str]:
        """Names of the files that were sent."""
        start = f"/{repository}/resolve/"
        return [path.rpartition("/")[2] for method, path in self.requests if method == "GET" and path.startswith(start)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def refuse(self, status: int, code: str) -> None:
        self.send(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def answer(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path))
        parts = path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        owner, name, *rest = parts[2:] if api else parts
        revisions = hub.repositories.get(f"{owner}/{name}")
        if parts == ["api", "xet"]:
            ends = {"X-Xet-Cas-Url": hub.xet, "X-Xet-Access-Token": "any", "X-Xet-Token-Expiration": "9999999999"}
            return self.send(200, b"", ends)
        if hub.down:
            return self.refuse(500, "Down")
        if hub.gated:
            return self.refuse(403, "GatedRepo")
        if revisions is None or (hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}"):
            return self.refuse(401, "RepoNotFound")
        revision = rest[1] if len(rest) > 1 else "main"
        folder = revisions.get(revision)
        if folder is None:
            return self.refuse(404, "RevisionNotFound")
        commit = revision if len(revision) == 40 else hub.head
        if api:
            content = {"id": f"{owner}/{name}", "sha": commit, "siblings": [describe(f) for f in walk(folder)]}
            return self.send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})
        return self.send_file(folder / rest[2], commit)

    def send_file(self, path: Path, commit: str) -> None:
        if not path.is_file():
            return self.refuse(404, "EntryNotFound")
        content, hub = path.read_bytes(), self.server
        said = describe(path)
        tag = said["lfs"]["sha256"] if said.get("lfs") else said["blobId"]
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if hub.xet and said.get("lfs"):
            headers |= {"X-Xet-Hash": said["lfs"]["sha256"], "X-Xet-Refresh-Route": f"{hub.url}/api/xet"}
        if self.command == "GET" and hub.lies.get(path.name, 0) > 0:
            hub.lies[path.name] -= 1
            content = content[:-1] + bytes([content[-1] ^ 1])
        if self.command == "GET" and hub.short.get(path.name, 0) > 0:
            hub.short[path.name] -= 1
            content = content[:-1]
        status, start = 200, self.headers.get("Range", "")
        if start.startswith("bytes="):
            first = int(start.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            status, content = 206, content[first:]
        if self.command == "GET" and hub.cuts.get(path.name, 0) > 0:
            hub.cuts[path.name] -= 1
            headers["Content-Length"] = str(len(content))
            content = content[: len(content) // 2]
            self.close_connection = True
        if self.command == "GET" and path.name == hub.stalls:
            self.send(status, content[: len(content) // 2], headers | {"Content-Length": str(len(content))})
            self.wfile.flush()
            hub.stalled.set()
            hub.released.wait(60)
            self.close_connection = True
            return None
        return self.send(status, content, headers)


def walk(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def describe(path: Path) -> dict:
    """A file as the hub's API tells of it."""
    content = path.read_bytes()
    said = {"rfilename": path.name, "size": len(content)}
    said["blobId"] = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    if len(content) >= LARGE:
        said["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 100}
    return said
