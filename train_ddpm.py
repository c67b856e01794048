"""`accelerate launch train_ddpm.py`: parses the flags and calls `custom_ddpm.training.train`."""

import logging
import sys
from pathlib import Path

from custom_ddpm.config import parse_config
from custom_ddpm.hub import HubError
from custom_ddpm.launch import one_line_errors, start_all_cpu_processes
from custom_ddpm.training import train


def main() -> None:
    config = parse_config(sys.argv[1:], default_config=Path(__file__).parent / "examples" / "configs" / "digits.yaml")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("custom_ddpm").setLevel(logging.INFO)
    with one_line_errors(ValueError, OSError, ArithmeticError, MemoryError, HubError):
        start_all_cpu_processes()
        train(config)


if __name__ == "__main__":
    main()
