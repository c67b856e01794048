"""What Generate and Edit share: a request that is watched from noise to the result, and can be cancelled."""

import base64
import html
import io
import itertools
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
    """The newest request of each visitor and tab, waiting or running: a visitor cancels their own only.

    Cancelling is done here and not by the page, which may be about to send the next request meanwhile.
    """

    def __init__(self) -> None:
        self._newest: dict[tuple[str | None, str], tuple[int, threading.Event]] = {}
        self._numbers = itertools.count()

    def wait(self, session: str | None, tab: str) -> int:
        """Stop a visitor's earlier request of a tab, and return the number of the one that begins to wait."""
        self.stop(session, tab)
        number = next(self._numbers)
        self._newest[session, tab] = number, threading.Event()
        return number

    @contextmanager
    def running(self, session: str | None, tab: str, number: int) -> Iterator[threading.Event | None]:
        """Context with the event that `stop` sets; with None for a request that was stopped while it waited."""
        newest = self._newest.get((session, tab))
        mine = newest if newest is not None and newest[0] == number else None
        try:
            yield None if mine is None else mine[1]
        finally:
            if mine is not None and self._newest.get((session, tab)) is mine:
                del self._newest[session, tab]

    def followed(self, session: str | None, tab: str, number: int) -> bool:
        """Whether there is a later request of the visitor and tab."""
        newest = self._newest.get((session, tab))
        return newest is not None and newest[0] > number

    def stop(self, session: str | None, tab: str) -> None:
        """Stop a visitor's request, if there is one."""
        newest = self._newest.pop((session, tab), None)
        if newest is not None:
            newest[1].set()


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
) -> None:
    """Let a button draw: the request waits for its turn, and a visitor's earlier one of this tab ends.

    Args:
        button: to press.
        language, tab: of the button.
        draw: (event that stops it, values of `inputs`) -> generator of values for `outputs`, the first of which is the
            view.
        inputs, outputs: components.
    """
    options: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    # Sent with the request. A gr.State would be read when the request has its turn, and be that of a later one.
    number = gr.Number(visible=False, precision=0)

    def wait(request: gr.Request) -> tuple[int, str]:
        return REQUESTS.wait(request.session_hash, tab), view_html(language, None, say(language, "queued"))

    def turn(request: gr.Request, number: int, *settings: Any) -> Iterator[Any]:
        with REQUESTS.running(request.session_hash, tab, number) as stop:
            if stop is None:
                yield tuple(gr.skip() for _ in outputs)  # a generator without values would empty them
                return
            for shown in draw(stop, *settings):
                if not REQUESTS.followed(request.session_hash, tab, number):  # else the view is the later one's
                    yield shown

    def fail() -> str:
        return view_html(language, None, say(language, "refused"))

    event = button.click(wait, outputs=[number, outputs[0]], queue=False, **options).then(
        turn,
        [number, *inputs],
        outputs,
        concurrency_id="model",
        concurrency_limit=1,
        trigger_mode="multiple",
        **options,
    )
    event.failure(fail, outputs=outputs[0], queue=False, **options)


def cancel_button(language: str, tab: str, view: gr.HTML) -> None:
    """A button that ends the visitor's request of a tab, running or waiting."""

    def cancel(request: gr.Request) -> str:
        REQUESTS.stop(request.session_hash, tab)
        return view_html(language, None, say(language, "cancelled"))

    button = gr.Button(say(language, "cancel"), elem_id=f"cancel-{tab}-{language}")
    button.click(cancel, outputs=view, queue=False, api_visibility="private", show_progress="hidden")


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
