"""The derivation is up to date and equivalent in both languages; its script detects wrong coefficients and snippets."""

import contextlib
import dataclasses
import importlib
import io
import json
import re
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch

from custom_ddpm import data, objective, schedules
from custom_ddpm.scheduler import CustomDDPMScheduler
from custom_ddpm.training import randomness

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = ("derivation.md", "derivation.zh.md")
NOTEBOOKS = ("derivation.ipynb", "derivation.zh.ipynb")
NUMBERS = [*(f"F{i}" for i in range(1, 10)), *(f"R{i}" for i in range(1, 8)), "T1", "T2", "S1", "S2", "S3", "S4"]


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DOCS))
        return importlib.import_module("make_derivation")


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(DOCS))
    return importlib.import_module("derivation_figures")


def read(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def fences(text: str) -> list[str]:
    return re.findall(r"^```\w+\n.*?^```$", text, re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    return re.sub(r"^```\w+\n.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def test_the_committed_pages_are_what_the_script_writes(generator: ModuleType) -> None:
    generator.main(["--check"])


def test_a_page_that_is_not_up_to_date_is_detected(generator: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {page: read(page) for page in PAGES}
    monkeypatch.setattr(generator, "pages", lambda: {**texts, "derivation.zh.md": texts["derivation.zh.md"] + "\n"})
    with pytest.raises(SystemExit, match=r"derivation\.zh\.md is not up to date"):
        generator.main(["--check"])


def with_snippet(generator: ModuleType, name: str, snippet: str) -> dict[str, Any]:
    return {**generator.FORMULAS, name: dataclasses.replace(generator.FORMULAS[name], snippet=snippet)}


@pytest.mark.parametrize(
    ("name", "snippet", "message"),
    [
        ("F3", "x_t = scheduler.forward_step(x_s, t, noise)\n", "F3: changes x_t of the set-up"),
        ("R7", "noise.mul_(2)\n", "R7: changes noise of the set-up"),
        ("R1", "print('s' in globals())\n", "R1: prints something else after the snippets before it"),
        ("S1", "assert 'mean' not in globals()\n", "S1: fails after the snippets before it"),
    ],
)
def test_a_snippet_that_does_not_run_both_alone_and_after_the_others_is_named(
    name: str, snippet: str, message: str, generator: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generator, "FORMULAS", with_snippet(generator, name, snippet))
    outputs = {key: generator.run(formula.snippet)[1] for key, formula in generator.FORMULAS.items()}
    with pytest.raises(SystemExit, match=message):
        generator.run_in_one_session(outputs)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_from_top_to_bottom_and_prints_what_it_shows(name: str) -> None:
    cells = [cell for cell in json.loads(read(name))["cells"] if cell["cell_type"] == "code"]
    session: dict[str, Any] = {}
    for cell in cells:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec("".join(cell["source"]), session)
        assert printed.getvalue() == "".join(line for output in cell["outputs"] for line in output["text"])
    # The set-up and every snippet of the page, in its order; before them the cell that installs.
    on_the_page = re.findall(r"^```python\n(.*?)\n```$", read(name.replace("ipynb", "md")), re.MULTILINE | re.DOTALL)
    assert ["".join(cell["source"]) for cell in cells[1:]] == on_the_page


@pytest.mark.parametrize("name", NOTEBOOKS)
@pytest.mark.parametrize("missing", [True, False])
def test_the_first_cell_installs_the_package_only_where_it_is_missing(
    name: str, missing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, calls = json.loads(read(name))["cells"][0], []
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None if missing else package)
    monkeypatch.setattr(subprocess, "run", lambda command, check: calls.append(command[1:]))
    exec("".join(first["source"]), {})
    install = ["-m", "pip", "install", "--quiet", "git+https://github.com/custom-ddpm/custom-ddpm"]
    assert calls == ([install] if missing else [])


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_has_the_fields_of_nbformat_4_5(name: str) -> None:
    content = json.loads(read(name))
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in content["cells"]]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-zA-Z0-9-_]{1,64}", each) for each in ids)
    for cell in content["cells"]:
        extra = {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert set(cell) == {"cell_type", "id", "metadata", "source"} | extra
        assert "{{" not in "".join(cell["source"])


# For each formula, a function whose results are scaled by 1.0001: the check must detect it.
WRONG = {
    "F1": (data, "normalise"),
    "F3": (CustomDDPMScheduler, "forward_step"),
    "F4": (schedules, "make_betas"),
    "F5": (CustomDDPMScheduler, "forward_step"),
    "F6": (CustomDDPMScheduler, "forward_step"),
    "F7": (CustomDDPMScheduler, "add_noise"),
    "F8": (CustomDDPMScheduler, "add_noise"),
    "F9": (CustomDDPMScheduler, "add_noise"),
    "R1": (CustomDDPMScheduler, "add_noise"),
    "R2": (CustomDDPMScheduler, "posterior_mean_variance"),
    "R3": (CustomDDPMScheduler, "forward_step"),
    "R4": (CustomDDPMScheduler, "posterior_mean_variance"),
    "R5": (CustomDDPMScheduler, "predict_original_sample"),
    "R6": (CustomDDPMScheduler, "predict_mean_log_variance"),
    "R7": (CustomDDPMScheduler, "posterior_mean_variance"),
    "T1": (objective, "training_target"),
    "T2": (objective, "simple_loss"),
    "S1": (CustomDDPMScheduler, "_level_coefficients"),
    "S2": (CustomDDPMScheduler, "posterior_mean_variance"),
    "S3": (CustomDDPMScheduler, "_multistep_weights"),
    "eta": (CustomDDPMScheduler, "posterior_mean_variance"),
    "learned": (CustomDDPMScheduler, "predict_mean_log_variance"),
    "zero-snr": (CustomDDPMScheduler, "predict_original_sample"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_function_that_is_slightly_wrong_is_named(
    name: str, generator: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, attribute = WRONG[name]
    right = getattr(owner, attribute)

    def wrong(*args: Any, **kwargs: Any) -> Any:
        result = right(*args, **kwargs)
        return tuple(part * 1.0001 for part in result) if isinstance(result, tuple) else result * 1.0001

    formula = generator.FORMULAS[name]
    generator.compare(name, formula, generator.run(formula.snippet)[0])
    monkeypatch.setattr(owner, attribute, wrong)
    with pytest.raises(SystemExit, match=rf"^{name}: \w+ is \S+ in code and \S+ by the formula"):
        generator.compare(name, formula, generator.run(formula.snippet)[0])


def test_noise_that_is_not_standard_normal_is_named(generator: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    right = randomness.draw
    monkeypatch.setattr(
        randomness, "draw", lambda **kwargs: right(**kwargs)._replace(noise=1.05 * right(**kwargs).noise)
    )
    formula = generator.FORMULAS["F2"]
    with pytest.raises(SystemExit, match="F2: variance"):
        generator.compare("F2", formula, generator.run(formula.snippet)[0])


@pytest.mark.parametrize("page", PAGES)
def test_every_formula_has_its_section_in_order(page: str) -> None:
    assert re.findall(r"^### ([FRTS]\d) · ", read(page), re.MULTILINE) == NUMBERS


def test_both_languages_have_the_same_code_numbers_formulas_figures_and_sources() -> None:
    english, chinese = read(PAGES[0]), read(PAGES[1]).replace(".zh.png", ".png")
    assert fences(english) == fences(chinese)
    for pattern in (r"\$\$.+?\$\$", r"\]\((?:\.\./|figures/|https:)[^)]+\)", r"^\| .+ \|$"):
        found = [
            re.findall(pattern, prose(page), re.MULTILINE) for page in (english, chinese.replace(".zh.png", ".png"))
        ]
        assert found[0]
        assert found[0] == found[1]


@pytest.mark.parametrize("page", PAGES)
def test_links_point_to_the_line_that_they_name(page: str) -> None:
    links = re.findall(r"\[`([\w.]+)`\]\((\.\./[\w./]+)#L(\d+)\)", read(page))
    assert len(links) > len(NUMBERS)
    for name, path, number in links:
        line = (DOCS / path).resolve().read_text(encoding="utf-8").splitlines()[int(number) - 1]
        assert f"def {name.rsplit('.')[-1]}(" in line


@pytest.mark.parametrize("page", PAGES)
def test_links_without_a_line_point_to_files(page: str) -> None:
    for path in re.findall(r"\]\(((?!https:)[^)#]+)\)", prose(read(page))):
        assert (DOCS / path).resolve().is_file(), path


def test_the_figures_are_all_shown_and_small() -> None:
    shown = {name for page in PAGES for name in re.findall(r"figures/([\w.]+\.png)", read(page))}
    files = {path.name: path.stat().st_size for path in (DOCS / "figures").iterdir()}
    assert set(files) == shown
    assert max(files.values()) < 150_000


@pytest.mark.parametrize("page", PAGES)
def test_github_renders_the_mathematics(page: str) -> None:
    """GitHub processes mathematics as Markdown first, and recognises it only between certain characters."""
    text = prose(read(page))
    inline = re.findall(r"(.?)\$([^$\n]+)\$(.?)", re.sub(r"\$\$.+?\$\$", "", text))
    assert len(inline) > 100
    for before, _, after in inline:
        assert before in ("", " "), (before, _)
        assert after in ("", " ", *".,;:!?)*，。；：！？、）"), (_, after)
    for mathematics in [m for _, m, _ in inline] + re.findall(r"\$\$(.+?)\$\$", text):
        # An escaped punctuation mark, the start of emphasis, a tag.
        assert not re.search(r"\\[^a-zA-Z]|[^\w\s]_|\*|<\S", mathematics), mathematics


def test_every_figure_with_words_is_shown_in_chinese_on_the_chinese_page(figures: ModuleType) -> None:
    """The labels of a figure without words are formulas and numbers only."""
    source = Path(figures.__file__).read_text(encoding="utf-8")
    with_words = re.findall(r"def (\w+)\(say: Say\)", source)
    shown = re.findall(r"figures/([\w.]+)\.png", read("derivation.zh.md"))
    assert sorted(shown) == sorted([*(f"{name}.zh" for name in with_words), "noise_levels", "reverse_chain"])
    for label in figures.CHINESE.values():
        assert re.search("[\u4e00-\u9fff]", label), label


def test_without_the_chinese_font_the_error_names_it(figures: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures.font_manager, "findSystemFonts", lambda: ["/usr/share/fonts/DejaVuSans.ttf"])
    with pytest.raises(SystemExit, match=r"need the font WenQuanYi Micro Hei .* apt install fonts-wqy-microhei"):
        figures.add_chinese_font()


@pytest.mark.parametrize("label", ["采样", "$x_t$ 的采样"])
def test_a_character_that_no_font_has_is_an_error_and_not_a_box(
    label: str, figures: ModuleType, tmp_path: Path
) -> None:
    figure, axes = plt.subplots(figsize=(2, 1))
    axes.set_title(label, fontfamily="DejaVu Sans")
    with pytest.raises((SystemExit, UserWarning), match=r"[Gg]lyph"):
        figures._save(figure, tmp_path / "figure.png")
    assert not (tmp_path / "figure.png").exists()


def test_snippets_change_no_global_state(generator: ModuleType) -> None:
    generator.run("torch.randn(3)")
    assert torch.get_default_dtype() == torch.float32
