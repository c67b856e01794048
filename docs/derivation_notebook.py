"""The derivation as a Jupyter notebook (nbformat 4.5). Called by make_derivation.py."""

import json
import tomllib
from pathlib import Path
from typing import Any

INSTALL = """
# Does nothing where custom_ddpm is installed. Elsewhere, on Colab for example, it installs it.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("custom_ddpm") is None:
    source = "git+{source}"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", source], check=True)
    importlib.invalidate_caches()
"""


def install_code() -> str:
    """Code that installs the package, if it is missing, from the repository that pyproject.toml names."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return INSTALL.replace("{source}", project["urls"]["Source"])


def notebook(parts: list[str | tuple[str, str]]) -> str:
    """Write a notebook as JSON text.

    Args:
        parts: the text in order; a string is Markdown, a pair is code and what it prints.
    """
    cells: list[dict[str, Any]] = []
    count = 0
    for part in [(install_code(), ""), *parts]:
        text = (part if isinstance(part, str) else part[0]).strip()
        if not text:
            continue
        cell = {"cell_type": "markdown", "id": f"cell-{len(cells)}", "metadata": {}, "source": lines(text)}
        if not isinstance(part, str):
            count += 1
            printed = [{"name": "stdout", "output_type": "stream", "text": lines(part[1])}] if part[1] else []
            cell |= {"cell_type": "code", "execution_count": count, "outputs": printed}
        cells.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def lines(text: str) -> list[str]:
    """The lines of a text, each with its line break, as notebooks store them."""
    return text.splitlines(keepends=True)
