"""The pictures of the tabs Forward and Bayes: ten built-in digits, uploaded files, drawings."""

from typing import Any

import numpy as np
import PIL.Image
from PIL import ImageOps

from .limits import Limits, checked_upload, open_upload

LARGEST = 64  # pixels of a side
# The first picture of each class of examples/digits (E. Alpaydin and C. Kaynak, UCI Machine Learning Repository 1998,
# CC BY 4.0), which is not installed with the package: 8 rows of 8 pixels, each 0 … 16 in base 17.
_DIGITS = (
    "005d910000dfaf5003f20b8004c008800580098004b01c7002e5ac00006da000",
    "000cd500000bg900003fg60007fgg200001gg300001gg600001gg600000bga00",
    "0004fc00003gfe00008d8g000016fb00018df10009gg500003dggb500003bg90",
    "007fd10008d6f400021dd000002fb1000001cc1000001a8000845e90007dd900",
    "0001b00000078000001d6220007f098005ga0g6004fgdg100003fa000002g400",
    "00ca000000egge0000dgfa1000bgg70000047g7000004g900054cg40009gga00",
    "000cd000005g800000dg300000ed000000fc720000dgdg30007gbf800019fb30",
    "0078dgf100774bc000008d100488ff6002bff400000g5000009f100000d50000",
    "009e810000ceec00009a0f40003gce20004gg20003g8ad2001f13g8000bgfb10",
    "00bc000002gggd0003gcae0001g1cf0000dg9f20000309b000009f40009cd300",
)
WORDS = {
    "en": {
        "digit": "Picture",
        "a digit": "digit",
        "own": "Your own picture",
        "upload": "Upload",
        "draw": "or draw",
        "brush": "choose the brush, then draw",
    },
    "zh": {
        "digit": "图片",
        "a digit": "数字",
        "own": "自己的图片",
        "upload": "上传",
        "draw": "或手绘",
        "brush": "先选画笔，再画",
    },
}


def digit(which: int) -> np.ndarray:
    """A built-in digit, uint8 (8, 8), white on black, as in examples/digits."""
    counts = [int(character, 17) for character in _DIGITS[which]]
    return np.array([round(count * 255 / 16) for count in counts], np.uint8).reshape(8, 8)


def example(which: int) -> np.ndarray:
    """A built-in digit at the size in which the tabs show it, uint8 (32, 32)."""
    return np.asarray(PIL.Image.fromarray(digit(which)).resize((32, 32), PIL.Image.Resampling.BICUBIC))


def fitted(picture: PIL.Image.Image) -> np.ndarray:
    """A picture on white, with no side over `LARGEST`: uint8 (H, W) if it is gray, else (H, W, 3)."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16 bits
        picture = PIL.Image.fromarray((np.asarray(picture).clip(0, 65535) // 257).astype(np.uint8))
    picture.thumbnail((4 * LARGEST, 4 * LARGEST))  # first with what is quick
    if picture.has_transparency_data:
        white = PIL.Image.new("RGBA", picture.size, "white")
        picture = PIL.Image.alpha_composite(white, picture.convert("RGBA"))
    picture = picture.convert("RGB")
    picture.thumbnail((LARGEST, LARGEST), PIL.Image.Resampling.BICUBIC)
    pixels = np.asarray(picture)
    return pixels[..., 0] if (pixels == pixels[..., :1]).all() else pixels


def slider(minimum: float, maximum: float, value: float, step: float, label: str) -> Any:
    """A `gr.Slider` whose number field may be emptied, which counts as the lowest value; Gradio's own fails there."""
    import gradio as gr

    made = gr.Slider(minimum, maximum, value=value, step=step, label=label)

    def lenient(payload: float | None) -> float:
        return minimum if payload is None else min(max(payload, minimum), maximum)

    made.preprocess = lenient  # type: ignore[method-assign]
    return made


def picture_input(language: str, limits: Limits) -> Any:
    """Controls to choose a digit, upload a file or draw, as part of a page.

    Args:
        language: of the labels and messages.
        limits: of uploaded files.

    Returns:
        A `gr.State` with the picture: uint8 (H, W) or (H, W, 3).
    """
    import gradio as gr

    words = WORDS[language]
    chosen = gr.State(example(0))
    digits = gr.Dropdown([(f"{words['a digit']} {i}", i) for i in range(10)], value=0, label=words["digit"])
    with gr.Accordion(words["own"], open=False):
        upload = gr.File(label=words["upload"], file_types=["image"], height=110)
        pad = gr.Sketchpad(
            label=words["draw"],
            placeholder=words["brush"],
            type="pil",
            image_mode="RGB",
            canvas_size=(256, 256),
            height=360,
            layers=False,
            transforms=(),
            buttons=[],
            brush=gr.Brush(default_size=18),
        )
        drawing = checked_upload(pad, limits, language)

    def uploaded(file: str | None, which: int) -> Any:
        if file is None:
            return example(which)
        try:
            return fitted(open_upload(file, limits, language))
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def drawn(value: dict[str, Any] | None) -> Any:
        return fitted(value["composite"]) if value and value["composite"] is not None else gr.skip()

    shared: dict[str, Any] = {"outputs": chosen, "show_progress": "hidden", "api_visibility": "private"}
    digits.change(example, digits, queue=False, **shared)
    upload.change(uploaded, [upload, digits], **shared)
    drawing.change(drawn, drawing, queue=False, trigger_mode="always_last", **shared)
    return chosen
