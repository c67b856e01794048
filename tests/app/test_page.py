"""The page without a browser: its functions, its refusals, its limits, its texts, and the lines that it shows."""

import io
import re
import string
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
from conftest import make_pipeline

from custom_ddpm import CustomDDPMPipeline
from custom_ddpm.app import command
from custom_ddpm.app.limits import MAX_DRAWINGS, MB, Limits, check_request, checked_upload, open_upload, refusal
from custom_ddpm.app.texts import LANGUAGES, TEXTS, say
from custom_ddpm.cli import main

gr = pytest.importorskip("gradio")
from starlette.exceptions import HTTPException  # noqa: E402

from custom_ddpm.app import drawing, generate  # noqa: E402
from custom_ddpm.app.examples import picture_input  # noqa: E402
from custom_ddpm.app.page import Settings, build_page, is_loopback, launch_options  # noqa: E402
from custom_ddpm.app.worker import Model, Stopped, watch  # noqa: E402

LIMITS = Limits(steps=20, pictures=9)


@pytest.fixture
def model(tmp_path):
    """A saved model with three classes."""
    make_pipeline(classes=3).save_pretrained(tmp_path / "model")
    return Model(str(tmp_path / "model"), CustomDDPMPipeline.from_pretrained(tmp_path / "model"))


# ---- texts ----


def test_both_languages_have_every_text_and_its_values():
    for key, texts in TEXTS.items():
        assert len(texts) == len(LANGUAGES) and all(texts), key
        fields = [{name for _, name, _, _ in string.Formatter().parse(text) if name} for text in texts]
        assert fields[0] == fields[1], key
        assert texts[0] != texts[1], key
        assert key == "other_language" or not re.search(r"[\u4e00-\u9fff]", texts[0]), key


def test_every_text_is_used():
    code = "".join(file.read_text(encoding="utf-8") for file in Path(command.__file__).parent.glob("*.py"))
    assert [key for key in TEXTS if len(re.findall(rf'["\']{key}["\']', code)) < 2] == []


# ---- the door ----


def test_without_gradio_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match=r"^custom-ddpm: error: [^\n]*pip install 'custom-ddpm\[app\]'$"):
        main(["app"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port", "0"], "--port is 0; it must be between 1 and 65535"),
        (["--runs", "nowhere"], "--runs is nowhere, which is no folder"),
        (["--max_steps", "0"], "--max_steps is 0; it must be at least 2"),
        (["--max_seconds", "nan"], "--max_seconds is nan; it must be at least 1"),
        (["nowhere"], "nowhere"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as refused:
        main(["app", *words])
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_help_imports_neither_torch_nor_gradio():
    program = "import sys; from custom_ddpm.cli import make_parser; make_parser(); "
    program += "print({'torch', 'gradio'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "set()"


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.2"])
def test_a_host_for_others_says_what_it_means_and_shows_no_paths(host, monkeypatch, capsys, tmp_path):
    from custom_ddpm.app import page

    names = []
    monkeypatch.setattr(page, "serve", lambda settings, started: (names.append(settings.model.name), started()))
    monkeypatch.setattr(command, "_model", lambda name: Model(str(tmp_path), None))
    main(["app", "--host", host])
    assert "everybody" in capsys.readouterr().out
    main(["app"])
    assert "everybody" not in capsys.readouterr().out
    assert names == [tmp_path.name, str(tmp_path)]


def test_loopback():
    assert is_loopback("127.0.0.1") and is_loopback("localhost") and is_loopback("::1")
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.2", "example.org")))


# ---- the page ----


def test_without_a_model_the_page_says_how_to_train_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command._model(None) is None
    texts = str(build_page(Settings()).config)
    for language in LANGUAGES:
        assert say(language, "no_model", train="accelerate launch --quiet train_ddpm.py") in texts
        assert repr(say(language, "draw")) not in texts


@pytest.mark.parametrize("classes", [None, 3])
def test_the_page_has_both_languages_and_is_closed_to_programs(classes):
    blocks = build_page(Settings(Model("model", make_pipeline(classes=classes))))
    texts = str(blocks.config)
    for language in LANGUAGES:
        assert repr(say(language, "draw")) in texts
    assert all(each["api_visibility"] == "private" for each in blocks.config["dependencies"])
    assert blocks.api_open is False and blocks.delete_cache


def test_what_is_served():
    options = launch_options(Settings())
    assert options["share"] is False and "allowed_paths" not in options
    assert options["max_file_size"] == Limits().upload_mb * MB
    assert options["app_kwargs"]["middleware"]
    assert not launch_options(Settings(host="0.0.0.0"))["app_kwargs"]["middleware"]
    assert "http" not in options["css"] and not any("Google" in type(f).__name__ for f in options["theme"]._font)


# ---- limits ----


@pytest.mark.parametrize(
    ("asked", "word"),
    [
        ((21, 1, 0), "21"),
        ((0, 1, 0), "0"),
        ((5, 10, 0), "10"),
        ((5, 0, 0), "0"),
        ((5, 1, -1), "-1"),
        ((5, 1, 0.5), "0.5"),
        ((5, 1, 2**60), str(2**60)),
        ((float("nan"), 1, 0), "nan"),
        (("<b>", 1, 0), "<b>"),
        ((5, 1, None), "None"),
    ],
)
@pytest.mark.parametrize("language", LANGUAGES)
def test_more_than_the_limits_is_refused_in_the_visitors_language(asked, word, language):
    with pytest.raises(ValueError, match=re.escape(word)) as refused:
        check_request(LIMITS, language, (16, 16), *asked)
    assert bool(re.search(r"[\u4e00-\u9fff]", str(refused.value))) == (language == "zh")


def test_large_pictures_are_drawn_fewer_at_once():
    assert Limits().pictures_of((16, 16)) == 16
    assert Limits().pictures_of((512, 512)) == 4
    assert Limits().pictures_of((4096, 4096)) == 1


def test_a_request_ends_after_its_seconds(model):
    pipeline, stop = model.pipeline_of(CustomDDPMPipeline), threading.Event()
    model.pipeline.unet.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    with pytest.raises(Stopped) as stopped:
        list(watch(model, lambda note: pipeline(num_inference_steps=20, callback_on_step_end=note), stop, 0.2))
    assert stopped.value.too_long and not model.lock.locked()
    assert len(model.pipeline.unet._forward_pre_hooks) == 1  # its own is gone


def test_a_cancelled_request_ends_and_others_go_on(model):
    pipeline, stop = model.pipeline_of(CustomDDPMPipeline), threading.Event()
    evaluations = []

    def slow(*_):
        evaluations.append(1)
        time.sleep(0.05)

    hook = model.pipeline.unet.register_forward_pre_hook(slow)
    seen = watch(model, lambda note: pipeline(num_inference_steps=20, callback_on_step_end=note), stop, 60)
    assert next(seen).total == 20
    stop.set()
    with pytest.raises(Stopped) as stopped:
        list(seen)
    assert not stopped.value.too_long and len(evaluations) < 20
    hook.remove()
    images = [*watch(model, lambda note: pipeline(num_inference_steps=2), threading.Event(), 60)][-1].result.images
    assert len(images) == 1


def test_a_visitor_cancels_their_own_request_only():
    requests = drawing.Requests()
    numbers = [requests.wait(name, "generate") for name in ("me", "they")]
    with (
        requests.running("me", "generate", numbers[0]) as mine,
        requests.running("they", "generate", numbers[1]) as theirs,
    ):
        requests.stop("me", "generate")
        requests.stop("me", "generate")
        assert mine.is_set() and not theirs.is_set()
        assert not requests.followed("me", "generate", numbers[0])
        later = requests.wait("they", "generate")
        assert theirs.is_set() and requests.followed("they", "generate", numbers[1])
        with requests.running("they", "generate", later) as newest:
            assert not newest.is_set()
    assert requests._newest == {}


def test_a_request_that_was_stopped_while_it_waited_does_not_run():
    requests = drawing.Requests()
    first, second = requests.wait("me", "generate"), requests.wait("me", "generate")
    other = requests.wait("me", "inpaint")
    with requests.running("me", "generate", first) as stop:
        assert stop is None
    with requests.running("me", "generate", second) as stop:
        assert not stop.is_set()
    cancelled = requests.wait("me", "generate")
    requests.stop("me", "generate")
    with requests.running("me", "generate", cancelled) as stop:
        assert stop is None
    with requests.running("me", "inpaint", other) as stop:
        assert not stop.is_set()
    assert requests._newest == {}


# ---- uploads ----


def png(width, height):
    """A small PNG file of a picture of one colour, whatever its size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + width)) for _ in range(height)) + packer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("side", [5000, 20000])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(side, language, tmp_path, monkeypatch):
    file = tmp_path / "bomb.png"
    file.write_bytes(png(side, side))
    assert file.stat().st_size < MB
    monkeypatch.setattr(PIL.Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match=r"bomb\.png") as refused:
        open_upload(file, LIMITS, language)
    assert "\n" not in str(refused.value) and "16" in str(refused.value)


@pytest.mark.parametrize(
    "data", [b"", b"text", b"<svg xmlns='http://www.w3.org/2000/svg'/>", png(8, 8)[:40], b"%!PS-Adobe"]
)
def test_a_file_that_is_no_picture_is_refused(data, tmp_path):
    file = tmp_path / "file.png"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"file\.png is not a picture"):
        open_upload(file, LIMITS, "en")


def test_a_large_file_is_refused_and_a_picture_is_read(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (700, 700, 3), np.uint8)
    file = tmp_path / "noise.png"
    PIL.Image.fromarray(pixels).save(file)
    with pytest.raises(ValueError, match=r"noise\.png has 1\.\d MB; at most 1 MB"):
        open_upload(file, Limits(upload_mb=1), "en")
    assert np.array_equal(np.asarray(open_upload(file, Limits(), "en")), pixels)


@pytest.mark.parametrize("make", [gr.Image, gr.ImageEditor])
def test_components_check_uploads_before_they_decode_them(make, tmp_path):
    file = tmp_path / "bomb.png"
    file.write_bytes(png(5000, 5000))
    component = checked_upload(make(), LIMITS, "en")
    payload = {"path": str(file), "meta": {"_type": "gradio.FileData"}}
    payload = payload if make is gr.Image else {"background": payload, "layers": [], "composite": None}
    with pytest.raises(gr.Error, match="bomb"):
        component.preprocess(component.data_model(**payload))
    assert component.preprocess(None) is None


def sent(component, data, index=None, number="1"):
    """Hand a file to an editor as the browser does, and return what the event submits."""
    kind = "background" if index is None else "layer"
    blob = {"data": {"type": kind, "index": index, "file": b"", "id": number}, "files": [("file", data)]}
    component.accept_blobs(SimpleNamespace(**blob))
    return component.data_model(id=number)


def eps():
    file = io.BytesIO()
    PIL.Image.new("RGB", (8, 8), "red").save(file, "EPS")
    return file.getvalue()


@pytest.mark.parametrize("index", [None, "0"])
@pytest.mark.parametrize("data", [png(5000, 5000), eps(), b"text"])
def test_what_an_editor_sends_beforehand_is_checked_too(data, index, monkeypatch):
    with gr.Blocks() as page:
        checked_upload(gr.ImageEditor(type="pil"), LIMITS, "en")
        picture_input("en", LIMITS)
    editors = [block for block in page.blocks.values() if isinstance(block, gr.ImageEditor)]
    assert len(editors) == 2
    for editor in editors:
        shown = editor.preprocess(sent(editor, png(8, 8), index))
        assert (shown["background"] if index is None else shown["layers"][0]).size == (8, 8)
        with monkeypatch.context() as patch:
            patch.setattr(PIL.Image.Image, "load", lambda self: pytest.fail("it was decoded"))
            with pytest.raises(gr.Error, match=r"16|not a picture"):
                editor.preprocess(sent(editor, data, index))
        assert not editor.blob_storage


def test_an_editor_keeps_no_large_files():
    editor = checked_upload(gr.ImageEditor(), Limits(upload_mb=1), "en")
    for data, index in ((bytes(2 * MB), None), (b"", "1000000000")):
        with pytest.raises(HTTPException, match="at most"):
            sent(editor, data, index)
    assert not editor.blob_storage and editor.accept_blobs._is_server_fn


def test_an_editor_keeps_the_newest_drawings_only():
    editor = checked_upload(gr.ImageEditor(type="pil"), LIMITS, "en")
    payloads = [sent(editor, png(8, 8), None, str(i)) for i in range(2 * MAX_DRAWINGS)]
    assert list(editor.blob_storage) == [payload.id for payload in payloads[MAX_DRAWINGS:]]
    assert editor.preprocess(payloads[-1])["background"].size == (8, 8)
    assert editor.preprocess(payloads[0])["background"] is None


# ---- Generate ----


@pytest.mark.parametrize(
    ("label", "guidance", "sampler", "number"),
    [
        (1, 2.0, "CustomDDPMScheduler", 3),
        (-1, 1.0, "DDIMScheduler", 4),
        (-2, 2.0, "EulerAncestralDiscreteScheduler", 1),
        (0, 1.5, "DPMSolverMultistepScheduler", 2),
    ],
)
def test_the_lines_make_exactly_the_picture_shown(model, label, guidance, sampler, number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = picture = None
    for shown in generate.draw(model, LIMITS, "en", threading.Event(), label, guidance, sampler, 5, 7, number):
        if shown[1].get("value"):
            picture = PIL.Image.open(shown[1]["value"]).copy()
            assert shown[2]["value"] == shown[1]["value"] and shown[2] is not shown[1]  # gradio changes them
    assert "Finished" in shown[0] and shown[0].count("<img") == 2
    exec(shown[3]["value"], {})
    made = PIL.Image.open("pictures.png")
    assert made.mode == picture.mode and made.tobytes() == picture.tobytes()
    assert len(np.unique(np.asarray(made))) > 10


@pytest.mark.parametrize(("sampler", "config"), [("DDIMScheduler", "untuned(pipeline"), ("CustomDDPMScheduler", None)])
def test_the_lines_give_diffusers_no_settings_of_ours(model, sampler, config):
    *_, last = generate.draw(model, LIMITS, "en", threading.Event(), 1, 2.0, sampler, 5, 7, 1)
    lines = last[3]["value"]
    assert (config in lines if config else "untuned" not in lines) and ("untuned" in lines) == ("import DDIM" in lines)


def test_the_lines_with_another_seed_make_another_picture(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures = []
    for seed in (7, 8):
        *_, last = generate.draw(model, LIMITS, "en", threading.Event(), 1, 2.0, "CustomDDPMScheduler", 5, seed, 2)
        exec(last[3]["value"], {})
        pictures.append(PIL.Image.open("pictures.png").tobytes())
    assert pictures[0] != pictures[1]


def test_settings_out_of_the_limits_are_shown_as_an_error(model):
    for asked in (
        (1, 2.0, "DDIMScheduler", 21, 0, 1),
        (1, 99.0, "DDIMScheduler", 5, 0, 1),
        (1, 2.0, "os.system", 5, 0, 1),
    ):
        with pytest.raises(gr.Error):
            list(generate.draw(model, LIMITS, "en", threading.Event(), *asked))


def test_a_name_of_a_class_is_no_markup():
    assert "<script>" not in drawing.view_html("en", None, "<script>alert(1)</script>")
    assert "<b>" not in refusal("en", ValueError("<b>")).message
