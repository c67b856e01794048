"""Settings of `datasets` for the tests of custom_ddpm/data."""

import datasets
import pytest

# `datasets` sleeps for 5 seconds after it has read a shuffled parquet stream to its end, or has closed one.
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    """Give each test its own cache and disable progress bars."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
