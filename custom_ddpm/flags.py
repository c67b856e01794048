"""Command-line flags and YAML files of the training configuration.

The keys of a YAML file given by `--config` are read as flags that stand before all others, so both pass through one
parser and flags win. This module does not import torch: `--help` answers at once.
"""

import argparse
import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ._version import __version__
from .config import GROUPS, TrainingConfig, choices_of, value_type


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "yes", "on", "1"):
        return True
    if text.lower() in ("false", "no", "off", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


class _Parser(argparse.ArgumentParser):
    """Says which flag may be meant by an unknown one."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, unknown = super().parse_known_args(args, namespace)
        for word in unknown:
            if word.startswith("--"):
                self.error(f"unknown flag {word}{_meant(word.partition('=')[0], self._option_string_actions)}")
        return known, unknown


def _meant(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""


def _default_text(value: Any) -> str:
    if value is None or value == []:
        return ""
    words = value if isinstance(value, list) else [str(value).lower() if isinstance(value, bool) else value]
    return f" (default: {' '.join(map(str, words))})"


def _program(prog: str) -> str:
    """How the program is started, without its launcher."""
    return prog.removeprefix("accelerate launch --quiet ").removeprefix("-m ")


def make_parser(prog: str) -> argparse.ArgumentParser:
    """The parser of the training flags, in groups, `--config` first."""
    parser = _Parser(
        prog=_program(prog),
        usage=f"{prog} [--config FILE] [--flag value ...]",
        description="Train a DDPM on pictures. Flags may be written with dashes or underscores.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these flags as keys; flags win over it")
    parser.add_argument("--version", action="version", version=f"custom-ddpm {__version__}")
    groups = {name: parser.add_argument_group(name, text) for name, text in GROUPS.items()}
    for spec in dataclasses.fields(TrainingConfig):
        kind, is_list = value_type(spec.name)
        default = spec.default if spec.default_factory is dataclasses.MISSING else spec.default_factory()
        options: dict[str, Any] = {"default": default, "dest": spec.name}
        text = " (default: by --recipe)" if spec.metadata["by_recipe"] else _default_text(default)
        options["help"] = (spec.metadata["help"] + text).replace("%", "%%")
        group, flag = groups[spec.metadata["group"]], f"--{spec.name}"
        if kind is bool:
            group.add_argument(flag, type=_boolean, nargs="?", const=True, metavar="true|false", **options)
            group.add_argument(  # diffusers' and transformers' habit for what is on by default
                f"--no_{spec.name}", action="store_false", dest=spec.name, default=default, help=argparse.SUPPRESS
            )
            continue
        choices = choices_of(spec)
        metavar = None if choices else {int: "N", float: "X", str: "TEXT"}[kind]
        nargs = ("*" if kind is str else "+") if is_list else None
        group.add_argument(flag, type=kind, nargs=nargs, choices=choices, metavar=metavar, **options)
    return parser


def _underscored(argv: Sequence[str]) -> list[str]:
    """Flags with underscores, as they are named; values are left as they are."""
    words = []
    for word in argv:
        name, equals, value = word.partition("=")
        words.append(name[:2] + name[2:].replace("-", "_") + equals + value if word.startswith("--") else word)
    return words


def _yaml_words(path: str) -> list[str]:
    """The keys of a YAML file as command-line words.

    Raises:
        ValueError: the file cannot be read, is no mapping, or has an unknown key or an invalid value.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"--config {path}: it must hold `flag: value` lines")
    specs = {spec.name: spec for spec in dataclasses.fields(TrainingConfig)}
    words = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in specs:
            raise ValueError(f"--config {path}: unknown key {key}{_meant(name, specs) or '; keys are names of flags'}")
        try:
            words += _yaml_value(specs[name], value)
        except ValueError as error:
            raise ValueError(f"--config {path}: {key} {error}") from None
    return words


def _yaml_value(spec: dataclasses.Field, value: Any) -> list[str]:
    """One key and its value as command-line words."""
    kind, is_list = value_type(spec.name)
    if value is None:
        if spec.default is not None:
            raise ValueError("has no value; in YAML a value that begins with # must stand in quotes")
        return []
    if isinstance(value, dict) or (isinstance(value, list) and not is_list):
        raise ValueError(f"is {value!r}; it must be one value")
    if isinstance(value, bool) and kind is not bool:
        # YAML reads an unquoted no, off, yes or on as a truth value.
        word = "no" if value is False else "yes"
        if word not in (choices_of(spec) or ()):
            raise ValueError(f"is read as {str(value).lower()} by YAML; put the value in quotes")
        value = word
    return [f"--{spec.name}", *map(str, value if isinstance(value, list) else [value])]


def parse_config(
    argv: Sequence[str], default_config: Path | None = None, prog: str = "accelerate launch --quiet train_ddpm.py"
) -> TrainingConfig:
    """Command-line words to a `TrainingConfig`; exits with status 2 and one line when something is wrong.

    Args:
        argv: the words after the program's name.
        default_config: YAML file that is used when neither data nor --config is given.
        prog: how the program is started, for --help.
    """
    parser, argv = make_parser(prog), _underscored(argv)

    def fail(message: object) -> NoReturn:
        parser.exit(2, f"{parser.prog}: error: {message}\n")

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("config", "dataset_name", "train_data_dir"):
        first.add_argument(f"--{name}", nargs="?")
    found, _ = first.parse_known_args(argv)
    file = found.config
    if default_config is not None and not (found.config or found.dataset_name or found.train_data_dir):
        file = str(default_config)
    try:
        values = vars(parser.parse_args([*(_yaml_words(file) if file else []), *argv]))
        del values["config"]
        return TrainingConfig(**values)
    except ValueError as error:
        fail(error)
