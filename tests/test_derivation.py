"""The derivation pages are up to date and equivalent in both languages; their script detects wrong coefficients."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from custom_ddpm import data, objective, schedules
from custom_ddpm.scheduler import CustomDDPMScheduler
from custom_ddpm.training import randomness

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = ("derivation.md", "derivation.zh.md")
NUMBERS = [*(f"F{i}" for i in range(1, 10)), *(f"R{i}" for i in range(1, 8)), "T1", "T2", "S1"]


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_derivation", DOCS / "make_derivation.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    "S1": (CustomDDPMScheduler, "predict_mean_log_variance"),
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
    english, chinese = map(read, PAGES)
    assert fences(english) == fences(chinese)
    for pattern in (r"\$\$.+?\$\$", r"\]\((?:\.\./|figures/|https:)[^)]+\)", r"^\| .+ \|$"):
        found = [re.findall(pattern, prose(page), re.MULTILINE) for page in (english, chinese)]
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
    shown = set(re.findall(r"figures/(\w+\.png)", read(PAGES[0])))
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


def test_snippets_change_no_global_state(generator: ModuleType) -> None:
    generator.run("torch.randn(3)")
    assert torch.get_default_dtype() == torch.float32
