"""As much of the Hugging Face hub as its clients ask for to read flat repositories of one revision: folders below a root.

ROOT/datasets/OWNER/NAME/*, ROOT/models/OWNER/NAME/*
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILE = re.compile(r"/(?P<kind>datasets/)?(?P<id>[^/]+/[^/]+)/resolve/[^/]+/(?P<name>.+)")
API = re.compile(r"/api/(?P<kind>datasets|models)/(?P<id>[^/]+/[^/]+)(/(?P<what>revision|tree)/[^/]+(?P<below>/.+)?)?")


class Handler(BaseHTTPRequestHandler):
    def __init__(self, *arguments: Any, root: Path):
        self.root = root
        super().__init__(*arguments)

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        found = API.fullmatch(path) or FILE.fullmatch(path)
        folder = self.root / (found["kind"] or "models").rstrip("/") / found["id"] if found else None
        if not found or not folder or not folder.is_dir():
            # 401: a stranger may not learn whether a private repository has the name.
            self._send(b"", 401, "RepoNotFound")
        elif found.re is API:
            files = [{"type": "file", "path": file.name, "size": file.stat().st_size, "oid": COMMIT} for file in sorted(folder.iterdir())]
            about = {"id": found["id"], "sha": COMMIT, "siblings": [{"rfilename": file["path"]} for file in files]}
            tree = [] if found["below"] else files
            self._send(json.dumps(tree if found["what"] == "tree" else about).encode())
        elif (file := folder / found["name"]).is_file():
            self._send(file.read_bytes())
        else:
            self._send(b"", 404, "EntryNotFound")

    do_HEAD = do_GET

    def _send(self, content: bytes, status: int = 200, error: str = "") -> None:
        self.send_response(status)
        own = {"Content-Length": str(len(content)), "ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        for key, value in (own | ({"X-Error-Code": error} if error else {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Says nothing."""


@contextmanager
def serving(root: Path) -> Iterator[str]:
    """The address of a hub of the repositories below `root`."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, root=root)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
