"""A Hub on loopback, in memory: create, preupload, LFS batch and upload, commit, and what from_pretrained reads.

It speaks enough of the Hub's HTTP for huggingface_hub to push and load models and Spaces over real sockets.
`HubServer()` listens on a free port of 127.0.0.1 from construction to `stop()`. By hand:

    python -m tests.hub_server 8099        # then: HF_ENDPOINT=http://127.0.0.1:8099 HF_HUB_DISABLE_XET=1 HF_TOKEN=mine

HF_HUB_DISABLE_XET=1 is needed: huggingface_hub prefers the Xet protocol, which only Hugging Face's servers speak.
"""

import base64
import hashlib
import json
import re
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results

TOKENS = {"mine": "me", "theirs": "them"}  # token: whose it is
ID = r"((?:spaces/)?[\w.-]+/[\w.-]+)"  # of a Space as its addresses have it; in `repos`, too
SDKS = ["gradio", "docker", "static"]
COLORS = "red yellow green blue indigo purple pink gray".split()
LARGE = (".safetensors", ".gguf", ".png", ".pt", ".pth", ".bin")


@dataclass
class Repo:
    """Commits by id, each a map of paths to contents, and branches by name, each a commit."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {branch} {sorted(files)}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        self.messages.append(message)
        return oid


class Answer(Exception):
    """An answer that is not 200, with the Hub's headers for it."""

    def __init__(self, status: int, error: str, code: str = "", **content):
        super().__init__(error)
        self.status, self.content = status, {"error": error, **content}
        self.headers = {"X-Error-Message": error} | ({"X-Error-Code": code} if code else {})


class HubServer:
    """The server and what it holds: `repos` by id, `log` of requests, `on_commit(repo_id)` after each commit."""

    def __init__(self, port: int = 0):
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.log: list[str] = []
        self.on_commit = lambda repo_id: None
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self.http.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """No connection is taken from now on; a second call does nothing."""
        self.http.shutdown()
        self.http.server_close()

    def add(self, repo_id: str, private: bool = False) -> Repo:
        repo = self.repos[repo_id] = Repo(private)
        repo.commit(
            "main", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}, "initial commit"
        )
        return repo


class Handler(BaseHTTPRequestHandler):
    """One request: read it whole, find its route, answer with JSON or with a file."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        self.hub.log.append(f"{self.command} {self.path.split('?')[0]}")

    def handle_any(self) -> None:
        self.body, parts = self._read_body(), urlsplit(self.path)
        self.query = parse_qs(parts.query)
        path = parts.path.replace("/api/spaces/", "/api/models/spaces/", 1)
        for method, pattern, act in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                try:
                    result = act(self, *(unquote(group) if group else group for group in match.groups()))
                    return self.reply(200, json.dumps(result).encode()) if result is not None else None
                except Answer as answer:
                    return self.reply(answer.status, json.dumps(answer.content).encode(), answer.headers)
        return self.reply(404, b'{"error": "no such route"}')

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def reply(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Connection", "close")  # so that a stopped server is gone at once
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def user(self) -> str | None:
        """Whose token came along; none came: None; a wrong one: 401."""
        given = self.headers.get("Authorization")
        if given and given.removeprefix("Bearer ") not in TOKENS:
            raise Answer(401, "Invalid credentials in Authorization header")
        return TOKENS[given.removeprefix("Bearer ")] if given else None

    def repo(self, repo_id: str, writes: bool = False) -> Repo:
        """The repository, for whom may see it (or write to it)."""
        user, repo = self.user(), self.hub.repos.get(repo_id)
        owns = user == repo_id.split("/")[-2]
        if repo is None or (repo.private and not owns):
            raise Answer(404 if user else 401, "Repository not found", "RepoNotFound")
        if writes and not owns:
            raise Answer(403, "Forbidden: you may not write to this repository")
        return repo

    def revision(self, repo: Repo, name: str) -> dict[str, bytes]:
        if name not in repo.branches and name not in repo.commits:
            raise Answer(404, "Revision not found", "RevisionNotFound")
        return repo.files(name)


# ---- who and which


def whoami(request: Handler):
    user = request.user()
    if user is None:
        raise Answer(401, "Invalid username or password.")
    return {"type": "user", "name": user, "orgs": [], "auth": {"type": "access_token"}}


def create(request: Handler):
    asked, user = json.loads(request.body), request.user()
    if user is None:
        raise Answer(401, "Invalid username or password.")
    owner = asked.get("organization") or user
    is_space = asked.get("type") == "space"
    repo_id = f"{'spaces/' * is_space}{owner}/{asked['name']}"
    if is_space and asked.get("sdk") not in SDKS:
        raise Answer(400, f'"sdk" must be one of {SDKS}')
    if owner != user:
        raise Answer(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
    url = f"{request.hub.address}/{repo_id}"
    if repo_id in request.hub.repos:
        raise Answer(409, "You already created this model repo", url=url)
    request.hub.add(repo_id, private=asked.get("visibility") == "private" or asked.get("private", False))
    return {"url": url, "name": repo_id, "id": repo_id}


def branch(request: Handler, repo_id: str, name: str):
    repo = request.repo(repo_id, writes=True)
    if name in repo.branches:
        raise Answer(409, "Reference already exists")
    repo.branches[name] = repo.branches["main"]
    return {"success": True}


def info(request: Handler, repo_id: str, revision: str | None):
    repo = request.repo(repo_id)
    files = request.revision(repo, revision or "main")
    sha = repo.branches.get(revision or "main", revision)
    siblings = [{"rfilename": path} for path in sorted(files)]
    return {"id": repo_id, "modelId": repo_id, "sha": sha, "private": repo.private, "siblings": siblings, "tags": []}


def refs(request: Handler, repo_id: str):
    repo = request.repo(repo_id)
    heads = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": oid} for n, oid in repo.branches.items()]
    return {"branches": heads, "tags": [], "converts": []}


def tree(request: Handler, repo_id: str, revision: str, folder: str | None):
    files, prefix = request.revision(request.repo(repo_id), revision), f"{folder}/" if folder else ""
    inside = {path: content for path, content in files.items() if path.startswith(prefix)}
    if not inside:
        raise Answer(404, "Entry not found", "EntryNotFound")
    if "recursive" not in request.query or request.query["recursive"] == ["False"]:
        inside = {path: content for path, content in inside.items() if "/" not in path[len(prefix) :]}
    return [{"type": "file", "path": path, **described(path, content)} for path, content in inside.items()]


def described(path: str, content: bytes) -> dict:
    """Size and ids of a file; a large one has the hash of its content too."""
    described = {"size": len(content), "oid": hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()}
    if path.endswith(LARGE):
        described["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return described


# ---- up


def validate_yaml(request: Handler):
    asked = json.loads(request.body)
    errors = card_errors(asked["content"], is_space=asked["repoType"] == "space")
    if errors:
        raise Answer(400, "Invalid metadata", errors=[{"message": error} for error in errors], warnings=[])
    return {"errors": [], "warnings": []}


def card_errors(content: str, is_space: bool = False) -> list[str]:
    """What the Hub would refuse of a card's metadata, of a model's or a Space's."""
    parts = content.split("---\n")
    data = yaml.safe_load(parts[1]) if content.startswith("---\n") and len(parts) > 2 else None
    if not isinstance(data, dict):
        return ["metadata must be a mapping between two lines of ---"]
    if is_space:
        return space_errors(data)
    ids = [*(data.get("datasets") or []), *([data["base_model"]] if "base_model" in data else [])]
    errors = [f'"{name}" is not a valid id' for name in ids if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name))]
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", str(data.get("license"))):
        errors.append('"license" must be one of the known licenses')
    errors += [f'"language" {code}' for code in data.get("language") or [] if not re.fullmatch(r"\w{2,3}|code", code)]
    if data.get("pipeline_tag") != "text-generation":
        errors.append('"pipeline_tag" must be a known task')
    if "model-index" in data:
        try:
            name, results = model_index_to_eval_results(data["model-index"])
        except (KeyError, TypeError, ValueError) as error:
            return [*errors, f'"model-index": {error!r}']
        if not name or not results or not all(isinstance(result.metric_value, int | float) for result in results):
            errors.append('"model-index" needs a name and numbers')
    return errors


def space_errors(data: dict) -> list[str]:
    """The settings of a Space, by https://huggingface.co/docs/hub/spaces-config-reference."""
    rules = {
        "title": bool(data.get("title")),
        "emoji": len(data.get("emoji", "")) == 1,
        "colorFrom": data.get("colorFrom") in COLORS,
        "colorTo": data.get("colorTo") in COLORS,
        "sdk": data.get("sdk") in SDKS,
        "sdk_version": re.fullmatch(r"\d+\.\d+\.\d+", str(data.get("sdk_version"))),
        "python_version": re.fullmatch(r"3(\.\d+){1,2}", data.get("python_version", "3.10")),
        "app_file": bool(data.get("app_file")),
        "license": re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", data.get("license", "mit")),
        "models": all(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) for name in data.get("models", [])),
    }
    return [f'"{name}" is not valid' for name, holds in rules.items() if not holds]


def preupload(request: Handler, repo_id: str, revision: str):
    there = request.revision(request.repo(repo_id, writes=True), revision)
    answers = []
    for file in json.loads(request.body)["files"]:
        path, mode = file["path"], "lfs" if file["path"].endswith(LARGE) else "regular"
        known = described(path, there[path]) if path in there else {}
        oid = known.get("lfs", known).get("oid")
        answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return {"files": answers, "commitOid": "0" * 40}


def lfs_batch(request: Handler, repo_id: str):
    request.repo(repo_id, writes=True)
    objects = []
    for asked in json.loads(request.body)["objects"]:
        if asked["oid"] not in request.hub.blobs:
            verify = {"href": f"{request.hub.address}/lfs/verify", "header": {}}
            asked["actions"] = {"upload": {"href": f"{request.hub.address}/lfs/{asked['oid']}"}, "verify": verify}
        objects.append(asked)
    return {"transfer": "basic", "objects": objects}


def lfs_store(request: Handler, oid: str):
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise Answer(400, "the content is not what its hash says")
    request.hub.blobs[oid] = request.body
    return {}


def lfs_verify(request: Handler):
    asked = json.loads(request.body)
    if len(request.hub.blobs.get(asked["oid"], b"")) != asked["size"]:
        raise Answer(404, "this object has not arrived")
    return {}


def commit(request: Handler, repo_id: str, revision: str):
    repo = request.repo(repo_id, writes=True)
    lines = [json.loads(line) for line in request.body.splitlines()]
    files = dict(request.revision(repo, revision))
    for line in lines[1:]:
        path = line["value"]["path"]
        if line["key"] == "file":
            files[path] = base64.b64decode(line["value"]["content"])
        elif line["key"] == "lfsFile":
            if line["value"]["oid"] not in request.hub.blobs:
                raise Answer(400, f"{path} has not been uploaded")
            files[path] = request.hub.blobs[line["value"]["oid"]]
        else:
            del files[path]
    if "README.md" in files and (errors := card_errors(files["README.md"].decode(), repo_id.startswith("spaces/"))):
        raise Answer(400, "Invalid metadata", errors=[{"message": error} for error in errors], warnings=[])
    oid = repo.commit(revision, files, lines[0]["value"]["summary"])
    request.hub.on_commit(repo_id)
    return {"success": True, "commitOid": oid, "commitUrl": f"{request.hub.address}/{repo_id}/commit/{oid}"}


# ---- down


def resolve(request: Handler, repo_id: str, revision: str, path: str):
    repo = request.repo(repo_id)
    files, sha = request.revision(repo, revision), repo.branches.get(revision, revision)
    if path not in files:
        raise Answer(404, "Entry not found", "EntryNotFound")
    known = described(path, files[path])
    etag = f'"{known.get("lfs", known)["oid"]}"'
    headers = {"X-Repo-Commit": sha, "ETag": etag, "Content-Type": "application/octet-stream"}
    if "lfs" in known:
        headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(known["size"])}
    request.reply(200, files[path], headers)


ROUTES = [  # (methods, path, what answers)
    ("GET", "/api/whoami-v2", whoami),
    ("POST", "/api/repos/create", create),
    ("POST", "/api/validate-yaml", validate_yaml),
    ("POST", f"/api/models/{ID}/branch/([^/]+)", branch),
    ("POST", f"/api/models/{ID}/preupload/([^/]+)", preupload),
    ("POST", f"/api/models/{ID}/commit/([^/]+)", commit),
    ("GET", f"/api/models/{ID}/refs", refs),
    ("GET", f"/api/models/{ID}/tree/([^/]+)(?:/(.+))?", tree),
    ("GET", f"/api/models/{ID}(?:/revision/([^/]+))?", info),
    ("POST", f"/{ID}\\.git/info/lfs/objects/batch", lfs_batch),
    ("POST", "/lfs/verify", lfs_verify),
    ("PUT", "/lfs/([0-9a-f]{64})", lfs_store),
    ("GET HEAD", f"/{ID}/resolve/([^/]+)/(.+)", resolve),
]

if __name__ == "__main__":
    server = HubServer(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    print(f"a Hub at {server.address}, tokens: {', '.join(TOKENS)}", flush=True)
    server.thread.join()
