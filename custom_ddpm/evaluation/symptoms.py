"""The findings of a diagnosis: each a function from the evidence to what was found, or None.

A threshold is stated beside the finding that it belongs to. They are chosen so that a run which does what it should
gives no finding: a finding is worth reading, and none is no proof of quality.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .evidence import Evidence, mean_of

Found = tuple[str, str] | None  # the evidence; what changes it


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a run.

    Args:
        name: what is wrong, in a few words.
        evidence: the numbers that show it.
        remedy: the flag that changes it.
    """

    name: str
    evidence: str
    remedy: str


@dataclass(frozen=True)
class Symptom:
    """A kind of finding: its name, the function that looks for it, and the findings that already explain it."""

    name: str
    look: Callable[[Evidence], Found]
    explained_by: frozenset[str] = frozenset()


# ---- averaging ----


def weight_before(settings: dict[str, Any], steps: int, first: int) -> float:
    """Share of the averaged weights that comes from the first `first` of `steps` optimiser steps.

    The decay of step k is that of diffusers' `EMAModel`: 0 for k = 1, then min(1 − (1 + (k−1)/inv_gamma)^−power, max).
    """
    if first < 1:
        return 0.0
    k = np.arange(first, steps, dtype=float)  # k − 1 of the steps first + 1 … steps
    decay = np.minimum(1 - (1 + k / settings["ema_inv_gamma"]) ** -settings["ema_power"], settings["ema_max_decay"])
    return float(np.prod(np.maximum(decay, 0.0)))


def _long_average(e: Evidence) -> Found:
    """A fifth of its weight is older than half the run, or it has a loss 5% higher than the raw weights have."""
    if not e.settings["use_ema"] or e.steps < 2:
        return None
    share, half = weight_before(e.settings, e.steps, e.steps // 2), e.steps // 2
    evidence = f"{share:.0%} of its weight is from before step {half:,} of {e.steps:,}"
    worse = False
    if e.final is not None and "raw" in e.final:
        averaged, raw = e.final["training"], e.final["raw"]
        worse = averaged > 1.05 * raw and averaged - raw > 4 * e.final["averaged_minus_raw_error"]
        evidence += f", its loss is {averaged:.3g} and that of the raw weights {raw:.3g}"
    if share <= 0.2 and not worse:
        return None
    # The weight from before the last half is then exp(−10/2) = 1%; a shorter one where even that is too long.
    decay = min(1 - 10 / e.steps, 1 - 2 * (1 - _last_decay(e)) if share <= 0.2 else 1.0)
    return evidence, f"try --ema_max_decay {max(decay, 0.0):.4g}"


def _last_decay(e: Evidence) -> float:
    return weight_before(e.settings, e.steps, e.steps - 1)


# ---- the loss over the run ----


def _high_learning_rate(e: Evidence) -> Found:
    """1% of the steps were skipped; the loss rose above a constant's and stayed, or is a fifth above its least."""
    lower = f"lower --learning_rate {e.settings['learning_rate']:g}"
    if e.skipped >= 3 and e.skipped > 0.01 * e.steps:
        return f"{e.skipped:,} of {e.steps:,} steps were skipped, their gradients were not finite", lower
    last, constant = e.mean_loss(0.75, 1), e.constant_loss
    if last is None:
        return None
    norms = [line["grad_norm"] for line in e.lines if line["step"] > 0.75 * e.steps]
    norm = f"gradient norm {np.mean(norms):.3g}, clipped to {e.settings['max_grad_norm']:g}"
    ended = f"the loss of the last quarter is {last[0]:.3g}"
    if constant is not None and last[0] > 1.5 * constant:
        return f"{ended}, a constant prediction has {constant:.3g}; {norm}", lower
    highest = max(line["loss"] for line in e.lines)
    if constant is not None and highest > 1.5 * constant and _is_at_the_start(e, last[0], constant):
        return f"the loss rose to {highest:.3g}, a constant prediction has {constant:.3g}; {ended}; {norm}", lower
    earlier = filter(None, (e.mean_loss(begin, begin + 0.25) for begin in (0.0, 0.25, 0.5)))
    least, error = min(earlier, default=last)
    if last[0] > 1.2 * least and last[0] - least > 4 * np.hypot(error, last[1]):
        return f"{ended}, it had been {least:.3g}; {norm}", lower
    return None


def _long_warm_up(e: Evidence) -> Found:
    """The learning rate rises for more than half of the run."""
    warm_up = e.settings["lr_warmup_steps"]
    if e.settings["lr_scheduler"] == "constant" or e.steps == 0 or warm_up <= e.steps / 2:
        return None
    return f"the learning rate rises for {warm_up:,} of {e.steps:,} steps", f"try --lr_warmup_steps {e.steps // 10}"


def _not_begun(e: Evidence) -> Found:
    """The loss has done less than 30% of the way from a constant prediction to the best linear denoiser."""
    last, constant = e.mean_loss(0.75, 1), e.constant_loss
    if last is None or constant is None or not _is_at_the_start(e, last[0], constant):
        return None
    evidence = f"the loss of the last quarter is {last[0]:.3g}, a constant prediction has {constant:.3g}"
    return evidence, f"raise --max_train_steps {e.steps:,}, or --learning_rate {e.settings['learning_rate']:g}"


def _is_at_the_start(e: Evidence, loss: float, constant: float) -> bool:
    """Whether a loss has done less than 30% of the way from that of a constant prediction to a linear denoiser's."""
    # Without bounds the prediction is ε, and the loss of a linear denoiser is small beside that of a constant, 1.
    linear = 0.0 if e.bounds is None else mean_of(e.bounds["linear"])
    return loss > constant - 0.3 * (constant - linear)


def _too_few_steps(e: Evidence) -> Found:
    """The loss fell by more than a tenth from the third quarter of the run to the last."""
    third, last = e.mean_loss(0.5, 0.75), e.mean_loss(0.75, 1)
    if third is None or last is None:
        return None
    fall, error = third[0] - last[0], np.hypot(third[1], last[1])
    if fall <= 0.1 * third[0] or fall <= 3 * error:
        return None
    evidence = (
        f"the loss still fell by {fall / third[0]:.0%}, from {third[0]:.3g} to {last[0]:.3g}, in the last quarter"
    )
    return evidence, f"raise --max_train_steps {e.steps:,}"


def _stopped(e: Evidence) -> Found:
    """The loss has not fallen since the first quarter, and is above that of the best linear denoiser."""
    linear = _linear_levels(e)
    parts = [e.mean_loss(begin, begin + 0.25) for begin in (0.25, 0.5, 0.75)]
    if linear is None or any(part is None for part in parts):
        return None
    (second, error), (last, last_error) = parts[0], parts[-1]  # type: ignore[misc]
    bound = mean_of(linear)
    if second - last > 0.01 * second + 2 * np.hypot(error, last_error) or last < 1.05 * bound:
        return None
    evidence = (
        f"the loss is {second:.3g} in the second quarter, {last:.3g} in the last; a linear denoiser has {bound:.3g}"
    )
    return evidence, f"change --learning_rate {e.settings['learning_rate']:g}, or raise --block_out_channels"


# ---- noise levels ----


def _linear_levels(e: Evidence) -> list[float | None] | None:
    """The linear bound at the noise levels; None where it is not known, or from too few pictures to hold for others."""
    if e.bounds is None or e.bounds["linear_pictures"] < 3 * e.bounds["num_dimensions"]:
        return None
    return e.bounds["linear"]


def _losses_by_level(e: Evidence) -> list[tuple[float, float] | None]:
    """Training loss and its standard error at the noise levels, over the last quarter of the run."""
    rows = [line["loss_by_timestep"] for line in e.lines if line["step"] > 0.75 * e.steps]
    columns = [[value for value in column if value is not None] for column in zip(*rows, strict=True)]
    return [
        (float(np.mean(column)), float(np.std(column, ddof=1) / len(column) ** 0.5)) if len(column) > 1 else None
        for column in columns
    ]


def _worse_than_linear(e: Evidence) -> Found:
    """At some noise level the loss is above the best linear denoiser's by a tenth and by 1% of a constant's loss.

    The second condition leaves out losses that are small in any case: at t near T every network has some thousandths.
    """
    linear = _linear_levels(e)
    if linear is None or e.bounds is None:
        return None
    worse = []
    for level, loss in enumerate(_losses_by_level(e)):
        bound, constant = linear[level], e.bounds["constant"][level]
        if loss is None or bound is None or loss[0] - 3 * loss[1] <= bound + max(0.1 * bound, 0.01 * constant):
            continue
        worse.append(f"t/T {level / len(linear):.1f}–{(level + 1) / len(linear):.1f} {loss[0]:.3g} ({bound:.3g})")
    if not worse:
        return None
    evidence = f"loss, and that of the best linear denoiser: {', '.join(worse)}"
    return evidence, f"raise --max_train_steps {e.steps:,} or --block_out_channels; see loss_by_timestep.png"


def _overfitting(e: Evidence) -> Found:
    """The held-out loss is a fifth above the training loss, or has risen by 5% since its least."""
    remedy = (
        "raise --dropout or --augment_share, use more pictures, or take the checkpoint of the least validation loss"
    )
    if e.final is not None and "validation" in e.final:
        training, held_out = e.final["training"], e.final["validation"]
        error = np.hypot(e.final["training_error"], e.final["validation_error"])
        if held_out > 1.2 * training and held_out - training > 4 * error:
            return f"the loss is {training:.3g} on training pictures, {held_out:.3g} on held-out ones", remedy
    if len(e.validation) >= 3:
        step, least = min(e.validation, key=lambda pair: pair[1])
        last = e.validation[-1]
        if last[1] > 1.05 * least:
            evidence = f"the validation loss is {last[1]:.3g}, it was {least:.3g} at step {step:,} of {last[0]:,}"
            return evidence, remedy
    return None


def _remembers(e: Evidence) -> Found:
    """Where a denoiser that remembers would halve the linear loss, the model is 70% of the way there."""
    if e.bounds is None or e.final is None or e.bounds["memorised_pictures"] < e.bounds["num_images"]:
        return None
    near = []
    levels = zip(e.final["training_by_timestep"], e.bounds["linear"], e.bounds["memorised"], strict=True)
    for loss, linear, memorised in levels:
        if None not in (loss, linear, memorised) and memorised < 0.5 * linear:
            near.append((linear - loss) / (linear - memorised))
    if len(near) < 2 or np.mean(near) <= 0.7:
        return None
    evidence = f"{np.mean(near):.0%} of the way from a linear denoiser to one that remembers {e.bounds['num_images']:,}"
    return f"{evidence} pictures", "use more pictures or fewer steps, and a --validation_split to see it"


# ---- labels ----

MIN_LABEL_PICTURES = 256


def _labels_not_used(e: Evidence) -> Found:
    """Of 256 pictures or more, the loss with wrong labels is not higher by three standard errors."""
    if e.final is None or e.final.get("label_pictures", 0) < MIN_LABEL_PICTURES:
        return None
    difference, error = (e.final[f"wrong_minus_right_labels{end}"] for end in ("", "_error"))
    if difference >= 3 * error:
        return None
    evidence = f"with wrong labels the loss is higher by {difference:.2g}, standard error {error:.2g}"
    return evidence, "check the labels, raise --max_train_steps, or use --class_conditional false"


# ---- pictures ----


def _picture_range(e: Evidence) -> Found:
    """The training pictures use less than half of the values 0 … 255, or colour channels that are constant or equal."""
    if e.bounds is None:
        return None
    found = e.bounds["pictures"]
    low, high = min(found["minimum"]), max(found["maximum"])
    if high - low < 128:
        return (
            f"the training pictures have pixel values {low:g} … {high:g}, of 0 … 255",
            "store them with the full range",
        )
    if any(a == b for a, b in zip(found["minimum"], found["maximum"], strict=True)):
        return (
            f"a channel of the training pictures is constant: {found['minimum']} … {found['maximum']}",
            "--image_mode",
        )
    if found["gray"]:
        return "the three channels of all training pictures are equal", "--image_mode L is cheaper"
    return None


def _sample_range(e: Evidence) -> Found:
    """The drawn pictures are of one colour, have a constant channel, or are darker or brighter than the data's."""
    if e.samples is None:
        return None
    samples = e.samples.astype(float)
    inside = float(np.median(samples.reshape(len(samples), -1).std(1)))
    remedy = "compare more --ddpm_num_inference_steps, --prediction_type and the range of the pictures"
    data = None if e.bounds is None else e.bounds["pictures"]
    if inside < (8 if data is None else min(8, 0.25 * data["picture_std"])):
        return f"the drawn pictures are nearly of one colour: standard deviation {inside:.2g} of 255", remedy
    spread = samples.std((0, 2, 3))
    if len(spread) > 1 and spread.min() < 1 <= spread.max() and (data is None or min(data["std"]) >= 1):
        return f"a channel of the drawn pictures is constant: standard deviations {spread.round(1).tolist()}", remedy
    if data is None:
        return None
    mean, expected = samples.mean(), float(np.mean(data["mean"]))
    error = max(data["mean_std"], float(samples.mean((1, 2, 3)).std())) / len(samples) ** 0.5
    if abs(mean - expected) > 32 + 4 * error:
        return f"the drawn pictures have the mean pixel value {mean:.0f}, the training pictures {expected:.0f}", remedy
    return None


def _noise_in_samples(e: Evidence) -> Found:
    """Neighbouring pixels of the drawn pictures differ more than twice as much as those of the training pictures."""
    if e.samples is None or e.bounds is None or e.samples.shape[-1] < 2:
        return None
    drawn, expected = float(np.abs(np.diff(e.samples.astype(float))).mean()), e.bounds["pictures"]["roughness"]
    if drawn <= max(2 * expected, expected + 4):
        return None
    evidence = (
        f"neighbouring pixels of the drawn pictures differ by {drawn:.3g}, of the training pictures {expected:.3g}"
    )
    return evidence, "the findings above may be the reason; else raise --ddpm_num_inference_steps or --max_train_steps"


# ---- the schedule and the sampler ----

MAX_SIGNAL = 2.5e-3  # ᾱ where sampling starts from noise alone; Lin et al. 2024 (arXiv:2305.08891) object to 4.7e-3


def _signal_at_the_end(e: Evidence) -> Found:
    """ᾱ_T is above `MAX_SIGNAL`."""
    if e.scheduler is None:
        return None
    last = float(e.scheduler.alphas_cumprod[-1])
    if last <= MAX_SIGNAL:
        return None
    evidence = f"ᾱ_T is {last:.2g}, so x_T keeps {last**0.5:.0%} of the picture, and sampling starts without it"
    return evidence, "another --ddpm_beta_schedule, or --rescale_betas_zero_snr with --prediction_type v_prediction"


def _steps(e: Evidence) -> Iterator[torch.Tensor]:
    n = e.settings["ddpm_num_inference_steps"]
    if e.scheduler is not None and n is not None and n <= len(e.scheduler):
        e.scheduler.set_timesteps(n)
        yield e.scheduler.timesteps


def _late_start(e: Evidence) -> Found:
    """ᾱ at the first sampling step is above `MAX_SIGNAL` and 10 ᾱ_T."""
    for timesteps in _steps(e):
        assert e.scheduler is not None
        first, T = int(timesteps[0]), len(e.scheduler)
        signal, last = (float(e.scheduler.alphas_cumprod[t]) for t in (first, -1))
        if signal > max(MAX_SIGNAL, 10 * last):
            spacing = e.scheduler.config.timestep_spacing
            evidence = (
                f"sampling with {len(timesteps)} steps, spacing {spacing}, starts at t = {first} of {T}, ᾱ {signal:.2g}"
            )
            fitting = max(n for n in range(1, len(timesteps) + 1) if T % n == 0)
            remedy = f"--ddpm_num_inference_steps {fitting}, which divides {T}, or timestep_spacing trailing"
            return evidence, remedy
    return None


# Of the difference of unrelated pictures. Healthy runs on digits that predict ε have 0.08 to 0.09 with 5 steps, 0.04 to
# 0.05 with 10, 0.02 to 0.026 with 20 and 0.01 with 50; one that predicts x_0 has 0.04 with 50.
MAX_SAMPLING_CHANGE = 0.06


def _few_sampling_steps(e: Evidence) -> Found:
    """Pictures change with twice the steps; where this was not measured, fewer than 20 of a longer schedule."""
    for timesteps in _steps(e):
        assert e.scheduler is not None
        change = (e.final or {}).get("sampling_change")
        few = len(timesteps) < min(20, len(e.scheduler)) if change is None else change > MAX_SAMPLING_CHANGE
        if few:
            evidence = f"the grids are drawn with {len(timesteps)} of {len(e.scheduler)} steps"
            if e.final is not None and change is not None:
                evidence += f"; with {e.final['sampling_steps'][1]} the same seeds change by {change:.1%}"
                evidence += " of the difference between two pictures"
            return evidence, "--ddpm_num_inference_steps 100, or eta 0 when sampling with few"
    return None


BAD_LOSS = frozenset({"learning rate too high", "warm-up too long", "loss has not begun to fall"})

SYMPTOMS = (
    Symptom("learning rate too high", _high_learning_rate),
    Symptom("warm-up too long", _long_warm_up, frozenset({"learning rate too high"})),
    Symptom("loss has not begun to fall", _not_begun, frozenset({"learning rate too high", "warm-up too long"})),
    Symptom("overfitting", _overfitting),
    Symptom("remembers the training set", _remembers),
    Symptom("too few steps", _too_few_steps, BAD_LOSS | {"overfitting", "remembers the training set"}),
    Symptom("loss has stopped falling", _stopped, BAD_LOSS | {"too few steps"}),
    Symptom("worse than linear", _worse_than_linear, BAD_LOSS | {"loss has stopped falling"}),
    Symptom("labels not used", _labels_not_used, BAD_LOSS),
    Symptom("average too long", _long_average),
    Symptom("range or mode of the training pictures", _picture_range),
    Symptom("x_T shows the picture", _signal_at_the_end),
    Symptom("sampling starts too late", _late_start),
    Symptom("too few sampling steps", _few_sampling_steps, frozenset({"sampling starts too late"})),
    Symptom("drawn pictures look wrong", _sample_range),
    Symptom("drawn pictures are noisy", _noise_in_samples, frozenset({"drawn pictures look wrong"})),
)
