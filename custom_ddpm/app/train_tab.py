"""The tab Train: watch a run of this computer, and start the default one."""

from pathlib import Path
from typing import Any

import gradio as gr

from .limits import refusal
from .runs import find_runs, run_folder, run_html, stamp
from .texts import say
from .trainer import Trainer, can_train

SECONDS = 3.0  # between two looks at a run


def watched(root: Path, language: str, trainer: Trainer, name: str | None, seen: Any) -> tuple[Any, Any, Any]:
    """What the tab shows of a run: the state of the training, the run, its stamp; nothing new is not sent again."""
    run = run_folder(root, name)
    written = None if run is None else stamp(run)
    now = (training_state(language, trainer), written)
    if now == seen:
        return gr.skip(), gr.skip(), gr.skip()
    if run is None or written is None:
        text = "" if find_runs(root) else say(language, "no_runs")
        return now[0], text, now
    return now[0], run_html(run, language, written), now


def training_state(language: str, trainer: Trainer) -> str:
    """One line about the training that was started from the page; empty if there was none."""
    if trainer.is_running:
        return say(language, "training_started", folder=f"`{trainer.folder}`")
    ended = trainer.ended()
    if ended is None:
        return ""
    status, line = ended
    return say(
        language, "training_ended", folder=f"`{trainer.folder}`", status=status, line=f"`{line}`" if line else ""
    )


def choices(root: Path, name: str | None) -> Any:
    """The list of runs as it is now, with a run chosen if it is there, or the newest."""
    names = find_runs(root)
    return gr.update(choices=names, value=name if name in names else names[0] if names else None)


def tab(language: str, runs: Path, trainer: Trainer, may_start: bool) -> None:
    """The list of runs, the buttons, and the run that is chosen.

    Args:
        language: of the texts.
        runs: folder whose runs are shown.
        trainer: of all visitors.
        may_start: whether visitors may start a training.
    """
    names = find_runs(runs)
    with gr.Row():
        chosen = gr.Dropdown(
            names,
            value=names[0] if names else None,
            label=say(language, "runs"),
            info=say(language, "runs_info", folder=str(runs.resolve()) if may_start else runs.resolve().name),
            filterable=False,
            scale=3,
            min_width=280,
        )
        refresh = gr.Button(say(language, "refresh"), scale=1, min_width=100)
    state = gr.Markdown(elem_id=f"training-{language}")
    shown, seen = gr.HTML(elem_id=f"run-{language}", padding=False), gr.State(None)
    outputs = [state, shown, seen]
    # Looks do not stand in the queue, where they would take the places of drawing.
    options: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "queue": False}

    def look(name: str | None, before: Any) -> tuple[Any, Any, Any]:
        return watched(runs, language, trainer, name, before)

    if may_start and can_train():
        _buttons(language, runs, trainer, chosen, state, options)
    else:
        gr.Markdown(say(language, "start_needs_clone" if may_start else "start_only_here"))
    refresh.click(lambda name: choices(runs, name), chosen, chosen, **options)
    chosen.change(look, [chosen, seen], outputs, **options)
    gr.Timer(SECONDS).tick(look, [chosen, seen], outputs, **options)


def _buttons(
    language: str, runs: Path, trainer: Trainer, chosen: gr.Dropdown, state: gr.Markdown, options: dict[str, Any]
) -> None:
    """Start and stop."""

    def start() -> tuple[Any, Any]:
        try:
            folder = trainer.start()
        except RuntimeError:
            text = say(language, "training_runs", folder=str(trainer.folder))
            raise refusal(language, RuntimeError(text)) from None
        except OSError as error:
            raise refusal(language, error) from error
        return say(language, "training_started", folder=f"`{folder}`"), choices(runs, None)

    def stop() -> str:
        return say(language, "training_stopped" if trainer.stop() else "no_training")

    with gr.Row():
        gr.Button(say(language, "start"), variant="primary", elem_id=f"start-{language}").click(
            start, outputs=[state, chosen], **options
        )
        gr.Button(say(language, "stop"), variant="stop", elem_id=f"stop-{language}").click(
            stop, outputs=state, **options
        )
