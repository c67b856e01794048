"""`accelerate launch train_ddpm.py`: parses the flags and calls `custom_ddpm.training.train`."""

import logging
import sys
from pathlib import Path

from custom_ddpm.config import parse_config
from custom_ddpm.launch import start_all_cpu_processes
from custom_ddpm.training import train


def main() -> None:
    config = parse_config(sys.argv[1:], default_config=Path(__file__).parent / "examples" / "configs" / "digits.yaml")
    start_all_cpu_processes()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("custom_ddpm").setLevel(logging.INFO)
    try:
        train(config)
    except (ValueError, OSError, RuntimeError, ArithmeticError, MemoryError) as error:
        sys.exit(f"train_ddpm.py: error: {error}")


if __name__ == "__main__":
    main()
