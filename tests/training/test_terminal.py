"""The newest grid in the terminal: what is sent to terminals of each kind, and where there is none."""

import os
import re
import select
import struct
import subprocess
import sys
import time

import pytest
from runs import run, tiny

from custom_ddpm.training import build, parts, train
from custom_ddpm.training.terminal import check_terminal

pty, fcntl, termios = (pytest.importorskip(name) for name in ("pty", "fcntl", "termios"))
pytest.importorskip("textual_image")

# A progress bar is open meanwhile.
SCRIPT = """
import sys
from custom_ddpm.training import terminal
if "missing" in sys.argv:
    sys.modules["textual_image"] = None  # as if it were not installed
import PIL.Image
print("Asking.")
terminal.check_terminal()
print("Asked.", flush=True)
if "keys" in sys.argv:
    sys.stdin.readline()
grid = PIL.Image.new("L", (60, 40), 40)
grid.paste(200, (0, 0, 60, 20))
with terminal.tqdm(total=2, desc="Training") as bar:
    bar.update()
    terminal.show_grid(grid, 7)
    bar.update()
"""
ASKS = {b"\x1b[c": "sixel", b"\x1b_G": "kitty", b"\x1b[16t": "size"}


def in_terminal(answers: dict[str, bytes], *words: str, lines: int = 12) -> str:
    """What the script writes to a terminal 30 characters wide that answers what it is asked."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, 30, 0, 0))  # the size in pixels is not known
    env = {name: value for name, value in os.environ.items() if name not in ("LINES", "COLUMNS")}
    env |= {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
    command = [sys.executable, "-c", SCRIPT, *words]
    written, asked, end = b"", dict(ASKS) | {b"Asked.": "keys"}, time.monotonic() + 60
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env) as process:
        os.close(theirs)
        while time.monotonic() < end:
            if not select.select([ours], [], [], 1)[0]:
                continue
            try:
                written += os.read(ours, 65536)
            except OSError:  # how Linux tells that the other side is closed
                break
            for ask in [ask for ask in asked if ask in written]:
                os.write(ours, answers.get(asked.pop(ask), b""))
        process.kill()
    os.close(ours)
    return written.decode()


def test_blocks_of_colour_in_a_terminal_without_graphics():
    shown = in_terminal({"sixel": b"\x1b[?62;22c"})
    after = shown[shown.index("Samples after step 7:") :]
    cells = re.findall(r"38;2;(\d+);\d+;\d+;48;2;(\d+);\d+;\d+m▀", after)
    assert cells[0] == ("200", "200") and cells[-1] == ("40", "40")
    lines = [line for line in after.splitlines() if "▀" in line]
    # 12 lines less 4, in the shape of the grid: 3 : 2, in cells that are twice as high as wide.
    assert len(lines) == 8 and {line.count("▀") for line in lines} == {24}
    assert "Traceback" not in shown and re.search(r"\r *\rSamples", shown), "the bar was not removed before"
    assert "Training: 100%" in after[after.rindex("▀") :], "the bar does not go on below"


@pytest.mark.parametrize(
    ("answers", "begin"),
    [
        ({"sixel": b"\x1b[?62;4;22c", "size": b"\x1b[6;20;10t"}, "\x1bP"),
        ({"sixel": b"\x1b[?62;22c", "kitty": b"\x1b_Gi=1;OK\x1b\\", "size": b"\x1b[6;20;10t"}, "\x1b_G"),
    ],
)
def test_terminals_with_graphics_get_them(answers, begin):
    shown = in_terminal(answers)
    assert begin in shown[shown.index("Samples after step 7:") :] and "▀" not in shown


@pytest.mark.parametrize("keys", ["\x1b[A", "猫"])
def test_keys_pressed_before_the_first_grid_do_no_harm(keys):
    shown = in_terminal({"sixel": b"\x1b[?62;22c", "keys": f"{keys}\n".encode()}, "keys")
    assert "▀" in shown and "Traceback" not in shown


def test_a_job_in_the_background_is_refused(monkeypatch):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 12, 30, 0, 0))
    with open(theirs, "r+b", buffering=0) as stream, open(ours, "rb"):
        monkeypatch.setattr(sys, "__stdin__", stream)
        monkeypatch.setattr(sys, "__stdout__", stream)
        monkeypatch.setattr(os, "tcgetpgrp", lambda fd: os.getpgrp() + 1)
        with pytest.raises(ValueError, match="--preview is 'terminal', but the run is in the background"):
            check_terminal()


def test_without_the_library_one_line_says_what_to_install():
    error = in_terminal({}, "missing").strip().splitlines()[-1]
    assert (
        error == "ValueError: --preview is 'terminal', which needs textual-image: pip install 'custom-ddpm[terminal]'"
    )


def test_a_terminal_without_a_size_is_refused():
    assert "ValueError: --preview is 'terminal', but the run has no terminal" in in_terminal({}, lines=0)


def test_without_a_terminal_the_run_does_not_begin(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "__stdin__", None)
    with pytest.raises(ValueError, match=r"--preview is 'terminal', but the run has no terminal .*; leave it out"):
        check_terminal()
    with pytest.raises(ValueError, match="has no terminal"):
        train(tiny(tmp_path / "run", preview="terminal"))
    assert not (tmp_path / "run").exists()


def test_every_grid_is_shown(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(parts, "check_terminal", lambda: None)
    monkeypatch.setattr(build, "show_grid", lambda grid, step: shown.append((grid.size, step)))
    run(tmp_path / "run", preview="terminal", max_train_steps=4, save_images_steps=2)
    assert [step for _, step in shown] == [2, 4] and shown[0][0] == shown[1][0] > (64, 64)
