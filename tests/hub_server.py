# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""
A Hub on the loopback interface, with its state on disk. The real `huggingface_hub` client can create repositories in it, commit
regular and LFS files, branch, tag, open pull requests, list and download. It fails on demand.

    with HubServer(folder, tokens={"hf_owner": "user"}) as hub:
        ...                                       # HF_ENDPOINT=hub.url, before huggingface_hub is imported
        hub.fail("PUT /lfs", "reset", times=1)    # the connection breaks in the next upload of a large file
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


# As on the Hub: these files are stored by LFS at any size, and all others from `LFS_SIZE` bytes.
LFS_SUFFIXES = (".safetensors", ".bin", ".parquet")
LFS_SIZE = 10 * 2**20


@dataclass
class Fault:
    """
    A failure of the next `times` requests that match `pattern`. Kinds are a status code such as `"500"` or `"429"` (which asks to
    wait a second), `"reset"` (the connection breaks in the middle of the request's body), `"truncate"` (the connection breaks
    in the middle of the file that is sent) and `"lost"` (the request is carried out, but the response is not sent).
    """

    pattern: str
    kind: str
    times: int


@dataclass
class Repository:
    """A repository. `refs` has full names (`heads/main`, `tags/core`, `pr/1`); a commit lists all of its files."""

    private: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict] = field(default_factory=dict)


class HubError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


def check_card(content: str) -> list[str]:
    """List the errors in a card's metadata, by those rules of the Hub that apply to models like ours."""
    found = re.match(r"---\n(.*?)\n---", content, re.DOTALL)
    if found is None:
        return ["the card has no metadata"]
    data, errors = yaml.safe_load(found[1]), []
    choices = {
        "license": (
            "apache-2.0",
            "mit",
            "openrail",
            "creativeml-openrail-m",
            "cc-by-4.0",
            "cc0-1.0",
            "other",
            "unknown",
        ),
        "pipeline_tag": ("text-to-image", "unconditional-image-generation", "image-to-image"),
        "base_model_relation": ("finetune", "adapter", "merge", "quantized"),
    }
    for name, allowed in choices.items():
        if data.get(name, allowed[0]) not in allowed:
            errors.append(f'"{name}" must be one of {list(allowed)}')
    for name in ("tags", "datasets"):
        value = data.get(name, [])
        if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
            errors.append(f'"{name}" must be an array of strings')
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(data.get("base_model", "a/b"))):
        errors.append('"base_model" must be the name of a model')
    for model in data.get("model-index", []):
        for result in model.get("results", [{}]):
            metrics = result.get("metrics", [{}])
            complete = model.get("name") and result.get("task", {}).get("type") and metrics
            if not complete or not {"name", "type"} <= result.get("dataset", {}).keys():
                errors.append('"model-index" has results without name, task, dataset or metrics')
            elif not all(metric.get("type") and "value" in metric for metric in metrics):
                errors.append('"model-index" has metrics without type or value')
    return errors


class HubServer:
    """
    Args:
        folder (`Path`): The folder of the state. A new server on the same folder resumes from it.
        tokens (`dict[str, str]`): The owner of each token. Owners can write to their own repositories only.
    """

    def __init__(self, folder: Path, tokens: dict[str, str]):
        self.folder, self.tokens = Path(folder), tokens
        (self.folder / "blobs").mkdir(parents=True, exist_ok=True)
        self.faults: list[Fault] = []
        self.requests: list[str] = []  # "METHOD path" of each request, in order
        self.lock = threading.RLock()
        handler = type("Handler", (RequestHandler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fail(self, pattern: str, kind: str, times: int = 1) -> None:
        """Let the next `times` requests fail whose `"METHOD path"` contains the regular expression `pattern`. See [`Fault`]."""
        self.faults.append(Fault(pattern, kind, times))

    def find_fault(self, request: str) -> str | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault.kind
        return None

    # ------------------------------------------------------------------------------------------------------------------
    # State

    def path(self, repo_id: str) -> Path:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id) or ".." in repo_id:
            raise HubError(400, f"{repo_id!r} is not a repository name")
        return self.folder / "repositories" / f"{repo_id}.json"

    def read(self, repo_id: str, token: str | None) -> Repository:
        path = self.path(repo_id)
        repository = Repository(**json.loads(path.read_text())) if path.exists() else None
        owner = repo_id.split("/")[0]
        if repository is None or (repository.private and self.tokens.get(token) != owner):
            raise HubError(404 if token else 401, "Repository not found", "RepoNotFound")
        return repository

    def write(self, repo_id: str, repository: Repository) -> None:
        path = self.path(repo_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".tmp").write_text(json.dumps(vars(repository)))
        path.with_suffix(".tmp").replace(path)

    def check_owner(self, repo_id: str, token: str | None) -> None:
        if token not in self.tokens:
            raise HubError(401, "Invalid username or password.")
        if self.tokens[token] != repo_id.split("/")[0]:
            raise HubError(403, f"You don't have the rights to write to {repo_id}.")

    def resolve(self, repository: Repository, revision: str) -> str:
        """Return the commit that a branch, tag, pull request or commit id names."""
        for name in (f"heads/{revision}", f"tags/{revision}", revision.removeprefix("refs/")):
            if name in repository.refs:
                return repository.refs[name]
        if revision in repository.commits:
            return revision
        raise HubError(404, f"Revision {revision} not found", "RevisionNotFound")

    def blob(self, sha256: str) -> Path:
        return self.folder / "blobs" / sha256

    def store(self, content: bytes) -> str:
        sha256 = hashlib.sha256(content).hexdigest()
        temporary = self.blob(f"{sha256}-{threading.get_ident()}.tmp")
        temporary.write_bytes(content)
        temporary.replace(self.blob(sha256))
        return sha256

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Return the files of a revision, by name."""
        path = self.path(repo_id)
        repository = Repository(**json.loads(path.read_text()))
        files = repository.commits[self.resolve(repository, revision)]["files"]
        return {name: self.blob(entry["sha256"]).read_bytes() for name, entry in files.items()}

    # ------------------------------------------------------------------------------------------------------------------
    # Requests of the client

    def create(self, token: str | None, body: dict) -> dict:
        name = body["name"] if body.get("organization") is None else f"{body['organization']}/{body['name']}"
        if "/" not in name:
            name = f"{self.tokens.get(token)}/{name}"
        self.check_owner(name, token)
        exists = self.path(name).exists()
        if not exists:
            repository = Repository(private=bool(body.get("private") or body.get("visibility") == "private"))
            self.add_commit(repository, "heads/main", "initial commit", {})
            self.write(name, repository)
        answer = {"url": f"{self.url}/{name}", "name": name, "id": name}
        if exists:
            raise HubError(409, json.dumps(answer))
        return answer

    def add_commit(self, repository: Repository, ref: str, title: str, files: dict, parent: str | None = None) -> str:
        content = json.dumps([title, files, parent, len(repository.commits)])
        oid = hashlib.sha1(content.encode()).hexdigest()
        repository.commits[oid] = {"title": title, "files": files, "parent": parent}
        repository.refs[ref] = oid
        return oid

    def commit(self, repo_id: str, token: str | None, revision: str, create_pr: bool, lines: list[dict]) -> dict:
        self.check_owner(repo_id, token)
        repository = self.read(repo_id, token)
        header = lines[0]["value"]
        parent = self.resolve(repository, revision)
        if header.get("parentCommit") not in (None, parent):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repository.commits[parent]["files"])
        for line in lines[1:]:
            value = line["value"]
            path = value["path"]
            if path.startswith("/") or ".." in Path(path).parts:
                raise HubError(400, f"{path!r} is not a path in a repository")
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
                files[path] = {"sha256": self.store(content), "size": len(content), "lfs": False}
            elif line["key"] == "lfsFile":
                if not self.blob(value["oid"]).exists():
                    raise HubError(400, f"{path}: its LFS object has not been uploaded")
                files[path] = {"sha256": value["oid"], "size": value["size"], "lfs": True}
            elif line["key"] == "deletedFile":
                files.pop(path, None)
            elif line["key"] == "deletedFolder":
                files = {name: entry for name, entry in files.items() if not name.startswith(f"{path}/")}
            else:
                raise HubError(400, f"unknown operation {line['key']}")
        ref, number = f"heads/{revision}", 0
        if create_pr:
            number = 1 + sum(name.startswith("pr/") for name in repository.refs)
            ref = f"pr/{number}"
        elif ref not in repository.refs:
            ref = revision.removeprefix("refs/")
            if ref not in repository.refs:
                raise HubError(400, f"{revision} is not a branch")
        oid = self.add_commit(repository, ref, header["summary"], files, parent)
        self.write(repo_id, repository)
        answer = {"commitOid": oid, "commitUrl": f"{self.url}/{repo_id}/commit/{oid}", "success": True}
        if create_pr:
            answer["pullRequestUrl"] = f"{self.url}/{repo_id}/discussions/{number}"
        return answer

    def add_ref(self, repo_id: str, token: str | None, ref: str, start: str) -> dict:
        self.check_owner(repo_id, token)
        repository = self.read(repo_id, token)
        if ref in repository.refs:
            raise HubError(409, f"{ref} exists")
        repository.refs[ref] = self.resolve(repository, start)
        self.write(repo_id, repository)
        return {}

    def delete_tag(self, repo_id: str, token: str | None, tag: str) -> dict:
        self.check_owner(repo_id, token)
        repository = self.read(repo_id, token)
        if repository.refs.pop(f"tags/{tag}", None) is None:
            raise HubError(404, f"Revision {tag} not found", "RevisionNotFound")
        self.write(repo_id, repository)
        return {}

    def list_refs(self, repository: Repository) -> dict:
        def named(kind: str) -> list[dict]:
            found = {name: oid for name, oid in repository.refs.items() if name.startswith(kind)}
            return [
                {"name": name.removeprefix(kind), "ref": f"refs/{name}", "targetCommit": oid}
                for name, oid in found.items()
            ]

        return {"branches": named("heads/"), "tags": named("tags/"), "pullRequests": named("pr/"), "converts": []}

    def list_commits(self, repository: Repository, oid: str | None) -> list[dict]:
        answer = []
        while oid is not None:
            commit = repository.commits[oid]
            answer.append(
                {"id": oid, "title": commit["title"], "message": "", "authors": [], "date": "2026-01-01T00:00:00.000Z"}
            )
            oid = commit["parent"]
        return answer

    def info(self, repo_id: str, repository: Repository, oid: str) -> dict:
        files = repository.commits[oid]["files"]
        return {
            "id": repo_id,
            "modelId": repo_id,
            "sha": oid,
            "private": repository.private,
            "siblings": [{"rfilename": name} for name in sorted(files)],
            "tags": [],
            "downloads": 0,
            "likes": 0,
        }

    def entry(self, path: str, entry: dict) -> dict:
        answer = {"type": "file", "path": path, "size": entry["size"], "oid": self.git_oid(entry)}
        if entry["lfs"]:
            answer["lfs"] = {"oid": entry["sha256"], "size": entry["size"], "pointerSize": 134}
        return answer

    def git_oid(self, entry: dict) -> str:
        if entry["lfs"]:
            return hashlib.sha1(entry["sha256"].encode()).hexdigest()
        content = self.blob(entry["sha256"]).read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class RequestHandler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def answer(self) -> None:
        url = urlsplit(self.path)
        # Data sets are stored like models, under the same names.
        path = re.sub("^(/api)?/datasets/", lambda found: "/api/models/" if found[1] else "/", unquote(url.path))
        query = parse_qs(url.query)
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        fault = self.hub.find_fault(request)
        if fault == "reset":
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            self.break_off()
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            if fault is not None and fault.isdigit():
                raise HubError(int(fault), f"status {fault}, as the test asked for")
            with self.hub.lock:
                if fault == "lost":  # the request is carried out, but the response is not sent
                    self.send = lambda *args, **kwargs: None
                self.route(path, query, body, truncate=fault == "truncate")
            if fault == "lost":
                self.break_off()
        except HubError as error:
            headers = {"X-Error-Message": error.message.splitlines()[0]}
            if error.code:
                headers["X-Error-Code"] = error.code
            if error.status == 429:
                headers["Retry-After"] = "1"
            content = error.message if error.status == 409 else json.dumps({"error": error.message})
            self.send(error.status, content.encode(), headers)

    def break_off(self) -> None:
        """End the connection with a reset instead of an orderly close."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    @property
    def token(self) -> str | None:
        authorization = self.headers.get("Authorization", "")
        return authorization.removeprefix("Bearer ") or None

    def route(self, path: str, query: dict, body: bytes, truncate: bool) -> None:
        hub, token = self.hub, self.token
        create_pr = query.get("create_pr") == ["1"]

        def match(method: str, pattern: str):
            return re.fullmatch(pattern, path) if self.command == method else None

        name = r"/api/models/([\w.-]+/[\w.-]+)"
        answer: dict | list
        if match("GET", "/api/whoami-v2"):
            if token not in hub.tokens:
                raise HubError(401, "Invalid user token.")
            answer = {"type": "user", "name": hub.tokens[token], "orgs": [], "auth": {"type": "access_token"}}
        elif match("POST", "/api/repos/create"):
            answer = hub.create(token, json.loads(body))
        elif match("POST", "/api/validate-yaml"):
            errors = [{"message": error} for error in check_card(json.loads(body)["content"])]
            return self.send(400 if errors else 200, json.dumps({"errors": errors, "warnings": []}).encode())
        elif found := match("POST", f"{name}/preupload/(.+)"):
            hub.check_owner(found[1], token)
            repository = hub.read(found[1], token)
            files = repository.commits[hub.resolve(repository, found[2])]["files"]
            answer = {"files": []}
            for file in json.loads(body)["files"]:
                is_large = file["path"].endswith(LFS_SUFFIXES) or file["size"] >= LFS_SIZE
                entry = {"path": file["path"], "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
                if file["path"] in files:
                    known = files[file["path"]]
                    entry["oid"] = known["sha256"] if known["lfs"] else hub.git_oid(known)
                answer["files"].append(entry)
        elif found := match("POST", r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch"):
            hub.check_owner(found[1], token)
            answer = {"transfer": "basic", "objects": []}
            for item in json.loads(body)["objects"]:
                entry = {"oid": item["oid"], "size": item["size"]}
                if not hub.blob(item["oid"]).exists():
                    entry["actions"] = {"upload": {"href": f"{hub.url}/lfs/{item['oid']}"}}
                answer["objects"].append(entry)
        elif found := match("PUT", r"/lfs/([0-9a-f]{64})"):
            if hashlib.sha256(body).hexdigest() != found[1]:
                raise HubError(400, "the content does not have the announced sha256")
            hub.store(body)
            answer = {}
        elif found := match("POST", f"{name}/commit/(.+)"):
            lines = [json.loads(line) for line in body.splitlines() if line]
            answer = hub.commit(found[1], token, found[2], create_pr, lines)
        elif found := match("POST", f"{name}/(branch|tag)/(.+)"):
            options = json.loads(body or b"{}")
            if found[2] == "branch":
                answer = hub.add_ref(found[1], token, f"heads/{found[3]}", options.get("startingPoint") or "main")
            else:
                answer = hub.add_ref(found[1], token, f"tags/{options['tag']}", found[3])
        elif found := match("DELETE", f"{name}/tag/(.+)"):
            answer = hub.delete_tag(found[1], token, found[2])
        elif found := match("GET", f"{name}/refs"):
            answer = hub.list_refs(hub.read(found[1], token))
        elif found := match("GET", f"{name}/commits/(.+)"):
            repository = hub.read(found[1], token)
            answer = (
                hub.list_commits(repository, hub.resolve(repository, found[2]))
                if query.get("p", ["0"]) == ["0"]
                else []
            )
        elif found := match("GET", rf"{name}/tree/(refs/pr/\d+|[^/]+)(?:/(.*))?"):
            repository = hub.read(found[1], token)
            files = repository.commits[hub.resolve(repository, found[2])]["files"]
            inside = f"{found[3]}/" if found[3] else ""
            answer = [hub.entry(file, entry) for file, entry in sorted(files.items()) if file.startswith(inside)]
            if inside and not answer:
                raise HubError(404, f"{found[3]} not found", "EntryNotFound")
        elif found := match("POST", f"{name}/paths-info/(.+)"):
            repository = hub.read(found[1], token)
            files = repository.commits[hub.resolve(repository, found[2])]["files"]
            paths = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode()).get("paths", [])
            answer = [hub.entry(file, files[file]) for file in paths if file in files]
        elif found := match("GET", f"{name}/auth-check(/write)?"):
            hub.read(found[1], token)
            if found[2]:
                hub.check_owner(found[1], token)
            answer = {}
        elif found := match("GET", f"{name}(?:/revision/(.+))?"):
            repository = hub.read(found[1], token)
            answer = hub.info(found[1], repository, hub.resolve(repository, found[2] or "main"))
        elif found := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/(refs/pr/\d+|[^/]+)/(.+)", path):
            return self.send_file(*found.groups(), truncate)
        else:
            raise HubError(404, f"{self.command} {path} is not part of this Hub")
        self.send(200, json.dumps(answer).encode())

    def send_file(self, repo_id: str, revision: str, path: str, truncate: bool) -> None:
        repository = self.hub.read(repo_id, self.token)
        oid = self.hub.resolve(repository, revision)
        entry = repository.commits[oid]["files"].get(path)
        if entry is None:
            raise HubError(404, f"{path} not found", "EntryNotFound")
        content = self.hub.blob(entry["sha256"]).read_bytes()
        headers = {
            "X-Repo-Commit": oid,
            "ETag": f'"{entry["sha256"] if entry["lfs"] else self.hub.git_oid(entry)}"',
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        status = 200
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(found[1]), int(found[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        if truncate and self.command == "GET":
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.break_off()
            return
        self.send(status, content, headers)
