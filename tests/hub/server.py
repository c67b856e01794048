"""A test double of the Hugging Face Hub: an HTTP server on 127.0.0.1 that keeps its repositories in memory.

It is not the Hub. It implements the parts of the Hub's protocol that `huggingface_hub`, `diffusers` and `datasets` use
to create, push and load a repository (whoami, create and delete a repository, branches, preupload, LFS upload, commit,
info, refs, tree, paths-info, resolve with ETag and ranges, card validation). It checks tokens and simulates failures,
so that tests run the real client over a real socket without access to the real Hub.

    with HubServer() as hub:
        hub.fail("POST", "/commit/", 500)                     # the next commit is answered with 500
        HfApi(endpoint=hub.endpoint, token=hub.token).create_repo("user/model")
        subprocess.run([...], env=hub.env(home))              # HF_ENDPOINT is read once, when the client is imported

Xet is not implemented: the client must run with HF_HUB_DISABLE_XET=1, as in `env`. As on the Hub, text files of at most
10 MB are plain git blobs, and all others are stored in LFS.
"""

import os
import re
import secrets
import threading
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path

from hub.handler import Handler, Request
from hub.repository import Commit, Repo


@dataclass
class Failure:
    """A failure to simulate; see `HubServer.fail`."""

    method: str
    path: str
    what: int | str
    times: int
    retry_after: int
    delay: float
    code: str | None


class HubServer:
    """The server, used as a context manager. `endpoint` is its URL, `token` the token of the user "user".

    Attributes:
        users: token -> user name. Other tokens are rejected; a user can write only to repositories of its own name.
        repos: (type, id) -> `Repo`, type being "model", "dataset" or "space".
        requests: every `Request` so far, in order of arrival.
    """

    def __init__(self) -> None:
        self.token = "hf_" + secrets.token_hex(17)
        self.users = {self.token: "user", "hf_" + secrets.token_hex(17): "other"}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[Request] = []
        self.failures: list[Failure] = []
        self.lock = threading.RLock()
        self.closing = threading.Event()
        self.signature = secrets.token_hex(16)  # in place of the Hub's signed storage URLs
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.http.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.http.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()

    def env(self, home: str | os.PathLike, token: str | None = None) -> dict[str, str]:
        """Environment of a subprocess that uses this server as the Hub and keeps its caches and settings in `home`.

        Only PATH is inherited, not PYTHONPATH or a token. `token` is set as HF_TOKEN.
        """
        env = {
            "PATH": os.environ.get("PATH", ""),
            "HOME": str(home),
            "HF_HOME": str(Path(home) / "huggingface"),
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "OMP_NUM_THREADS": "1",
        }
        return env | ({"HF_TOKEN": token} if token else {})

    def fail(
        self,
        method: str,
        path: str,
        what: int | str,
        times: int = 1,
        retry_after: int = 0,
        delay: float = 1.0,
        code: str | None = None,
    ) -> None:
        """Make the next `times` requests fail that have this method ("*": any) and match the regular expression `path`.

        `what` is a status (429 sends `retry_after` seconds; `code` is sent as X-Error-Code), or
        "cut":  the connection is closed in the middle of the response body (GET) or of the request body (others);
        "lost": the request is executed, but the connection is closed before the response;
        "slow": the response is `delay` seconds late; there is none if the server closes before that.
        """
        with self.lock:
            self.failures.append(Failure(method, path, what, times, retry_after, delay, code))

    def asked(self, method: str, path: str) -> list[Request]:
        """The requests so far that have this method and match the regular expression `path`."""
        return [request for request in self.requests if request.method == method and re.search(path, request.path)]

    def files(self, repo_id: str, revision: str = "main", type: str = "model") -> dict[str, bytes]:
        """Path -> content of a repository at a revision."""
        commit = self.repos[type, repo_id].at(revision)
        return {path: file.data for path, file in commit.files.items()}

    def log(self, repo_id: str, revision: str = "main") -> list[str]:
        """Commit titles of a model repository at a revision, newest first."""
        repo = self.repos["model", repo_id]
        commit: Commit | None = repo.at(revision)
        titles = []
        while commit is not None:
            titles.append(commit.title)
            commit = repo.commits[commit.parent] if commit.parent else None
        return titles

    def next_failure(self, method: str, path: str) -> Failure | None:
        """The failure set with `fail` that applies to a request; counts it as used."""
        with self.lock:
            for failure in self.failures:
                if failure.times > 0 and failure.method in (method, "*") and re.search(failure.path, path):
                    failure.times -= 1
                    return failure
        return None
