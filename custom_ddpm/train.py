"""`accelerate launch --quiet -m custom_ddpm.train …`: train a model on one process or many.

`train_ddpm.py` and `custom-ddpm train` call the same `main`. Torch is imported after the flags are parsed.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from .flags import parse_config


def main(
    argv: Sequence[str] | None = None,
    *,
    prog: str = "accelerate launch --quiet -m custom_ddpm.train",
    default_config: Path | None = None,
) -> None:
    """Parse the flags and train; ends with status 1 or 2 and one line of text when something is wrong.

    Args:
        argv: flags; those of the command line if None.
        prog: how the program is started, for --help.
        default_config: YAML file that is used when neither data nor --config is given.
    """
    config = parse_config(sys.argv[1:] if argv is None else argv, default_config, prog)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("custom_ddpm").setLevel(logging.INFO)

    from .hub.errors import HubError
    from .training import train
    from .training.launch import one_line_errors, start_all_cpu_processes

    with one_line_errors(ValueError, OSError, ArithmeticError, MemoryError, HubError):
        start_all_cpu_processes()
        train(config)


if __name__ == "__main__":
    main()
