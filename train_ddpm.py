"""`accelerate launch --quiet train_ddpm.py …`: parses the flags and trains; see `custom_ddpm/train.py`."""

from pathlib import Path

from custom_ddpm import train


def main() -> None:
    """Train on the data that the flags name, or on the digits in examples/."""
    digits = Path(__file__).parent / "examples" / "configs" / "digits.yaml"
    train.main(prog="accelerate launch --quiet train_ddpm.py", default_config=digits)


if __name__ == "__main__":
    main()
