"""The runs under a folder, and what one of them shows: progress, losses, newest grid, diagnosis."""

import contextlib
import functools
import html
import io
from pathlib import Path

import PIL.Image
import yaml

from ..evaluation.diagnosis import diagnose
from ..evaluation.records import BOUNDS_FILE, CONFIG_FILE, FINAL_LOSS_FILE, METRICS, read_json, read_metrics
from ..evaluation.report_words import FINDINGS
from ..messages import one_line, shown
from ..training.metrics import draw_loss_by_timestep
from .drawing import picture_html
from .limits import Limits, open_upload
from .texts import say

MOST = 200  # runs in the list


def find_runs(root: Path) -> list[str]:
    """Names of the output folders of runs in a folder and two levels below, the newest first; no links out of it."""
    root = root.resolve()
    found = {file.parent for pattern in ("", "*/", "*/*/") for file in root.glob(pattern + CONFIG_FILE)}
    inside = [each for each in found if each.resolve().is_relative_to(root)]
    inside.sort(key=lambda each: (each / CONFIG_FILE).stat().st_mtime, reverse=True)
    return [each.relative_to(root).as_posix() for each in inside[:MOST]]


def run_folder(root: Path, name: str | None) -> Path | None:
    """The folder of a name of `find_runs`; None if there is no such run."""
    return root.resolve() / name if name is not None and name in find_runs(root) else None


def stamp(run: Path) -> tuple:
    """What changes when there is something new to show of a run."""
    names = (METRICS, BOUNDS_FILE, FINAL_LOSS_FILE, CONFIG_FILE, "scheduler/scheduler_config.json", "samples.png")
    files = [run / name for name in names]
    grid = newest_grid(run)
    return (
        str(run),
        *((file.stat().st_mtime_ns, file.stat().st_size) for file in [*files, grid] if file and file.is_file()),
        grid and grid.name,
    )


def newest_grid(run: Path) -> Path | None:
    """The newest sample grid of a run that is a file in its folder."""
    grids = [*sorted((run / "samples").glob("step-*.png"), reverse=True), run / "samples.png"]
    return next((each for each in grids if each.is_file() and each.resolve().is_relative_to(run.resolve())), None)


def run_html(run: Path, language: str, now: tuple) -> str:
    """Progress, losses by noise level, newest grid and diagnosis of a run; `now` is its stamp."""
    try:
        diagnosis = _diagnosis(run, language, now)
    except (ValueError, OSError, TypeError, LookupError, ArithmeticError) as error:  # files that are still written
        diagnosis = f"<p>{html.escape(say(language, 'no_diagnosis', reason=one_line(error)))}</p>"
    return f"{_what_was_written(run, language, now)}<h2>{say(language, 'diagnosis')}</h2>{diagnosis}"


@functools.lru_cache(maxsize=16)
def _what_was_written(run: Path, language: str, _: tuple) -> str:
    """All but the diagnosis."""
    lines = read_metrics(run)
    progress = f'<p role="status">{html.escape(_progress(run, lines, language))}</p>'
    figures = []
    losses = _losses(run, lines)
    if losses is not None:
        figures.append(picture_html(losses, say(language, "losses")))
    grid = newest_grid(run)
    if grid is not None:
        with contextlib.suppress(ValueError):  # it is being written
            figures.append(picture_html(open_upload(grid, Limits(), language), say(language, "newest_grid")))
    return f'{progress}<div class="view run">{"".join(figures)}</div>'


def _progress(run: Path, lines: list[dict], language: str) -> str:
    losses = [line for line in lines if line.get("loss") is not None]
    if not losses:
        return say(language, "not_begun")
    try:
        settings = yaml.safe_load((run / CONFIG_FILE).read_text(encoding="utf-8"))
        total = f"{settings['max_train_steps']:,}"
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError):
        total = "?"
    return say(language, "progress", step=f"{losses[-1]['step']:,}", total=total, loss=f"{losses[-1]['loss']:.4g}")


def _losses(run: Path, lines: list[dict]) -> PIL.Image.Image | None:
    """The losses by noise level as they are now: the run draws its own picture at intervals only."""
    file = io.BytesIO()
    bounds, final = (read_json(run / name) for name in (BOUNDS_FILE, FINAL_LOSS_FILE))
    try:
        draw_loss_by_timestep(lines, file, bounds, final)
    except (ValueError, LookupError, TypeError):  # lines of another version, or damaged
        return None
    return PIL.Image.open(file) if file.getvalue() else None


@functools.lru_cache(maxsize=16)  # which keeps no errors
def _diagnosis(run: Path, language: str, _: tuple) -> str:
    findings = diagnose(run)
    if not findings:
        return f"<p>{say(language, 'nothing_found')}</p>"
    items = []
    for finding in findings:
        name = FINDINGS.get(finding.name, finding.name) if language == "zh" else finding.name
        evidence = html.escape(shown(f"{finding.evidence}; {finding.remedy}", 600))
        items.append(f"<li><strong>{html.escape(name)}</strong>: {evidence}</li>")
    return f"<ul>{''.join(items)}</ul>"
