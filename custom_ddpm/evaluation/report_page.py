"""The pages of the report: `report.html`, one file with its pictures inside, and `report.md` for the model card.

Both are made from templates of Jinja beside this file. In the HTML page every value is escaped by Jinja; Markdown has
the filter `md`.
"""

import base64
import importlib.metadata
import json
import math
import platform
import shlex
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from .._version import __version__
from ..hub.card import LIBRARIES, _count_parameters, _image_format, _is_public, _last_name, _public_command
from ..messages import in_markdown, one_line, shown
from ..sampling import clipping
from ..training.ending import add_bounds
from .diagnosis import diagnose
from .records import BOUNDS_FILE, CONFIG_FILE, read_json, read_metrics
from .report import DISTANCES_FILE, NEIGHBOURS_FILE, Report
from .report_figures import draw_bits_by_timestep, draw_by_steps, draw_candidates
from .report_words import FINDINGS, KINDS, METRICS, NOTES, REASONS, translated
from .tune import FILE as TUNED_FILE

PAGE_FILE, CARD_FILE = "report.html", "report.md"
MAX_CLASSES = 100  # that are listed


def write_report(report: Report, language: str = "en", command: str = "custom-ddpm report") -> tuple[Path, Path]:
    """Measure what is missing and write both files to the run's folder.

    Args:
        report: measures.
        language: "en" or "zh": which one the page opens in (it has both), and that of the Markdown file.
        command: command line that makes the report again, for the page.

    Returns:
        The files `report.html` and `report.md`.
    """
    page = describe(report) | {"language": language, "report_command": _public_command(command)}
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["md"] = in_markdown
    environment.globals["w"] = lambda en, zh: zh if language == "zh" else en
    written = []
    for name, escape in ((PAGE_FILE, True), (CARD_FILE, False)):
        environment.autoescape = escape
        source = files(__package__).joinpath(f"{name}.j2").read_text(encoding="utf-8")
        text = environment.from_string(source).render(page)
        partial = report.run / f".{name}.tmp"
        partial.write_text(text, encoding="utf-8")
        partial.replace(report.run / name)
        written.append(report.run / name)
    return written[0], written[1]


def describe(report: Report) -> dict[str, Any]:
    """Everything that the templates show of a run; a part that cannot be had is {"missing": words}."""
    run = report.run
    index, model, noise = (
        json.loads((run / name).read_text(encoding="utf-8"))
        for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json")
    )
    kind, size = _image_format(model)
    steps = max((line["step"] for line in read_metrics(run)), default=0)
    parameters, T = _count_parameters(run / "unet"), noise["num_train_timesteps"]
    names = index.get("id2label") or {}
    classes = [shown(str(names[key])) for key in sorted(names, key=int)]
    more = f" … ({len(classes)})" if len(classes) > MAX_CLASSES else ""
    levels, findings = _levels(run), _findings(run)
    page: dict[str, Any] = {
        "name": shown(_last_name(str(run.resolve()))),
        "facts": {
            "en": f"{kind} pictures, {size}; {parameters:,} parameters; {steps:,} optimiser steps; T = {T:,}.",
            "zh": f"{KINDS.get(kind, kind)}图片，{size}；{parameters:,} 个参数；{steps:,} 个优化步；T = {T:,}。",
        },
        "classes": ", ".join(classes[:MAX_CLASSES]) + more,
        "grid": _grid(report, classes),
        "curve": _file(run / "loss_curve.png", "no_curve"),
        "levels": levels,
        "findings": findings,
        "recipe": [
            (key, shown(str(value), 200))
            for key, value in vars(report.config).items()
            if _is_public(key, value) and key != "dataset_config_name"
        ],
        "command": f"custom-ddpm train --config {CONFIG_FILE}",
        "versions": ", ".join(_versions()),
        "metrics": _metrics(report.metrics()),
        "memorization": _memorization(report.memorization(), report),
        "bits": _bits(report.bits_per_dim(), report),
        "by_steps": _by_steps(report.by_steps(), report),
        "candidates": _candidates(report),
    }
    return page | {"tiles": _tiles(page)}


def _versions() -> list[str]:
    libraries = (f"{each} {importlib.metadata.version(each)}" for each in LIBRARIES)
    return [f"custom-ddpm {__version__}", *libraries, f"Python {platform.python_version()}"]


def data_uri(file: Path) -> str:
    """A PNG file as a data URI."""
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode("ascii")


def _missing(reason: str, detail: str = "") -> dict[str, Any]:
    en, zh = (words.format(shown(detail, 300).rstrip(".")) for words in REASONS[reason])
    return {"missing": {"en": en, "zh": zh}}


def _file(file: Path, reason: str) -> dict[str, Any]:
    return {"uri": data_uri(file), "missing": None} if file.is_file() else {**_missing(reason), "uri": None}


def _number(value: float | None, error: float | None = None) -> str:
    """A number to the second digit of its standard error; to four digits if it has none."""
    if value is None:
        return "–"
    decimals = 1 - math.floor(math.log10(error)) if error else 7
    return f"{value:.4g}" if decimals > 6 else f"{value:,.{max(0, decimals)}f}"


def _with_error(value: float | None, error: float | None) -> str:
    """value ± standard error."""
    if value is None or not error:
        return _number(value)
    return f"{_number(value, error)} ± {_number(error, error) if error >= 1e-5 else format(error, '.2g')}"


def _interval(value: float | None, error: float | None, percent: bool = False) -> str:
    """value ± 1.96 standard errors."""
    if value is None or error is None:
        return "–"
    ends = (value - 1.96 * error, value + 1.96 * error)
    low, high = (f"{max(0.0, end):.1%}" if percent else _number(end, error) for end in ends)
    return f"[{low}, {high}]"


# ---- what the run wrote ----


def _grid(report: Report, classes: Sequence[str]) -> dict[str, Any]:
    config, found = report.config, _file(report.run / "samples.png", "no_grid")
    count, first = config.eval_batch_size, config.seed
    steps = config.ddpm_num_inference_steps or config.ddpm_num_steps
    fast = config.preview_sampler == "dpmsolver++"
    sampler_en, sampler_zh = ("DPM-Solver++", " DPM-Solver++ ") if fast else ("the ancestral sampler", "祖先采样 ")
    en = f"{count} pictures, seeds {first} to {first + count - 1}, {steps} steps of {sampler_en}"
    zh = f"{count} 张图片，种子 {first} 到 {first + count - 1}，{sampler_zh.lstrip()}{steps} 步"
    command = f"custom-ddpm sample MODEL --num_images {count} --seed {first} --num_inference_steps {steps}"
    if fast:
        options = " ".join(
            f"{name}={str(value).lower()}" for name, value in clipping(report.pipeline.scheduler).items()
        )
        command += f" --scheduler DPMSolverMultistepScheduler --scheduler_options timestep_spacing=trailing {options}"
    if classes:
        en, zh = f"{en}, guidance scale {config.guidance_scale:g}", f"{zh}，引导系数 {config.guidance_scale:g}"
        command += f" --guidance_scale {config.guidance_scale:g}"
        if len(classes) <= 16:
            command += f" --class_labels {' '.join(map(shlex.quote, classes))}"
            words = ", ".join(classes)
            en, zh = f"{en}; each column is a class: {words}", f"{zh}；每一列是一个类别：{words}"
    return {**found, "en": f"{en}.", "zh": f"{zh}。", "command": command}


def _levels(run: Path) -> dict[str, Any]:
    """`loss_by_timestep.png`, with its bounds if they can be computed."""
    problem: dict[str, Any] = {"missing": None}
    if not (run / BOUNDS_FILE).is_file():
        try:
            add_bounds(run)
        except (ValueError, OSError) as error:
            problem = _missing("no_bounds", one_line(error))
    file = run / "loss_by_timestep.png"
    en = "Loss at each noise level."
    zh = "各噪声水平的损失。"
    if problem["missing"] is None:
        en += " Below the dashed curve the model has learnt more than mean and covariance (best linear denoiser); near "
        en += "the dotted curve it remembers its training pictures."
        zh += "低于虚线：模型学到的不只是均值和协方差（最好的线性去噪器）；接近点线：模型背下了训练图片。"
    return {**problem, "uri": data_uri(file) if file.is_file() else None, "en": en, "zh": zh}


def _findings(run: Path) -> list[dict[str, str]]:
    return [
        {
            "name": found.name,
            "zh": FINDINGS.get(found.name, found.name),
            "evidence": shown(found.evidence, 500),
            "remedy": shown(found.remedy, 300),
        }
        for found in diagnose(run)
    ]


# ---- what was measured ----


def _metrics(part: Mapping[str, Any]) -> dict[str, Any]:
    if "missing" in part:
        return _missing(part["missing"], part["detail"])
    rows = [
        {
            "name": shown(each["name"]),
            "zh": translated(shown(each["name"]), METRICS),
            "value": _number(each["value"], each["standard_error"]),
            "interval": _interval(each["value"], each["standard_error"]),
            "note": shown(each["note"], 300),
            "note_zh": translated(shown(each["note"], 300), NOTES),
        }
        for each in part["metrics"]
    ]
    return {
        "missing": None,
        "rows": rows,
        "drawn": f"{part['pictures']['num_images']:,}",
        "pictures": shown(part["pictures"]["description"], 200),
        "pictures_zh": translated(shown(part["pictures"]["description"], 200), NOTES),
        "references": f"{part['reference']['num_images']:,}",
        "reference": shown(part["reference"]["description"], 200),
    }


def _memorization(part: Mapping[str, Any], report: Report) -> dict[str, Any]:
    if "missing" in part:
        return _missing(part["missing"], part["detail"])
    rows = [
        {
            "name": shown(name),
            "zh": translated(shown(name), METRICS),
            "share": f"{each['share']['value']:.1%}",
            "interval": _interval(each["share"]["value"], each["share"]["error"], percent=True),
            "identical": each["identical"],
            "copies": each["copies"],
        }
        for name, each in part["spaces"].items()
    ]
    space = shown(part["neighbours"])
    return {
        "missing": None,
        "rows": rows,
        "distances": data_uri(report.folder / DISTANCES_FILE),
        "neighbours": data_uri(report.folder / NEIGHBOURS_FILE),
        "en": f"Left: drawn pictures; to their right the 4 nearest training pictures ({space}).",
        "neighbours_zh": f"左列：生成的图片；右边四列：最近的训练图片（{translated(space, METRICS)}）。",
    }


def _bits(part: Mapping[str, Any], report: Report) -> dict[str, Any]:
    if "missing" in part:
        return _missing(part["missing"], part["detail"])
    figure = report.folder / "bits_by_timestep.png"
    draw_bits_by_timestep(part["variances"], figure)
    rows = []
    for name, each in part["variances"].items():
        total = each["parts"]["total"]
        values = [_with_error(value["value"], value["error"]) for value in each["parts"].values()]
        rows.append({"name": name, "parts": values, "interval": _interval(total["value"], total["error"])})
    first = next(iter(part["variances"].values()))
    return {
        "missing": None,
        "rows": rows,
        "uri": data_uri(figure),
        "count": f"{first['num_images']:,}",
        "pictures": shown(part["pictures"], 200),
        "num_timesteps": part["num_timesteps"],
    }


def _by_steps(part: Mapping[str, Any], report: Report) -> dict[str, Any]:
    if "missing" in part:
        return _missing(part["missing"], part["detail"])
    points = {(point["sampler"], point["steps"]): point for point in part["points"]}
    steps = sorted({n for _, n in points})
    rows = []
    for name in dict.fromkeys(name for name, _ in points):
        found = [points.get((name, n), {"value": None, "error": None}) for n in steps]
        cells = [_with_error(point["value"], point["error"]) for point in found]
        rows.append({"name": name, "cells": cells})
    notes = {f"{point['sampler']}: {shown(point['note'], 300)}": None for point in part["points"] if point["note"]}
    figure = report.folder / "by_steps.png"
    some = any(point["value"] is not None for point in part["points"])
    if some:
        draw_by_steps(part, figure)
    return {
        "missing": None,
        "uri": data_uri(figure) if some else None,
        "metric": shown(part["metric"]),
        "metric_zh": translated(shown(part["metric"]), METRICS),
        "steps": steps,
        "rows": rows,
        "notes": list(notes),
        "count": f"{part['num_images']:,}",
    }


def _candidates(report: Report) -> dict[str, Any] | None:
    """What `custom-ddpm tune` measured; None for a model that was not tuned, or by other measurements."""
    tuned = report.pipeline.scheduler.config.get("tuned")
    stored = read_json(report.run / TUNED_FILE) or {}
    if not tuned or stored.get("tuned") != tuned:
        return None
    figure = report.folder / "candidates.png"
    metric, distances = shown(stored.get("metric") or f"FD ({stored['features']})"), stored["distances"]
    draw_candidates(distances, tuned, metric, figure)
    rows = []
    for entry in tuned:
        steps, order, eta, spacing = entry.split()
        en = f"order {order.rstrip('c')}{', corrected' * (order == '2c')}, η = {eta}, {spacing} timesteps"
        zh = f"{order.rstrip('c')} 阶{'，带校正' * (order == '2c')}，η = {eta}，{spacing} 时刻"
        rows.append({"steps": steps, "en": en, "zh": zh, "value": _number(distances[entry])})
    reference = stored["reference"]
    return {
        "uri": data_uri(figure),
        "rows": rows,
        "metric": metric,
        "metric_zh": translated(metric, METRICS),
        "count": f"{stored['num_images']:,}",
        "reference": shown(reference, 200),
        "reference_zh": translated(shown(reference, 200), NOTES),
    }


# ---- the first numbers ----


def _tile(en: str, zh: str, value: str, under: str, mood: str = "", **words: str) -> dict[str, str]:
    both = {"value_en": value, "value_zh": value, "under_en": under, "under_zh": under}
    return {"en": en, "zh": zh, "mood": mood, **both, **words}


def _tiles(page: Mapping[str, Any]) -> list[dict[str, str]]:
    count = len(page["findings"])
    tiles = [
        _tile(
            "Diagnosis",
            "诊断",
            f"{count} finding{'s' * (count != 1)}" if count else "Nothing found",
            "what is wrong, and what changes it",
            "bad" if count else "good",
            value_zh=f"{count} 个问题" if count else "没有问题",
            under_zh="哪里不对，怎么改",
        )
    ]
    if page["metrics"]["missing"] is None:
        shown_metrics = [row for row in page["metrics"]["rows"] if row["name"].startswith(("F", "KID"))]
        plain = [row for row in shown_metrics if "∞" not in row["name"]]
        tiles += [_tile(row["name"], row["zh"], row["value"], row["interval"]) for row in plain[:2]]
    if page["bits"]["missing"] is None:
        row = page["bits"]["rows"][0]
        tiles.append(_tile("Bits per dimension", "每维比特数", row["parts"][-1].split(" ")[0], row["interval"]))
    if page["memorization"]["missing"] is None:
        rows = page["memorization"]["rows"]
        copies, row = any(row["copies"] for row in rows), rows[-1]
        words = {"value_zh": "是" if copies else "否", "under_zh": f"{row['share']}，不照抄时为 5%"}
        tiles.append(
            _tile(
                "Does it copy?",
                "是否照抄",
                "Yes" if copies else "No",
                f"{row['share']}, 5% without copying",
                "bad" if copies else "good",
                **words,
            )
        )
    return tiles
