"""`accelerate launch train_ddpm.py …`: parses the flags and trains; see `custom_ddpm/train.py`."""

from pathlib import Path

from custom_ddpm.train import main

if __name__ == "__main__":
    main(
        prog="accelerate launch train_ddpm.py",
        default_config=Path(__file__).parent / "examples" / "configs" / "digits.yaml",
    )
