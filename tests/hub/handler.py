"""HTTP routes of the Hub's test double."""

import base64
import fnmatch
import hashlib
import json
import re
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, quote, unquote, urlsplit

from hub.repository import LFS_FROM, LFS_PATTERNS, File, Refused, Repo, check_card

if TYPE_CHECKING:
    from hub.server import HubServer


@dataclass
class Request:
    """A received request. `user` is the owner of its token; `status` is None if it was not answered."""

    method: str
    path: str
    headers: dict[str, str]
    user: str | None
    status: int | None = None


ROUTES: list[tuple[str, re.Pattern, str]] = []
REPO = r"/api/(?P<type>model|dataset|space)s/(?P<id>[^/]+/[^/]+)"
FILE = r"/((?P<type>dataset|space)s/)?(?P<id>[^/]+/[^/]+)"


def _route(methods: str, path: str):
    """Register a method of `Handler` for these HTTP methods and paths that match the regular expression."""

    def register(function):
        ROUTES.extend((method, re.compile(path + r"/?"), function.__name__) for method in methods.split())
        return function

    return register


class Handler(BaseHTTPRequestHandler):
    """Answers one request; `HubServer` sets `hub` in a subclass."""

    protocol_version = "HTTP/1.1"
    hub: "HubServer"

    def log_message(self, *_: object) -> None:
        pass

    def handle_any(self) -> None:
        # The path is split before it is unquoted: a branch or file name may contain a quoted slash.
        address = urlsplit(self.path)
        self.query = parse_qs(address.query)
        self.status: int | None = None
        self.failure = self.hub.next_failure(self.command, unquote(address.path))
        length = int(self.headers.get("Content-Length", 0))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.user = self.hub.users.get(token)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, unquote(address.path), headers, self.user)
        with self.hub.lock:
            self.hub.requests.append(request)

        what = self.failure.what if self.failure else None
        if what == "cut" and self.command not in ("GET", "HEAD"):
            self.rfile.read(length // 2)
            self.close_connection = True
            return
        if what == "slow" and self.hub.closing.wait(self.failure.delay):
            self.close_connection = True
            return
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            self.body = self._read_chunked()
        else:
            self.body = self.rfile.read(length)
        try:
            if isinstance(what, int):
                headers = {"Retry-After": str(self.failure.retry_after)} if what == 429 else {}
                raise Refused(what, self.failure.code, "The test told the server to fail.", **headers)
            if token and self.user is None:
                raise Refused(401, None, "Invalid credentials in Authorization header")
            for method, pattern, name in ROUTES:
                if method == self.command and (match := pattern.fullmatch(address.path)):
                    with self.hub.lock:
                        given = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                        getattr(self, name)(**given)
                    break
            else:
                raise Refused(404, None, f"The test double does not implement {self.command} {address.path}")
        except Refused as refused:
            self.answer_error(refused)
        request.status = self.status

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def _read_chunked(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    # Answers

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        cut = self.failure.what if self.failure else None
        if cut == "lost":
            self.close_connection = True
            return
        self.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        if cut == "cut":
            body = body[: len(body) // 2]
            self.close_connection = True
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, data: object, status: int = 200, **headers: str) -> None:
        self.answer(status, json.dumps(data).encode(), Content_Type="application/json", **headers)

    def answer_error(self, refused: Refused) -> None:
        headers = {"X-Error-Message": refused.message, **refused.headers}
        if refused.code:
            headers["X-Error-Code"] = refused.code
        self.answer_json({"error": refused.message}, refused.status, **headers)

    # Permissions

    def repo(self, type: str, id: str, write: bool = False) -> Repo:
        repo = self.hub.repos.get((type, id))
        owner = id.split("/")[0]
        if repo is None or (repo.private and self.user != owner):
            # As on the Hub, an anonymous client gets the same answer for a private and for a missing repository.
            raise Refused(404 if self.user else 401, "RepoNotFound", "Repository not found")
        if write:
            self.may_write(owner)
        return repo

    def may_write(self, owner: str) -> None:
        if self.user is None:
            raise Refused(401, None, "Invalid username or password.")
        if self.user != owner:
            raise Refused(403, None, f"You don't have the rights to write under the namespace {owner}")

    # The API

    @_route("GET", "/api/whoami-v2")
    def whoami(self) -> None:
        if self.user is None:
            raise Refused(401, None, "Invalid credentials in Authorization header")
        access = {"displayName": "test", "role": "write"}
        self.answer_json({"type": "user", "name": self.user, "auth": {"accessToken": access}, "orgs": []})

    @_route("POST", "/api/repos/create")
    def create_repo(self) -> None:
        asked = json.loads(self.body)
        owner = asked.get("organization") or self.user
        self.may_write(owner)
        type, id = asked.get("type", "model"), f"{owner}/{asked['name']}"
        address = {"url": f"{self.hub.endpoint}/{'' if type == 'model' else f'{type}s/'}{id}", "name": id}
        if type == "space" and "sdk" not in asked:
            raise Refused(400, None, '"sdk" is required for a Space')
        if (type, id) in self.hub.repos:
            message = "You already created this model repo"
            self.answer_json(address | {"error": message}, 409, X_Error_Message=message)
            return
        repo = self.hub.repos[type, id] = Repo(type, id, asked.get("visibility") == "private")
        attributes = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS)
        repo.commit("main", "initial commit", {".gitattributes": File(attributes.encode())})
        self.answer_json(address)

    @_route("DELETE", "/api/repos/delete")
    def delete_repo(self) -> None:
        asked = json.loads(self.body)
        repo = self.repo(asked.get("type", "model"), f"{asked.get('organization') or self.user}/{asked['name']}", True)
        del self.hub.repos[repo.type, repo.id]
        self.answer_json({})

    @_route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> None:
        errors, warnings = check_card(json.loads(self.body)["content"])
        messages = {
            "errors": [{"message": error} for error in errors],
            "warnings": [{"message": warning} for warning in warnings],
        }
        self.answer_json(messages, 400 if errors else 200)

    @_route("GET", REPO)
    def info(self, type: str, id: str) -> None:
        self.info_at(type, id, "main")

    @_route("GET", REPO + "/revision/(?P<revision>[^/]+)")
    def info_at(self, type: str, id: str, revision: str) -> None:
        repo = self.repo(type, id)
        commit = repo.at(revision)
        siblings: list[dict] = []
        for path, file in commit.files.items():
            blobs = {"size": len(file.data), "blobId": file.oid, **file.lfs("sha256")} if "blobs" in self.query else {}
            siblings.append({"rfilename": path, **blobs})
        self.answer_json(
            {
                "_id": hashlib.sha1(id.encode()).hexdigest()[:24],
                "id": id,
                "author": id.split("/")[0],
                "sha": commit.sha,
                "lastModified": commit.date,
                "private": repo.private,
                "gated": False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": siblings,
            }
        )

    @_route("GET", REPO + "/refs")
    def refs(self, type: str, id: str) -> None:
        branches = self.repo(type, id).branches.items()
        named = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in branches]
        self.answer_json({"branches": named, "converts": [], "tags": [], "pullRequests": []})

    @_route("GET", REPO + "/commits/(?P<revision>[^/]+)")
    def commits(self, type: str, id: str, revision: str) -> None:
        repo = self.repo(type, id)
        log, sha = [], repo.at(revision).sha
        while sha:
            commit = repo.commits[sha]
            authors = [{"user": id.split("/")[0]}]
            log.append({"id": sha, "title": commit.title, "message": "", "date": commit.date, "authors": authors})
            sha = commit.parent
        self.answer_json(log)

    @_route("GET", REPO + "/tree/(?P<revision>[^/]+)(/(?P<under>.+))?")
    def tree(self, type: str, id: str, revision: str, under: str = "") -> None:
        under = under.rstrip("/") + "/" if under else ""
        recursive = self.query.get("recursive", [""])[0].lower() in ("1", "true")
        entries: dict[str, dict] = {}
        for path, file in self.repo(type, id).at(revision).files.items():
            if path.startswith(under):
                rest = path.removeprefix(under).split("/")
                for depth in range(1, len(rest) if recursive else min(2, len(rest))):
                    folder = under + "/".join(rest[:depth])
                    entries[folder] = {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0}
                if recursive or len(rest) == 1:
                    entries[path] = self.entry(path, file)
        if under and not entries:
            raise Refused(404, "EntryNotFound", f"{under} does not exist")
        self.answer_json(list(entries.values()))

    @staticmethod
    def entry(path: str, file: File) -> dict:
        return {"type": "file", "path": path, "size": len(file.data), "oid": file.oid, **file.lfs("oid")}

    @_route("POST", REPO + "/paths-info/(?P<revision>[^/]+)")
    def paths_info(self, type: str, id: str, revision: str) -> None:
        commit = self.repo(type, id).at(revision)
        if "json" in self.headers.get("Content-Type", ""):
            paths = json.loads(self.body)["paths"]
        else:
            paths = parse_qs(self.body.decode()).get("paths", [])
        found = []
        for path in paths:
            if path in commit.files:
                found.append(self.entry(path, commit.files[path]))
            elif any(name.startswith(path.rstrip("/") + "/") for name in commit.files):
                found.append({"type": "directory", "path": path, "oid": "0" * 40, "size": 0})
        self.answer_json(found)

    @_route("POST DELETE", REPO + "/branch/(?P<branch>[^/]+)")
    def branch(self, type: str, id: str, branch: str) -> None:
        repo = self.repo(type, id, write=True)
        if self.command == "DELETE":
            if branch == "main" or branch not in repo.branches:
                raise Refused(404 if branch != "main" else 403, "RevisionNotFound", f"Cannot delete {branch}")
            del repo.branches[branch]
        elif branch in repo.branches:
            raise Refused(409, None, f"Reference already exists: {branch}")
        else:
            start = json.loads(self.body or b"{}").get("startingPoint", "main")
            repo.branches[branch] = repo.at(start).sha
        self.answer_json({})

    @_route("POST", REPO + "/preupload/(?P<revision>[^/]+)")
    def preupload(self, type: str, id: str, revision: str) -> None:
        files = self.repo(type, id, write=True).at(revision).files
        answers = []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            named = any(fnmatch.fnmatch(path, pattern) for pattern in LFS_PATTERNS)
            lfs = named or asked["size"] > LFS_FROM or b"\0" in base64.b64decode(asked["sample"])
            there = {"oid": files[path].etag} if path in files else {}
            answers.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, **there})
        self.answer_json({"files": answers})

    @_route("POST", FILE + r"\.git/info/lfs/objects/batch")
    def lfs_batch(self, id: str, type: str = "model") -> None:
        repo = self.repo(type, id, write=True)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            item = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in repo.lfs:
                prefix = "" if type == "model" else f"{type}s/"
                upload = f"{self.hub.endpoint}/storage/{type}/{id}/{asked['oid']}?signature={self.hub.signature}"
                verify = f"{self.hub.endpoint}/{prefix}{id}.git/info/lfs/objects/verify"
                item["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
            objects.append(item)
        self.answer_json({"transfer": "basic", "objects": objects})

    @_route("POST", FILE + r"\.git/info/lfs/objects/verify")
    def lfs_verify(self, id: str, type: str = "model") -> None:
        repo, asked = self.repo(type, id, write=True), json.loads(self.body)
        if len(repo.lfs.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(404, None, "The object was not uploaded")
        self.answer_json({})

    @_route("GET HEAD PUT", "/storage/(?P<type>model|dataset|space)/(?P<id>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})")
    def storage(self, type: str, id: str, oid: str) -> None:
        # Like the Hub's file storage, this accepts signed URLs only and no tokens.
        if self.query.get("signature") != [self.hub.signature]:
            raise Refused(403, None, "The address is not signed")
        repo = self.hub.repos[type, id]
        if self.command != "PUT":
            self.send_content(repo.lfs[oid], ETag=f'"{oid}"')
            return
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, None, "The content does not have the declared SHA-256")
        repo.lfs[oid] = self.body
        self.answer(200, b"", ETag=f'"{oid}"')

    @_route("POST", REPO + "/commit/(?P<revision>[^/]+)")
    def commit(self, type: str, id: str, revision: str) -> None:
        repo = self.repo(type, id, write=True)
        if revision not in repo.branches:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        lines = [json.loads(line) for line in self.body.splitlines()]
        header, files = lines[0]["value"], dict(repo.at(revision).files)
        if header.get("parentCommit") not in (None, repo.branches[revision]):
            raise Refused(412, None, "A commit has happened since. Please refresh and try again.")
        for operation in lines[1:]:
            value = operation["value"]
            path = value["path"]
            if path.startswith("/") or ".." in path.split("/"):
                raise Refused(400, None, f"Invalid path in repo: {path}")
            if operation["key"] == "file":
                files[path] = File(base64.b64decode(value["content"]))
            elif operation["key"] == "lfsFile":
                if value["oid"] not in repo.lfs:
                    raise Refused(400, None, f"LFS pointer pointed to a file that does not exist: {path}")
                files[path] = File(repo.lfs[value["oid"]], value["oid"])
            elif operation["key"] == "deletedFile":
                if files.pop(path, None) is None:
                    raise Refused(404, "EntryNotFound", "A file with this name doesn't exist")
            elif operation["key"] == "deletedFolder":
                files = {name: file for name, file in files.items() if not name.startswith(path.rstrip("/") + "/")}
        commit = repo.commit(revision, header["summary"], files)
        address = f"{self.hub.endpoint}/{id}/commit/{commit.sha}"
        self.answer_json({"success": True, "commitOid": commit.sha, "commitUrl": address, "hookOutput": ""})

    @_route("GET HEAD", FILE + "/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve(self, id: str, revision: str, path: str, type: str = "model") -> None:
        repo = self.repo(type, id)
        commit = repo.at(revision)
        if path not in commit.files:
            raise Refused(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": commit.sha})
        file = commit.files[path]
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{file.etag}"'}
        if file.sha256 is None:
            self.send_content(file.data, **headers)
            return
        # An LFS file is served from another host (this server's other name), so the client sends no token there.
        storage = f"{self.hub.endpoint.replace('127.0.0.1', 'localhost')}/storage/{type}/{quote(id)}/{file.sha256}"
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.data))}
        self.answer(302, b"", Location=f"{storage}?signature={self.hub.signature}", **headers)

    def send_content(self, data: bytes, **headers: str) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            self.answer(200, data, Accept_Ranges="bytes", **headers)
            return
        first = int(asked[1])
        last = min(int(asked[2]) if asked[2] else len(data) - 1, len(data) - 1)
        if first > last:
            self.answer(416, b"", Content_Range=f"bytes */{len(data)}")
            return
        self.answer(206, data[first : last + 1], Content_Range=f"bytes {first}-{last}/{len(data)}", **headers)
