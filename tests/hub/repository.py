"""Repositories of the Hub's test double: files, commits, branches, LFS objects, and the check of a model card."""

import hashlib
import re
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime

import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results

LFS_PATTERNS = ("*.safetensors", "*.bin", "*.ckpt", "*.pt", "*.pth", "*.pkl", "*.parquet", "*.npz", "*.zip")
LFS_FROM = 10 * 1024 * 1024  # bytes: larger files are stored in LFS regardless of their name
LICENSES = ("apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "openrail", "other", "unknown")
PIPELINE_TAGS = ("unconditional-image-generation", "text-to-image", "image-to-image", "image-classification", "other")


class Refused(Exception):
    """An error response, with the Hub's X-Error-Code."""

    def __init__(self, status: int, code: str | None, message: str, **headers: str):
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers


@dataclass
class File:
    """One file of a commit. `oid` is the git SHA-1 of its blob, or of its LFS pointer if it is in LFS."""

    data: bytes
    sha256: str | None = None  # set if the file is in LFS

    @property
    def oid(self) -> str:
        blob = self.data
        if self.sha256 is not None:
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
            blob = pointer.encode()
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid

    def lfs(self, digest: str) -> dict:
        """The file's LFS fields in an API answer; the SHA-256 is called `digest` there (routes use different names)."""
        return {"lfs": {digest: self.sha256, "size": len(self.data), "pointerSize": 134}} if self.sha256 else {}


@dataclass
class Commit:
    """One commit with the complete list of its files."""

    sha: str
    parent: str | None
    title: str
    files: dict[str, File]
    date: str


@dataclass
class Repo:
    """A model or dataset repository: commits by SHA, branches, and the content of LFS files by SHA-256."""

    type: str
    id: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)

    def commit(self, branch: str, title: str, files: dict[str, File]) -> Commit:
        """Add a commit to a branch; `files` is its complete content."""
        parent = self.branches.get(branch)
        sha = hashlib.sha1(f"{self.id}{parent}{title}{secrets.token_hex(8)}".encode()).hexdigest()
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        self.commits[sha] = Commit(sha, parent, title, dict(sorted(files.items())), date)
        self.branches[branch] = sha
        return self.commits[sha]

    def at(self, revision: str) -> Commit:
        """The commit of a branch name or SHA."""
        sha = self.branches.get(revision.removeprefix("refs/heads/"), revision)
        if sha not in self.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[sha]


def check_card(content: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about a model card's metadata, by the Hub's rules for the fields that this project writes."""
    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", content, flags=re.DOTALL)
    if match is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"YAML error: {error}"], []
    if not isinstance(data, dict):
        return ["the metadata must be a mapping"], []
    errors = []
    if data.get("license", "unknown") not in LICENSES:
        errors.append(f'"license" must be one of {LICENSES}, got {data["license"]!r}')
    if data.get("pipeline_tag", "other") not in PIPELINE_TAGS:
        errors.append(f'"pipeline_tag" must be one of {PIPELINE_TAGS}, got {data["pipeline_tag"]!r}')
    if not isinstance(data.get("library_name", ""), str):
        errors.append('"library_name" must be a string')
    for key, allowed in (("tags", r".+"), ("datasets", r"[\w.-]+(/[\w.-]+)?")):
        values = data.get(key, [])
        if not isinstance(values, list) or not all(isinstance(v, str) and re.fullmatch(allowed, v) for v in values):
            errors.append(f'"{key}" must be a list of names, got {values!r}')
    if "model-index" in data:
        try:
            _, results = model_index_to_eval_results(data["model-index"])
            errors += [
                f'"model-index" metric {result.metric_type} must be a number or a string'
                for result in results
                if not isinstance(result.metric_value, (int, float, str))
            ]
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            errors.append(f'"model-index" is malformed: {error!r}')
    return errors, []
