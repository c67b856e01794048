"""The report: complete, self-contained, escaped, and quick the second time."""

import json
import re
import shlex
from html.parser import HTMLParser

import numpy as np
import PIL.Image
import pytest
import yaml
from runs import run

from custom_ddpm.cli import main
from custom_ddpm.evaluation.evidence import split_grid
from custom_ddpm.evaluation.report import Report, ReportSettings
from custom_ddpm.evaluation.report_figures import draw_bits_by_timestep
from custom_ddpm.evaluation.report_page import _grid, _interval, _number
from custom_ddpm.evaluation.report_words import FINDINGS
from custom_ddpm.evaluation.symptoms import SYMPTOMS

EVIL = "<script>alert(1)</script>"
QUICK = ["--num_images", "140", "--num_timesteps", "4", "--num_inference_steps", "2"]


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits_cache):
    folder = tmp_path_factory.mktemp("report") / "model"
    run(folder, class_conditional=True, split="train[:90%]", validation_split="train[90%:]")
    return folder


def rename_class(folder, name):
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"]["3"] = name
    (folder / "model_index.json").write_text(json.dumps(index))


def test_the_page_is_whole_and_the_second_time_measures_nothing(trained, capsys):
    rename_class(trained, EVIL)
    main(["report", str(trained), *QUICK])
    assert capsys.readouterr().out.count("measuring") == 4
    text = (trained / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags and "&lt;script&gt;alert(1)" in text
    assert page.tags.count("img") == 7 and all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "url(" not in text and "@import" not in text
    card = (trained / "report.md").read_text(encoding="utf-8")
    assert "<script>" not in card and "DPM-Solver++ 2M" in card and "| fixed" in card
    stored = json.loads((trained / "report" / "metrics.json").read_text())["metrics"][0]
    assert _number(stored["value"], stored["standard_error"]) in text
    main(["report", str(trained), "--language", "zh", *QUICK])
    assert "measuring" not in capsys.readouterr().out
    assert (trained / "report.md").read_text(encoding="utf-8").startswith("## 评估")
    assert str(trained.parent) not in text


@pytest.mark.slow
def test_an_interrupted_comparison_of_samplers_goes_on(trained, monkeypatch):
    report = Report(trained, ReportSettings(num_images=140, seed=7))
    point, calls = Report._point, []

    def dies_at_third(self, name, n, *rest):
        calls.append((name, n))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return point(self, name, n, *rest)

    monkeypatch.setattr(Report, "_point", dies_at_third)
    with pytest.raises(KeyboardInterrupt):
        report.by_steps()
    found = Report(trained, ReportSettings(num_images=140, seed=7)).by_steps()
    assert len(set(calls)) == len(calls) - 1 == len(found["points"])
    assert {each["steps"] for each in found["points"]} == {5, 10, 20}  # T is 20


@pytest.mark.slow
def test_samplers_are_not_compared_with_fewer_pictures_than_features(trained, monkeypatch):
    monkeypatch.setattr(Report, "_point", None)  # nothing is drawn
    found = Report(trained, ReportSettings(num_images=128)).by_steps()
    assert found["detail"] == "--num_images is 128; 128 features need more than 128 pictures"


@pytest.mark.slow
def test_parts_that_cannot_be_had_say_so(trained):
    file = trained / "training_config.yaml"
    before = file.read_text()
    try:
        file.write_text(yaml.safe_dump({**yaml.safe_load(before), "validation_split": None}))
        report = Report(trained, ReportSettings(num_images=140))
        assert report.bits_per_dim()["missing"] == report.memorization()["missing"] == "no_held_out"
        moved = Report(trained, ReportSettings(num_images=140, against="/no/such/folder"))
        assert moved.metrics()["missing"] == "no_data"
    finally:
        file.write_text(before)


@pytest.mark.parametrize("sampler", ["dpmsolver++", pytest.param("ddpm", marks=pytest.mark.slow)])
def test_the_command_under_the_grid_draws_the_grid(tmp_path, digits_cache, sampler):
    options = {"preview_sampler": sampler, "ddpm_num_inference_steps": 4, "eval_batch_size": 20, "learning_rate": 1e-2}
    run(tmp_path / "run", class_conditional=True, guidance_scale=1.5, seed=2, **options)
    report = Report(tmp_path / "run", ReportSettings())
    found = _grid(report, [str(digit) for digit in range(10)])
    assert ("DPM-Solver++" in found["en"]) == ("DPM-Solver++" in found["zh"]) == (sampler != "ddpm")
    words = shlex.split(found["command"].replace("MODEL", str(tmp_path / "run")))
    main([*words[1:], "--output_dir", str(tmp_path / "drawn")])
    sheet = np.asarray(PIL.Image.open(tmp_path / "run" / "samples.png"))
    again = [np.asarray(PIL.Image.open(tmp_path / "drawn" / f"seed-{2 + i}.png")) for i in range(20)]
    np.testing.assert_array_equal(split_grid(sheet[..., None], 8, 8)[:, 0], again)


def test_a_folder_that_is_no_run_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match="not the output folder of a run"):
        main(["report", str(tmp_path)])


def test_every_finding_has_a_chinese_name():
    for symptom in SYMPTOMS:
        assert re.search(r"[\u4e00-\u9fff]", FINDINGS[symptom.name])


def test_numbers_end_at_the_second_digit_of_their_error():
    assert _number(11.0638, 0.78) == "11.06" and _number(1234.5, 45.0) == "1,234" and _number(None) == "–"
    assert _interval(1.0, 0.1) == "[0.80, 1.20]" and _interval(1.0, None) == "–"


def test_the_figure_of_bits_skips_timesteps_that_were_not_drawn(tmp_path):
    values = [None if i % 3 == 1 else float(np.exp(-i / 10)) for i in range(100)]
    draw_bits_by_timestep({"fixed_small": {"timesteps": values}}, tmp_path / "bits.png")
    assert (tmp_path / "bits.png").read_bytes().startswith(b"\x89PNG")
