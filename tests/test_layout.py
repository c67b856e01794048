"""The floors of docs/design.md: every module is on one, imports from lower ones only, and is short."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each is one algorithm, shipped as one file in every model.
LONG_FILES = {"custom_ddpm.scheduler", "custom_ddpm.unet", "custom_ddpm.pipelines.pipeline_custom_ddpm"}


def modules(root: Path) -> dict[str, Path]:
    """Name -> file of every module of the package in `root`; `pipelines/` is installed as custom_ddpm.pipelines."""
    files = [*sorted((root / "custom_ddpm").rglob("*.py")), *sorted((root / "pipelines").rglob("*.py"))]
    named = {}
    for file in files:
        parts = file.relative_to(root).with_suffix("").parts
        parts = ("custom_ddpm", *parts) if parts[0] == "pipelines" else parts
        named[".".join(parts).removesuffix(".__init__")] = file
    return named


def floors(root: Path) -> list[str]:
    """The modules in the order of the block "floors" of docs/design.md, lowest first."""
    text = (root / "docs" / "design.md").read_text(encoding="utf-8")
    return re.search(r"```text\n(custom_ddpm\..*?)```", text, re.DOTALL)[1].split()


def imports(name: str, file: Path, known: set[str]) -> set[str]:
    """The modules of the package that a module imports, wherever the statement stands."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
            base = ".".join(part for part in (base if node.level else "", node.module) if part)
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            found |= {argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)}
    return {each for each in found if each in known and each != name}


def upward_imports(root: Path) -> list[str]:
    order, named = floors(root), modules(root)
    # A package's __init__ hands on the public names of its files, so it stands above the last of them.
    packages = {name for name, file in named.items() if file.name == "__init__.py" and name != "custom_ddpm"}
    floor = {name: float(i) for i, name in enumerate(order)}
    for package in packages - floor.keys():
        floor[package] = max(i for name, i in floor.items() if name.startswith(f"{package}.")) + 0.5
    free = {"custom_ddpm", "custom_ddpm._version"}
    assert named.keys() - free == floor.keys(), f"not in both: {(named.keys() - free) ^ floor.keys()}"
    return [
        f"{name} imports {other}"
        for name, file in named.items()
        if name not in free
        for other in sorted(imports(name, file, set(named)) - free)
        if floor[other] >= floor[name] and not (name in packages and other.startswith(f"{name}."))
    ]


def test_imports_go_down_only():
    # The pipeline's file stands alone in a model repository, and asks for this when the package is installed.
    assert upward_imports(ROOT) == ["custom_ddpm.pipelines.pipeline_custom_ddpm imports custom_ddpm.hub.folder"]


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("custom_ddpm/schedules.py", "from .scheduler import CustomDDPMScheduler"),
        ("custom_ddpm/data/pixels.py", "from ..training.loop import training_steps"),
        ("custom_ddpm/objective.py", "import custom_ddpm.cli"),
        ("custom_ddpm/hub/card.py", "def late():\n    from . import push"),
    ],
)
def test_a_planted_upward_import_is_found(tmp_path, file, line):
    for name, source in {"docs/design.md": ROOT / "docs" / "design.md"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(source.read_bytes())
    for source in modules(ROOT).values():
        copy = tmp_path / source.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(source.read_bytes())
    before = upward_imports(tmp_path)
    with (tmp_path / file).open("a") as target:
        target.write(f"\n{line}\n")
    assert len(upward_imports(tmp_path)) == len(before) + 1


def test_files_and_functions_are_short():
    for name, file in modules(ROOT).items():
        text = file.read_text(encoding="utf-8")
        assert name in LONG_FILES or len(text.splitlines()) <= 400, name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= 60, f"{name}.{node.name} has {lines} lines"


def test_every_folder_of_the_package_is_installed():
    packages = {name for name, file in modules(ROOT).items() if file.name == "__init__.py"}
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(settings["tool"]["setuptools"]["packages"]) == packages
