"""custom_ddpm/memory.py: freed memory is used again, without the system's help."""

import platform
import subprocess
import sys

import pytest

from custom_ddpm.memory import keep_freed_memory

CODE = """
import resource, sys, torch
from custom_ddpm.memory import keep_freed_memory

def faults():  # pages that the system had to supply while a tensor of 64 MB was made and freed
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "keep":
    assert keep_freed_memory()
# Small objects between them keep the first places apart, each too small for the tensor with what its alignment needs.
print(min(faults() for _ in range(20)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_the_pages_of_a_freed_tensor_are_used_again():
    def faults(word):
        return int(
            subprocess.run([sys.executable, "-c", CODE, word], capture_output=True, text=True, check=True).stdout
        )

    pages = 16 * 2**20 * 4 // 2**21  # the largest pages that a system may use
    assert faults("leave") >= pages
    assert faults("keep") < pages / 4


def test_a_c_library_without_the_settings_changes_nothing(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert keep_freed_memory() is False


def test_a_run_on_a_cpu_asks_for_it(monkeypatch, tmp_path):
    from custom_ddpm.config import TrainingConfig
    from custom_ddpm.training import parts

    asked = []
    monkeypatch.setattr(parts, "keep_freed_memory", lambda: asked.append(True))
    device = parts.build_accelerator(TrainingConfig(output_dir=str(tmp_path), mixed_precision="no")).device
    assert asked == [True] * (device.type == "cpu")
