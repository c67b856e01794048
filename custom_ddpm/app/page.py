"""The page: its tabs in two languages, its look, and its server."""

import ipaddress
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from . import bayes, edit, forward, generate, train_tab
from .limits import MB, Limits
from .texts import LANGUAGES, say
from .trainer import Trainer
from .worker import Model

PATHS = {"en": "./", "zh": "zh"}
CACHE = (600, 3600)  # seconds: how often, and how old files of visitors are deleted
TRAIN_COMMAND = "accelerate launch --quiet train_ddpm.py"
# Only fonts of the visitor's computer.
SANS = [
    "system-ui",
    "-apple-system",
    "Segoe UI",
    "Roboto",
    "Noto Sans",
    "Noto Sans CJK SC",
    "PingFang SC",
    "sans-serif",
]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]
CSS = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
# The language of the document, for screen readers.
SCRIPT = """() => {
  const zh = /\\/zh\\/?$/.test(location.pathname);
  document.documentElement.lang = zh ? "zh" : "en";
  document.title = zh ? %(zh)r : %(en)r;
}""" % {language: say(language, "title") for language in LANGUAGES}


@dataclass
class Settings:
    """What the page shows, and to whom.

    Args:
        model: to draw with; None for the tabs that need none.
        runs: folder whose runs the page shows.
        host, port: that the server listens on.
        limits: of one request.
    """

    model: Model | None = None
    runs: Path = field(default_factory=Path)
    host: str = "127.0.0.1"
    port: int = 7860
    limits: Limits = field(default_factory=Limits)

    @property
    def is_local(self) -> bool:
        """Whether only this computer can reach the page."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether a host name or address is that of this computer alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def build_page(settings: Settings) -> gr.Blocks:
    """The page in English at `/` and in Chinese at `/zh`."""
    trainer = Trainer(settings.runs)
    blocks = gr.Blocks(title=say("en", "title"), analytics_enabled=False, delete_cache=CACHE)
    with blocks:
        gr.Navbar(visible=False)
        _fill("en", settings, trainer)
    with blocks.route(say("en", "other_language"), PATHS["zh"], show_in_navbar=False):
        gr.Navbar(visible=False)
        _fill("zh", settings, trainer)
    return blocks.queue(max_size=settings.limits.waiting, default_concurrency_limit=8, api_open=False)


def _fill(language: str, settings: Settings, trainer: Trainer) -> None:
    other = LANGUAGES[1 - LANGUAGES.index(language)]
    link = f'<a href="{PATHS[other]}" lang="{other}" hreflang="{other}">{say(language, "other_language")}</a>'
    gr.HTML(f"<header><h1>{say(language, 'title')}</h1>{link}</header>", padding=False)
    model = settings.model
    if model is None:
        gr.Markdown(say(language, "no_model", train=TRAIN_COMMAND))
    else:
        size = "x".join(str(each) for each in reversed(model.size))
        gr.Markdown(say(language, "model", name=f"`{model.name}`", size=size))
    with gr.Tabs():
        if model is not None:
            with gr.Tab(say(language, "generate")):
                generate.tab(language, model, settings.limits)
            with gr.Tab(say(language, "edit")):
                edit.tab(language, model, settings.limits)
        with gr.Tab(say(language, "forward")):
            forward.tab(language, settings.limits)
        with gr.Tab(say(language, "bayes")):
            bayes.tab(language, settings.limits)
        with gr.Tab(say(language, "train")):
            train_tab.tab(language, settings.runs, trainer, settings.is_local)


def serve(settings: Settings, started: Callable[[], None]) -> None:
    """Show the page until Ctrl-C.

    Args:
        settings: of the page.
        started: called when the page can be opened.

    Raises:
        OSError: the port is taken.
    """
    with tempfile.TemporaryDirectory(prefix="custom-ddpm-app-") as cache:
        os.environ["GRADIO_TEMP_DIR"] = cache  # what visitors upload and draw is deleted with it
        page = build_page(settings)
        # What was started from the page is ended with it, see `Trainer`, and the folder is deleted.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        page.launch(prevent_thread_lock=True, **launch_options(settings))
        started()
        page.block_thread()


def _theme() -> gr.themes.Base:
    """gradio's theme with fonts of the visitor's computer, and with enough contrast for WCAG AA."""
    return gr.themes.Default(primary_hue="blue", font=SANS, font_mono=MONO).set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400",
        color_accent="*primary_600",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_hover_dark="*primary_800",
        button_cancel_background_fill="#b91c1c",
        button_cancel_background_fill_dark="#b91c1c",
        button_cancel_background_fill_hover="#991b1b",
        button_cancel_background_fill_hover_dark="#991b1b",
    )


def launch_options(settings: Settings) -> dict[str, Any]:
    """Arguments of gradio's `launch`: nothing is fetched from elsewhere, and nothing of this computer is served."""
    # A page elsewhere whose name is made to point here would be let in by the visitor's browser.
    hosts = ["localhost", "127.0.0.1", "[::1]", settings.host]
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=hosts)] if settings.is_local else []
    return {
        "server_name": settings.host,
        "server_port": settings.port,
        "share": False,
        "quiet": True,
        "show_error": False,
        "max_file_size": settings.limits.upload_mb * MB,
        "footer_links": [],
        "run_history": False,
        "enable_monitoring": False,
        "mcp_server": False,
        "ssr_mode": False,
        "pwa": False,
        "app_kwargs": {"middleware": middleware},
        "theme": _theme(),
        "css": CSS,
        "js": SCRIPT,
    }
