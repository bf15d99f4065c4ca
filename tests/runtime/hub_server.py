"""A stand-in for the Hugging Face hub: the few endpoints that its own client asks when a folder goes up and comes down.

All files are "regular" to it, so they come in the commit itself. It knows three tokens: "writes" may write everywhere,
"reads" nowhere, any other is unknown.
"""

import base64
import hashlib
import json
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

import yaml


class Hub:
    """repositories: id -> {revision or commit: {path: bytes}}; heads: (id, branch) -> commit."""

    def __init__(self, address):
        self.address, self.repositories, self.heads, self.created = address, {}, {}, {}

    def files(self, name, revision="main"):
        return self.repositories[name][self.heads.get((name, revision), revision)]

    def commit(self, name, branch, changes):
        """changes: path -> bytes, or None for a file that goes."""
        files = {**self.files(name, branch), **changes}
        files = {path: data for path, data in files.items() if data is not None}
        oid = hashlib.sha1(repr((len(self.repositories[name]), sorted(files.items()))).encode()).hexdigest()
        self.repositories[name][oid] = files
        self.heads[name, branch] = oid
        return oid


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_args):
        pass

    def _send(self, status, body=b"", **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _refused(self):
        """Whether the token may not write, after an answer that says so."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token == "writes":
            return False
        status, words = (403, "You don't have the rights") if token == "reads" else (401, "Invalid credentials")
        self._send(status, {"error": words}, X_Error_Message=words)
        return True

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if self._refused():
            return None
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            known = name in self.hub.repositories
            if not known:
                self.hub.created[name] = asked
                self.hub.repositories[name] = {"": {}}
                self.hub.heads[name, "main"] = ""
            return self._send(409 if known else 200, {"url": f"{self.hub.address}/{name}", "name": name})
        name, what, branch = re.fullmatch(r"/api/models/(\w+/[\w-]+)/(\w+)/(.+)", path).groups()
        if what == "branch":
            self.hub.heads.setdefault((name, branch), self.hub.heads[name, "main"])
            return self._send(200, {})
        if what == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self._send(200, {"files": files})
        changes = {}
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                changes[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                changes[line["value"]["path"]] = None
        oid = self.hub.commit(name, branch, changes)
        url = f"{self.hub.address}/{name}/commit/{oid}"
        return self._send(200, {"commitUrl": url, "commitOid": oid, "success": True})

    def _validate(self, content):
        found = re.match(r"---\n(.*?)\n---\n", content, re.S)
        try:
            yaml.safe_load(found[1] if found else "")
            return self._send(200, {"errors": [], "warnings": []})
        except yaml.YAMLError:
            return self._send(400, {"errors": [{"message": "not YAML"}], "warnings": []})

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        asked = re.fullmatch(r"/api/models/(\w+/[\w-]+)(?:/(\w+)/([^/]+))?(?:/.*)?", path)
        fetched = re.fullmatch(r"/(\w+/[\w-]+)/resolve/([^/]+)/(.+)", path)
        name, revision = (asked[1], asked[3]) if asked else (fetched[1], fetched[2]) if fetched else ("", "")
        revision = revision or "main"
        if name not in self.hub.repositories:
            return self._send(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        oid = self.hub.heads.get((name, revision), revision)
        files = self.hub.repositories[name].get(oid)
        if files is None:
            return self._send(404, {"error": "no such revision"}, X_Error_Code="RevisionNotFound")
        if fetched:
            data = files.get(fetched[3])
            if data is None:
                return self._send(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
            return self._send(200, data, X_Repo_Commit=oid, ETag=f'"{hashlib.sha1(data).hexdigest()}"')
        if asked[2] == "tree":
            rows = [
                {"type": "file", "path": p, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for p, data in files.items()
            ]
            return self._send(200, rows)
        return self._send(200, {"id": name, "sha": oid, "siblings": [{"rfilename": p} for p in files], "tags": []})

    do_HEAD = do_GET


@contextmanager
def serving():
    """A Hub that answers on this machine's loopback."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    server.RequestHandlerClass = type("Handler", (_Handler,), {"hub": hub})
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
