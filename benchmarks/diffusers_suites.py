"""diffusers' own test suites, run on its classes and on ours; every difference must be a deliberate one.

`python benchmarks/diffusers_suites.py CLONE` takes a clone of https://github.com/huggingface/diffusers; of it only the
tests are used, best those of the installed diffusers' version. The suites run twice: as they are, and with
`DDPMScheduler`, `UNet2DModel` and `DDPMPipeline` replaced by ours in the namespace of diffusers. Without a connection,
tests that need the Hub fail both times. Prints a table, and every test with another outcome; the exit status is 1 if
one of them is not in `DELIBERATE`, or if an entry there explains nothing.
"""

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

SUITES = (
    "tests/schedulers/test_scheduler_ddpm.py",
    "tests/models/unets/test_models_unet_2d.py",
    "tests/pipelines/ddpm/test_ddpm.py",
    "tests/others/test_training.py",
)
# Pattern of test ids -> why another outcome is right.
SCHEDULER, UNET = "*::DDPMSchedulerTest::", "*::TestU*"
DELIBERATE = {
    f"{SCHEDULER}test_betas": "a β above 1 is refused: the step from x_(t-1) to x_t would have a negative variance",
    f"{SCHEDULER}test_trained_betas": "trained_betas of another length than num_train_timesteps are refused: timesteps "
    "are drawn from the latter",
    f"{SCHEDULER}test_rescale_betas_zero_snr": "zero SNR with ε-prediction is refused: x_0 cannot be computed from ε "
    "where ᾱ = 0",
    f"{SCHEDULER}test_variance_type": "an unknown variance_type is refused; stock takes it for fixed_small",
    f"{SCHEDULER}test_variance": "calls the private _get_variance; ours is posterior_mean_variance, checked in "
    "tests/test_scheduler.py",
    f"{SCHEDULER}test_full_loop_with_noise": "the expected sum has stock's float32 error in 1-ᾱ at t = 1; with its "
    "tables in float64 stock gives our number",
    f"{UNET}::test_mid_block_none": "a U-Net without a middle block is refused: it is not the paper's network",
    f"{UNET}::test_gradient_checkpointing_is_applied": "compares the class names of the blocks, which are others; "
    "that the same blocks have it is checked in tests/test_unet.py",
    "*::TestNCSNppModel*": "Fourier time embedding and skip blocks (NCSN++) are refused: they are another network",
    "*::DDPMPipelineFastTests::test_fast_inference": "the expected pixels are of stock's initial weights; ours are the "
    "paper's (Glorot, last layers zero)",
}
OUTCOMES = "DIFFUSERS_SUITES_OUTCOMES"  # the file that the plugin writes; its presence makes this file a plugin
REPLACED = "DIFFUSERS_SUITES_REPLACED"


# ---- the plugin, in the process of pytest ----


def pytest_configure() -> None:
    """Replace diffusers' classes before the test modules import them."""
    if not os.environ.get(REPLACED):
        return
    import diffusers

    import custom_ddpm

    diffusers.DDPMScheduler = custom_ddpm.CustomDDPMScheduler
    diffusers.UNet2DModel = custom_ddpm.CustomUNet2DModel
    diffusers.DDPMPipeline = custom_ddpm.CustomDDPMPipeline


def pytest_runtest_logreport(report: Any) -> None:
    """Append the outcome of a test's phase, with the last line of its error."""
    if report.outcome == "passed" and report.when != "call":
        return
    error = getattr(getattr(report.longrepr, "reprcrash", None), "message", "").split("\n")[0]
    with Path(os.environ[OUTCOMES]).open("a", encoding="utf-8") as file:
        file.write(json.dumps([report.nodeid, report.outcome, error]) + "\n")


# ---- the two runs, and their comparison ----


def run_suites(clone: Path, suites: list[str], replaced: bool) -> dict[str, tuple[str, str]]:
    """Outcome and error of every test, by its id."""
    with tempfile.TemporaryDirectory() as folder:
        outcomes = Path(folder, "outcomes.jsonl")
        outcomes.touch()
        environment = os.environ | {OUTCOMES: str(outcomes), REPLACED: "1" if replaced else ""}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        words = [sys.executable, "-m", "pytest", "-q", "-p", Path(__file__).stem, "-p", "no:cacheprovider"]
        result = subprocess.run([*words, *suites], cwd=clone, env=environment, capture_output=True, text=True)
        if result.returncode not in (0, 1):  # 1: some tests failed
            raise SystemExit(f"pytest ended with status {result.returncode}:\n{result.stdout}{result.stderr}")
        found: dict[str, tuple[str, str]] = {}
        for line in outcomes.read_text(encoding="utf-8").splitlines():
            name, outcome, error = json.loads(line)
            if found.get(name, ("",))[0] != "failed":
                found[name] = (outcome, error)
        return found


def reason_for(name: str) -> str | None:
    """The entry of `DELIBERATE` that a test's id matches."""
    return next((pattern for pattern in DELIBERATE if fnmatch.fnmatchcase(name, pattern)), None)


def main() -> None:
    """Run the suites twice and print what differs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("clone", type=Path, help="clone of the diffusers repository")
    clone = parser.parse_args().clone.resolve()
    suites = [suite for suite in SUITES if (clone / suite).is_file()]
    if not suites:
        raise SystemExit(f"{clone} has none of {', '.join(SUITES)}")
    stock, ours = (run_suites(clone, suites, replaced) for replaced in (False, True))

    print(f"{'suite':45} {'':6} passed failed skipped")
    for suite in suites:
        for label, outcomes in (("stock", stock), ("ours", ours)):
            count = Counter(outcome for name, (outcome, _) in outcomes.items() if name.startswith(suite))
            print(f"{suite:45} {label:6} {count['passed']:6} {count['failed']:6} {count['skipped']:7}")
    differing = [name for name in stock | ours if stock.get(name, ("absent",))[0] != ours.get(name, ("absent",))[0]]
    unexplained = [name for name in differing if reason_for(name) is None]
    for name in differing:
        outcomes = " -> ".join(each.get(name, ("absent", ""))[0] for each in (stock, ours))
        pattern = reason_for(name)
        print(f"\n{name}\n    {outcomes}: {DELIBERATE[pattern] if pattern else 'NOT EXPLAINED'}")
        print(f"    {ours.get(name, ('', ''))[1][:300]}")
    unused = DELIBERATE.keys() - {reason_for(name) for name in differing}
    for pattern in sorted(unused):
        print(f"\n{pattern}\n    is listed as deliberate, but nothing differs")
    print(f"\n{len(differing)} tests differ, {len(unexplained)} of them without a reason")
    raise SystemExit(bool(unexplained or unused))


if __name__ == "__main__":
    main()
