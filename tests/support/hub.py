"""A Hub on the loopback address: what huggingface_hub asks of a server for model repositories, and no more.

Files stand in memory. It speaks as the real one does to `huggingface_hub` 0.30 to 2.x: files at a revision, with their
commit and ETag; what a repository has; commits of files, weights sent as large ones (LFS), and of deletions; tags.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Optional
from urllib.parse import unquote, urlsplit


class Hub:
    """Model repositories, each a list of commits, served at `url` until the process ends.

    Attributes:
        requests (`list[str]`): "METHOD /path" of every request, in order.
        url (`str`): what `HF_ENDPOINT` must be.
    """

    def __init__(self):
        self.repositories: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.tags: dict[str, dict[str, str]] = {}  # by repository, the commit of each
        self.large: dict[str, bytes] = {}  # what was sent of large files, by SHA-256
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def commit(self, repo: str, files: dict[str, bytes], deleted: Iterable[str] = ()) -> str:
        """Commit `files` over those that `repo` has, making it if need be; returns the commit's hash."""
        commits = self.repositories.setdefault(repo, [])
        files = {**(commits[-1][1] if commits else {}), **files}
        files = {path: content for path, content in files.items() if path not in {*deleted}}
        commits.append((hashlib.sha1(repr((len(commits), sorted(files.items()))).encode()).hexdigest(), files))
        return commits[-1][0]

    def commit_folder(self, repo: str, folder: Path, inside: str = "") -> str:
        """Commit the files of `folder`, as a folder `inside` of the repository if named."""
        paths = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        return self.commit(
            repo, {(Path(inside) / path.relative_to(folder)).as_posix(): path.read_bytes() for path in paths}
        )

    def at(self, repo: str, revision: str) -> Optional[tuple[str, dict[str, bytes]]]:
        """The commit hash and files of `repo` at `revision`, a hash, a tag or "main"."""
        commits = self.repositories.get(repo, [])
        if commits == [] and repo in self.repositories:  # made, and nothing committed yet
            commits = [("0" * 40, {})]
        revision = self.tags.get(repo, {}).get(revision, revision)
        return next((commit for commit in reversed(commits) if revision in ("main", commit[0])), None)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def answer(self, status: int = 200, body: "bytes | dict | list" = b"", **headers) -> None:
        if not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, what: str) -> None:
        self.answer(404, {"error": what}, X_Error_Code=what, X_Error_Message=what)

    def do_HEAD(self) -> None:
        self.serve()

    def do_GET(self) -> None:
        self.serve()

    def do_POST(self) -> None:
        self.serve()

    def do_PUT(self) -> None:
        self.serve()

    def serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repo, verb, rest = "/".join(parts[2:4]), (parts[4:5] or ["revision"])[0], parts[5:]
        elif parts[2:3] == ["resolve"]:
            repo, verb, rest = "/".join(parts[:2]), "resolve", parts[3:]
        elif path == "/api/repos/create":
            asked = json.loads(body)
            repo = "/".join(filter(None, [asked.get("organization"), asked["name"]]))
            self.hub.repositories.setdefault(repo, [])
            return self.answer(body={"url": f"{self.hub.url}/{repo}"})
        elif path == "/api/validate-yaml":
            return self.answer(body={"errors": [], "warnings": []})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            actions = [{"upload": {"href": f"{self.hub.url}/large/{each['oid']}"}} for each in objects]
            return self.answer(body={"objects": [{**each, "actions": to} for each, to in zip(objects, actions)]})
        elif self.command == "PUT" and parts[0] == "large":
            self.hub.large[parts[1]] = body
            return self.answer()
        else:
            return self.missing("RepoNotFound")
        found = self.hub.at(repo, rest[0] if rest else "main")
        if found is None:
            return self.missing("RevisionNotFound" if repo in self.hub.repositories else "RepoNotFound")
        getattr(self, verb)(repo, *found, rest[1:], body)

    def resolve(self, repo: str, sha: str, files: dict[str, bytes], path: list[str], body: bytes) -> None:
        content = files.get("/".join(path))
        if content is None:
            return self.missing("EntryNotFound")
        self.answer(body=content, X_Repo_Commit=sha, ETag=f'"{hashlib.sha1(content).hexdigest()}"')

    def revision(self, repo: str, sha: str, files: dict[str, bytes], path: list[str], body: bytes) -> None:
        self.answer(body={"id": repo, "sha": sha, "tags": [], "siblings": [{"rfilename": name} for name in files]})

    def refs(self, repo: str, sha: str, files: dict[str, bytes], path: list[str], body: bytes) -> None:
        tags = [
            {"name": name, "ref": f"refs/tags/{name}", "targetCommit": commit}
            for name, commit in self.hub.tags.get(repo, {}).items()
        ]
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": sha}
        self.answer(body={"branches": [main], "converts": [], "tags": tags})

    def tag(self, repo: str, sha: str, files: dict[str, bytes], path: list[str], body: bytes) -> None:
        tags, name = self.hub.tags.setdefault(repo, {}), json.loads(body)["tag"]
        if name in tags:
            return self.answer(409, {"error": f"{name} exists"})
        tags[name] = sha
        self.answer(body={})

    def tree(self, repo: str, sha: str, files: dict[str, bytes], path: list[str], body: bytes) -> None:
        inside = {name: content for name, content in files.items() if name.startswith("/".join(path))}
        if path and not inside:
            return self.missing("EntryNotFound")
        entries = [{"type": "file", "path": name, **_digests(name, content)} for name, content in inside.items()]
        self.answer(body=entries)

    def preupload(self, repo: str, sha: str, files: dict[str, bytes], path: list[str], body: bytes) -> None:
        names = [file["path"] for file in json.loads(body)["files"]]
        modes = ["lfs" if _is_large(name) else "regular" for name in names]
        modes = [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in zip(names, modes)]
        self.answer(body={"files": modes, "commitOid": sha})

    def commit(self, repo: str, sha: str, files: dict[str, bytes], path: list[str], body: bytes) -> None:
        added, deleted = {}, []
        for operation in map(json.loads, body.splitlines()):
            key, value = operation["key"], operation["value"]
            if key == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                added[value["path"]] = self.hub.large[value["oid"]]
            elif key == "deletedFile":
                deleted.append(value["path"])
        sha = self.hub.commit(repo, added, deleted)
        self.answer(body={"commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "success": True})


def _is_large(name: str) -> bool:
    """Whether the Hub keeps a file apart, and git a pointer to it."""
    return name.endswith(".safetensors")


def _digests(name: str, content: bytes) -> dict:
    """By what a listing tells the content of a file."""
    digests: dict = {"size": len(content), "oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}
    if _is_large(name):
        digests["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return digests
