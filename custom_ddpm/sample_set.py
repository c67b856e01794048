"""Folders of many pictures, one seed per picture: drawn on any number of processes, restartable, exported.

The pictures are divided into units of neighbouring seeds, which are dealt to the processes in turn. Each picture is
written when its unit is drawn; a unit is drawn again if one of its pictures is missing. So memory does not grow with
the number of pictures, and a run that was killed goes on where it stopped.
"""

import csv
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from accelerate.utils import tqdm

from .messages import shown_value
from .sampling import draw_batch, image_grid, process_state

SETTINGS_FILE = "samples.json"
EXACT_BATCH = 8
MAX_COLUMNS = MAX_ROWS = 16  # of the grid


def model_fingerprint(pipeline: Any) -> str:
    """Hash of a pipeline's weights, configurations and class names; equal for equal models, wherever they are saved."""
    parts = {}
    for name in ("unet", "scheduler"):
        component = getattr(pipeline, name)
        config = {
            key: value for key, value in component.config.items() if not key.startswith("_") and key != "auto_map"
        }
        parts[name] = [type(component).__name__, config]
    parts["id2label"] = sorted((pipeline.config.id2label or {}).items())
    found = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    for name, tensor in sorted(pipeline.unet.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def write_atomically(file: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name beside it, and rename it; a file of that name is always whole."""
    partial = file.with_name(f".{file.name}.tmp")
    write(partial)
    os.replace(partial, file)


@dataclass
class SampleSet:
    """A folder with one PNG file for each seed.

    A picture depends on its seed and its label. The result of a network also depends, in the last digits of float32,
    on the size of the batch, because other sizes are computed by other kernels; a pixel that is very near to the middle
    between two of the 256 levels may then be rounded to the other one. With `exact`, the network gets batches of
    `EXACT_BATCH` pictures only, in which the place of a picture is a function of its seed, so that all pictures are the
    same in every bit for any batch size and number of processes, on the same device, with the same number of threads.

    Args:
        pipeline: `CustomDDPMPipeline`, on its device.
        folder: folder of the pictures; see `open`.
        seeds: one for each picture, in steps of 1.
        labels: one for each picture, or None.
        options: further arguments of the pipeline's call.
        exact: see above.
    """

    pipeline: Any
    folder: Path
    seeds: range
    labels: Sequence[int] | None
    options: Mapping[str, Any]
    exact: bool = False

    def __post_init__(self) -> None:
        config = self.pipeline.unet.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        self._shape = (height, width, config.in_channels)

    def file(self, seed: int) -> Path:
        """The file of a seed's picture."""
        return self.folder / f"seed-{seed}.png"

    def open(self, settings: Mapping[str, Any]) -> None:
        """Make the folder, or accept one with the same settings; must be called by all processes.

        Args:
            settings: all that the pictures depend on, as in JSON.

        Raises:
            FileExistsError: it is something else, or holds pictures that were drawn with other settings.
        """
        state, file = process_state(), self.folder / SETTINGS_FILE
        settings = json.loads(json.dumps(settings))
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            if not file.is_file():
                raise FileExistsError(f"{self.folder} exists already and is not empty; choose another folder")
            found = _read_settings(file)
            other = [name for name in {**found, **settings} if found.get(name) != settings.get(name)]
            if other and any(self.folder.glob("seed-*.png")):
                was, now = (shown_value(each.get(other[0])) for each in (found, settings))
                raise FileExistsError(
                    f"{self.folder} holds pictures that were drawn with {other[0]} {was}, not {now}; "
                    "choose another folder, or the same settings to go on"
                )
        state.wait_for_everyone()
        if state.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
            write_atomically(file, lambda partial: partial.write_text(text, encoding="utf-8"))
        state.wait_for_everyone()

    def draw(self, batch_size: int) -> int:
        """Draw the pictures that are missing or cannot be read; must be called by all processes.

        Args:
            batch_size: pictures that a process draws at once; without effect on an exact set.

        Returns:
            The number of this process's pictures that were kept.
        """
        state, kept = process_state(), 0
        mine = self._units(batch_size)[state.process_index :: state.num_processes]
        total = sum(len(self._inside(unit)) for unit in mine)
        several = f", process 1 of {state.num_processes}" if state.num_processes > 1 else ""
        with tqdm(total=total, desc=f"Sampling{several}", unit="picture") as progress:
            for unit in mine:
                wanted = self._inside(unit)
                missing = [seed for seed in wanted if self._read(seed) is None]
                kept += len(wanted) - len(missing)
                if missing:
                    labels = None if self.labels is None else [self._label(seed) for seed in unit]
                    images = draw_batch(self.pipeline, unit, labels, **self.options).permute(0, 2, 3, 1).cpu().numpy()
                    for seed in missing:
                        write_atomically(self.file(seed), _png(images[seed - unit.start]))
                progress.update(len(wanted))
        state.wait_for_everyone()
        return kept

    def _units(self, batch_size: int) -> list[range]:
        """Ranges of seeds that are drawn together; the first and the last may reach beyond the set if it is exact."""
        if not self.exact:
            starts = range(self.seeds.start, self.seeds.stop, batch_size)
            return [range(start, min(start + batch_size, self.seeds.stop)) for start in starts]
        first = self.seeds.start - self.seeds.start % EXACT_BATCH
        return [range(start, start + EXACT_BATCH) for start in range(first, self.seeds.stop, EXACT_BATCH)]

    def _inside(self, unit: range) -> range:
        return range(max(unit.start, self.seeds.start), min(unit.stop, self.seeds.stop))

    def _label(self, seed: int) -> int:
        """The label of a seed; of the nearest one of the set for a seed beyond it."""
        assert self.labels is not None
        return self.labels[min(max(seed - self.seeds.start, 0), len(self.seeds) - 1)]

    def _read(self, seed: int) -> np.ndarray | None:
        """The pixels of a picture, uint8 (H, W, C); None if it is missing, damaged or of another shape."""
        try:
            with PIL.Image.open(self.file(seed)) as image:
                pixels = np.asarray(image)
        except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError):  # Pillow raises these for damage
            return None
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        return pixels if pixels.shape == self._shape and pixels.dtype == np.uint8 else None

    def pixels(self, seed: int) -> np.ndarray:
        """The pixels of a picture that was drawn, uint8 (H, W, C)."""
        pixels = self._read(seed)
        if pixels is None:
            raise OSError(f"{self.file(seed)} was removed or changed meanwhile; start again to draw it again")
        return pixels

    # ---- what is made of the pictures, by one process ----

    def write_grid(self, names: Mapping[int, str], class_rows: bool = False) -> None:
        """Write `grid.png` of at most 16 columns and rows: a column for each class, under its name.

        Args:
            names: of the classes by label; the labels themselves where there is none.
            class_rows: a row for each class, beside its name.
        """
        words = None
        if self.labels is None:
            chosen: list[int | None] = list(self.seeds[: MAX_COLUMNS * MAX_ROWS])
            columns = None
        else:
            by_label: dict[int, list[int]] = {}
            for seed, label in zip(self.seeds, self.labels, strict=True):
                if label in by_label or len(by_label) < MAX_COLUMNS:
                    by_label.setdefault(label, []).append(seed)
            each = range(min(MAX_ROWS, max(map(len, by_label.values()))))
            of_class = [[seeds[i] if i < len(seeds) else None for i in each] for seeds in by_label.values()]
            columns = len(each) if class_rows else len(by_label)
            chosen = [seed for row in (of_class if class_rows else zip(*of_class, strict=True)) for seed in row]
            words = [names.get(label, str(label)) for label in by_label]
        blank = np.full(self._shape, 255, np.uint8)
        pixels = np.stack([blank if seed is None else self.pixels(seed) for seed in chosen])
        captions, row_names = (None, words) if class_rows else (words, None)
        grid = image_grid(torch.from_numpy(pixels).permute(0, 3, 1, 2), columns, captions=captions, row_names=row_names)
        write_atomically(self.folder / "grid.png", lambda partial: grid.save(partial, format="PNG"))

    def write_npz(self) -> Path:
        """Write `samples.npz`: `arr_0`, uint8 (N, H, W, C), and for classes `arr_1`, int64 (N,)."""

        def write(partial: Path) -> None:
            with zipfile.ZipFile(partial, "w") as archive:
                # The date is part of the file: with this one, equal pictures give equal files.
                with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
                    shape = (len(self.seeds), *self._shape)
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(member, header)
                    for seed in self.seeds:
                        member.write(self.pixels(seed).tobytes())
                if self.labels is not None:
                    buffer = io.BytesIO()
                    np.save(buffer, np.array(self.labels, np.int64))
                    archive.writestr(zipfile.ZipInfo("arr_1.npy"), buffer.getvalue())

        write_atomically(self.folder / "samples.npz", write)
        return self.folder / "samples.npz"

    def write_metadata(self, names: Mapping[int, str]) -> Path:
        """Write `metadata.csv` (file_name, seed, label), with which the folder is a dataset of pictures."""

        def write(partial: Path) -> None:
            with partial.open("w", encoding="utf-8", newline="") as file:
                rows = csv.writer(file, lineterminator="\n")
                rows.writerow(["file_name", "seed", *(["label"] if self.labels is not None else [])])
                for i, seed in enumerate(self.seeds):
                    label = [] if self.labels is None else [names.get(self.labels[i], str(self.labels[i]))]
                    rows.writerow([self.file(seed).name, seed, *label])

        write_atomically(self.folder / "metadata.csv", write)
        return self.folder / "metadata.csv"


def _png(pixels: np.ndarray) -> Callable[[Path], None]:
    image = PIL.Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    return lambda partial: image.save(partial, format="PNG")


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}
