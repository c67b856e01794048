"""What one visitor may ask for, so that the others are served too; checks of settings and of uploaded files."""

import io
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image

from ..messages import one_line, shown
from .texts import say

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_SEED = 2**53  # a browser counts in float64
MB = 2**20
MAX_LAYERS = 16  # of a drawing
MAX_DRAWINGS = 32  # that an editor keeps until their request comes, of all visitors


@dataclass(frozen=True)
class Limits:
    """Limits of one request.

    Args:
        steps: sampling steps.
        pictures: pictures at once.
        drawn_pixels: pixels of all pictures at once; fewer large pictures are drawn than small ones.
        seconds: after which a request is stopped.
        upload_mb: size of an uploaded file.
        upload_pixels: pixels of an uploaded picture, once decoded.
        waiting: requests that wait in the queue.
    """

    steps: int = 250
    pictures: int = 16
    drawn_pixels: int = 2**20
    seconds: float = 60.0
    upload_mb: int = 8
    upload_pixels: int = 16_000_000
    waiting: int = 20

    def pictures_of(self, size: tuple[int, int]) -> int:
        """How many pictures of a size (height, width) are drawn at once, at least one."""
        return max(1, min(self.pictures, self.drawn_pixels // (size[0] * size[1])))


def check_request(
    limits: Limits, language: str, size: tuple[int, int], steps: float, number: float, seed: float
) -> tuple[int, int, int]:
    """Steps, number of pictures and seed as integers.

    Raises:
        ValueError: one of them is more than the limits allow, or not a positive integer, in the visitor's language.
    """
    steps, number = check_value(language, "steps", steps, 1), check_value(language, "number", number, 1)
    if steps > limits.steps:
        raise ValueError(say(language, "too_many_steps", value=steps, most=limits.steps))
    most = limits.pictures_of(size)
    if number > most:
        raise ValueError(say(language, "too_many_pictures", value=number, most=most))
    if isinstance(seed, bool) or not isinstance(seed, int | float) or seed != seed // 1 or not 0 <= seed <= MAX_SEED:
        raise ValueError(say(language, "bad_seed", value=shown(str(seed)), most=MAX_SEED))
    return int(steps), int(number), int(seed)


def check_value(language: str, name: str, value: float, least: float, most: float = math.inf) -> float:
    """A setting of the key `name` if it is a number from `least` to `most`; otherwise a ValueError for the visitor."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        bounds = {"least": f"{least:g}", "most": f"{most:g}" if math.isfinite(most) else "∞"}
        raise ValueError(say(language, "bad_value", name=say(language, name), value=shown(str(value)), **bounds))
    return value


def open_upload(file: str | Path | io.BytesIO, limits: Limits, language: str) -> PIL.Image.Image:
    """An uploaded picture, decoded after its format, its size and its number of pixels were checked.

    Args:
        file: path, on this computer, or the file's bytes.
        limits: of which `upload_mb` and `upload_pixels` are used.
        language: of the messages.

    Raises:
        ValueError: the file is no picture, or too large, in one line in the visitor's language.
    """
    if isinstance(file, io.BytesIO):
        name, size = say(language, "picture"), file.getbuffer().nbytes
    else:
        file = Path(file)
        name, size = shown(file.name, 40), file.stat().st_size
    megabytes = size / MB
    if megabytes > limits.upload_mb:
        raise ValueError(say(language, "file_too_large", name=name, value=f"{megabytes:.1f}", most=limits.upload_mb))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)  # the limit here is lower
            with PIL.Image.open(file, formats=FORMATS) as picture:
                width, height = picture.size
                if width * height > limits.upload_pixels:
                    most = limits.upload_pixels // 1_000_000
                    text = say(language, "too_many_pixels", name=name, width=width, height=height, most=most)
                    raise TooLarge(text)
                picture.load()
                return picture.copy()
    except TooLarge:
        raise
    except PIL.Image.DecompressionBombError:  # the header alone has more pixels than Pillow takes
        most = limits.upload_pixels // 1_000_000
        raise ValueError(say(language, "too_many_pixels", name=name, width="?", height="?", most=most)) from None
    except (OSError, ValueError, SyntaxError, ArithmeticError, LookupError, MemoryError) as error:
        raise ValueError(say(language, "not_a_picture", name=name)) from error  # what Pillow raises for broken files


class TooLarge(ValueError):
    """A picture with more pixels than the limit."""


def refusal(language: str, error: BaseException) -> Any:
    """An error as the page shows it, a `gradio.Error`: one line."""
    import html

    import gradio as gr

    return gr.Error(html.escape(one_line(error)), title=say(language, "refused"), print_exception=False)


def checked_upload(component: Any, limits: Limits, language: str) -> Any:
    """A component for pictures whose uploads are checked by `open_upload` before Pillow or gradio decode them.

    gradio decodes a file before it calls the function of an event, and its message does not name the reason. Editors
    send their pictures beforehand, to `accept_blobs`, and then only the number under which they are kept.
    """
    decode, stored = component.preprocess, getattr(component, "blob_storage", {})

    def preprocess(payload: Any) -> Any:
        if payload is None:
            return None
        sent = getattr(payload, "id", None)
        try:
            if sent is not None:
                parts = _parts(stored.get(sent))
                files = [io.BytesIO(part) for part in parts]
            elif hasattr(payload, "layers"):
                files = [part.path for part in _parts(payload)]
            else:
                return open_upload(payload.path, limits, language)
            for file in files:
                open_upload(file, limits, language)
        except ValueError as error:
            stored.pop(sent, None)
            raise refusal(language, error) from error
        return decode(payload)

    component.preprocess = preprocess
    if hasattr(component, "accept_blobs"):
        component.accept_blobs = _checked_blobs(component.accept_blobs, stored, limits, language)
    return component


def _parts(drawing: Any) -> list[Any]:
    """The pictures of an editor's data that are there."""
    parts = (drawing.background, *(drawing.layers or ()), drawing.composite) if drawing is not None else ()
    return [part for part in parts if part is not None]


def _checked_blobs(accept: Any, stored: dict[str, Any], limits: Limits, language: str) -> Any:
    """An editor's `accept_blobs` that keeps no file over the limit, `MAX_LAYERS` and the newest `MAX_DRAWINGS` only."""
    from starlette.exceptions import HTTPException

    def accept_blobs(data: Any) -> Any:
        megabytes, index = len(data.files[0][1]) / MB, data.data["index"]
        if megabytes > limits.upload_mb:
            values = {"name": say(language, "picture"), "value": f"{megabytes:.1f}", "most": limits.upload_mb}
            raise HTTPException(413, say(language, "file_too_large", **values))
        if index and index != "null" and not 0 <= int(index) < MAX_LAYERS:
            raise HTTPException(413, f"layer {int(index)}; at most {MAX_LAYERS}")
        while data.data["id"] not in stored and len(stored) >= MAX_DRAWINGS:
            stored.pop(next(iter(stored)), None)
        return accept(data)

    accept_blobs._is_server_fn = True  # type: ignore[attr-defined]
    return accept_blobs
