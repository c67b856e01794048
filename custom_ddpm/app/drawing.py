"""What Generate and Edit share: a request that is watched from noise to the result, and can be cancelled."""

import base64
import html
import io
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
import PIL.Image
import torch

from ..data.pixels import denormalise
from ..sampling import image_grid
from .limits import Limits, refusal
from .texts import say
from .worker import Model, Progress, Stopped, watch

FILE = "pictures.png"


class Requests:
    """The requests that run or wait, by visitor and tab, so that each visitor cancels their own only."""

    def __init__(self) -> None:
        self._stops: dict[tuple[str | None, str], threading.Event] = {}

    @contextmanager
    def running(self, session: str | None, tab: str) -> Iterator[threading.Event]:
        """Context with the event that `stop` sets; an earlier request of the same visitor and tab is stopped."""
        self.stop(session, tab)
        self._stops[session, tab] = stop = threading.Event()
        try:
            yield stop
        finally:
            if self._stops.get((session, tab)) is stop:
                del self._stops[session, tab]

    def stop(self, session: str | None, tab: str) -> None:
        """Stop a visitor's request, if there is one."""
        stop = self._stops.pop((session, tab), None)
        if stop is not None:
            stop.set()


REQUESTS = Requests()


def picture_html(picture: PIL.Image.Image, caption: str) -> str:
    """A picture with its caption, as HTML that holds the picture itself: nothing is stored or fetched."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    caption = html.escape(caption)
    return f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


def view_html(language: str, progress: Progress | None, status: str, announced: bool = True) -> str:
    """x_t beside x̂_0 with a line of text, which screen readers announce if it is not one of many."""
    figures = ""
    if progress is not None and progress.state is not None:
        when, x_t, x_0 = progress.state
        captions = (say(language, "state", t=f"{when:.0f}"), say(language, "predicted"))
        grids = (image_grid(denormalise(x), min_size=128) for x in (x_t, x_0))
        figures = "".join(picture_html(grid, text) for grid, text in zip(grids, captions, strict=True))
    role = ' role="status"' if announced else ""
    return f'<div class="view">{figures}</div><p{role}>{html.escape(status)}</p>'


def follow(
    model: Model,
    limits: Limits,
    language: str,
    stop: threading.Event,
    call: Callable[[Callable[..., dict]], torch.Tensor],
) -> Iterator[tuple[Any, Any, Any]]:
    """Run a call, and yield what the page shows: the view, the result, the file to download.

    Args:
        model, limits, language: of the page.
        stop: of `REQUESTS`.
        call: as of `watch`; returns uint8 (B, C, H, W).

    Raises:
        gradio.Error: what the call raised, as one line.
    """
    started, hidden, last = time.monotonic(), gr.update(visible=False), None
    yield view_html(language, None, say(language, "starting")), hidden, hidden
    try:
        for progress in watch(model, call, stop, limits.seconds):
            last = progress
            status = say(language, "step", done=progress.done, total=progress.total)
            if progress.result is None and progress.total:
                yield view_html(language, progress, status, announced=False), hidden, hidden
    except Stopped as stopped:
        key = "too_long" if stopped.too_long else "cancelled"
        yield view_html(language, last, say(language, key, seconds=f"{limits.seconds:g}")), hidden, hidden
        return
    except (ValueError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, MemoryError) as error:
        raise refusal(language, error) from error  # also what a sampler of diffusers raises for odd settings
    assert last is not None
    status = say(language, "finished", seconds=f"{time.monotonic() - started:.1f}")
    with tempfile.TemporaryDirectory(prefix="custom-ddpm-") as folder:
        file = str(Path(folder, FILE))
        image_grid(last.result.cpu()).save(file)
        # The file is copied meanwhile; gradio writes the copy's place into each of the two.
        shown, download = (gr.update(value=file, visible=True) for _ in range(2))
        yield view_html(language, last, status), shown, download


# ---- parts of the tabs ----


def on_click(
    button: gr.Button, language: str, tab: str, draw: Callable[..., Any], inputs: list[Any], outputs: list[Any]
) -> Any:
    """Let a button draw: the request waits for its turn, and a visitor's earlier one of this tab ends.

    Args:
        button: to press.
        language, tab: of the button.
        draw: generator of values for `outputs`, the first of which is the view.
        inputs, outputs: components.

    Returns:
        The event that draws.
    """
    options: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}

    def wait(request: gr.Request) -> str:
        REQUESTS.stop(request.session_hash, tab)
        return view_html(language, None, say(language, "queued"))

    def fail() -> str:
        return view_html(language, None, say(language, "refused"))

    event = button.click(wait, outputs=outputs[0], queue=False, **options).then(
        draw, inputs, outputs, concurrency_id="model", concurrency_limit=1, trigger_mode="multiple", **options
    )
    event.failure(fail, outputs=outputs[0], queue=False, **options)
    # An earlier one that still waits is not known to `REQUESTS`; this takes it out of the queue, before `wait` is done.
    button.click(None, cancels=[event], queue=False, **options)
    return event


def cancel_button(language: str, tab: str, view: gr.HTML, event: Any) -> None:
    """A button that ends the visitor's request of a tab, running or waiting."""

    def cancel(request: gr.Request) -> str:
        REQUESTS.stop(request.session_hash, tab)
        return view_html(language, None, say(language, "cancelled"))

    button = gr.Button(say(language, "cancel"), elem_id=f"cancel-{tab}-{language}")
    button.click(cancel, outputs=view, cancels=[event], queue=False, api_visibility="private", show_progress="hidden")


def result_parts(language: str) -> tuple[gr.HTML, gr.Image, gr.DownloadButton]:
    """The view, the result and the download, empty."""
    view = gr.HTML(view_html(language, None, say(language, "waiting"), announced=False), padding=False)
    result = gr.Image(
        label=say(language, "result"),
        alt_text=say(language, "result"),
        format="png",
        interactive=False,
        visible=False,
        buttons=["fullscreen"],
        elem_classes="pixels",
    )
    return view, result, gr.DownloadButton(say(language, "download"), visible=False)
