"""Mutation testing of the mathematics: `python benchmarks/mutate.py [MODULE[:FUNCTION,…] …]`.

Every number in a formula, every arithmetic expression and every mathematical call of these files is multiplied by
1.0001, every + − × ÷ is replaced by its inverse, every minus sign is dropped and every < by ≤, > by ≥ and the reverse,
one change at a time; only in the functions that are named, if any are. For each change the tests run until one fails;
it is printed whether one did. Uses as many processes as it may use cores; the files themselves are not
modified. The steps of higher order, the timesteps and the tuning alone:

    python benchmarks/mutate.py scheduler:_setting,_tuned_setting,_spaced,_use_timesteps,_step_table,\\
    _multistep_weights,_terms,_corrected,step schedules:_optimal_timesteps \\
    likelihood:estimate_original_sample_variances evaluation.tune
"""

import ast
import contextlib
import copy
import importlib.util
import io
import multiprocessing
import os
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType

os.environ["OMP_NUM_THREADS"] = "1"

# Imported once, before the forks, so that every child inherits the modules. The package itself must not be imported
# here: each child imports its own mutated version.
import accelerate  # noqa: F401
import datasets  # noqa: F401
import hypothesis
import mpmath  # noqa: F401
import pytest
import scipy.stats  # noqa: F401
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, UNet2DModel  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
TESTS = {
    "schedules": ("test_schedules.py", "test_timesteps.py"),
    "scheduler": (
        "test_multistep.py",
        "test_tuned.py",
        "test_timesteps.py",
        "test_scheduler.py",
        "test_scheduler_step.py",
        "test_exact_world.py",
    ),
    "likelihood": ("test_likelihood.py",),
    "objective": ("test_objective.py",),
    "evaluation.tune": ("evaluation/test_tune.py",),
}
FILES = {module: ROOT / "custom_ddpm" / f"{module.replace('.', '/')}.py" for module in TESTS}
SOURCES = {module: file.read_text() for module, file in FILES.items()}
SLOW = "not compile and not million and not samples_"  # slow tests, whose coefficients the others cover
MATHEMATICS = set(
    "arange cat clamp cos cumsum diff exp expm1 lerp linspace log log1p log_ndtr maximum mean quantile sigmoid sqrt "
    "square sum".split()
)
OPPOSITE = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
NEIGHBOUR = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
ARITHMETIC = (*OPPOSITE, ast.Pow, ast.FloorDiv, ast.Mod)


def is_arithmetic(node: ast.AST) -> bool:
    """Whether the node is a binary arithmetic expression."""
    return isinstance(node, ast.BinOp) and isinstance(node.op, ARITHMETIC)


def changes(node: ast.AST, parent: ast.AST) -> Iterator[ast.AST]:
    """Mutated versions of one node. An integer is mutated only where it is an operand of an arithmetic expression."""
    number = type(node.value) if isinstance(node, ast.Constant) and node.value else None
    is_number = number is float or (number is int and is_arithmetic(parent))
    is_mathematics = isinstance(node, ast.Call) and getattr(node.func, "attr", None) in MATHEMATICS
    if is_number or is_arithmetic(node) or is_mathematics:
        yield ast.BinOp(copy.deepcopy(node), ast.Mult(), ast.Constant(1.0001))
    if isinstance(node, ast.BinOp) and type(node.op) in OPPOSITE:
        yield ast.BinOp(node.left, OPPOSITE[type(node.op)](), node.right)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield node.operand
    if isinstance(node, ast.Compare) and type(node.ops[0]) in NEIGHBOUR:
        yield ast.Compare(node.left, [NEIGHBOUR[type(node.ops[0])](), *node.ops[1:]], node.comparators)


def places(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None]]:
    """All (parent, field, index) whose expression may be mutated; annotations, messages and subscripts are skipped."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "slice", "decorator_list"):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST) and not isinstance(child, (ast.Raise, ast.JoinedStr)):
                yield node, field, index
                yield from places(child)


def mutants(tree: ast.Module) -> Iterator[str]:
    """Apply each mutation to the tree in place, one at a time, and yield its description."""
    for parent, field, index in list(places(tree)):
        holder, key = (vars(parent), field) if index is None else (getattr(parent, field), index)
        original = holder[key]
        for changed in changes(original, parent):
            holder[key] = changed
            ast.fix_missing_locations(ast.copy_location(changed, original))
            yield f"{original.lineno}: {ast.unparse(original)}  ->  {ast.unparse(changed)}"
        holder[key] = original


class MutantLoader(SourceFileLoader):
    """Import loader and finder that replaces one module of the package by its mutant of the given number."""

    def __init__(self, module: str, number: int) -> None:
        super().__init__(f"custom_ddpm.{module}", str(FILES[module]))
        self.source, self.number = SOURCES[module], number

    def get_code(self, fullname: str) -> CodeType | None:
        """Compile the mutated source."""
        tree = ast.parse(self.source)
        for number, _ in enumerate(mutants(tree)):
            if number == self.number:
                break
        return compile(tree, self.path, "exec")

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        """The module spec for the mutated module; None for every other module."""
        if fullname != self.name:
            return None
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self)


def failure(task: tuple[str, int]) -> str:
    """Run the tests on a mutant; returns their output, or "" if all pass. Number −1 is the unmodified file."""
    module, number = task
    torch.set_num_threads(1)
    sys.meta_path.insert(0, MutantLoader(module, number))
    hypothesis.settings.register_profile("mutate", database=None, deadline=None, max_examples=20)
    hypothesis.settings.load_profile("mutate")
    arguments = ["-x", "-q", "-p", "no:cacheprovider", "-k", SLOW]
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        passed = all(pytest.main([*arguments, str(ROOT / "tests" / name)]) == 0 for name in TESTS[module])
    return "" if passed else output.getvalue()


def chosen(argument: str) -> dict[tuple[str, int], str]:
    """The mutants of a module, or of some of its functions, by module and number; `argument` is MODULE[:FUNCTION,…]."""
    module, _, names = argument.partition(":")
    tree = ast.parse(SOURCES[module])
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in names.split(",")]
    if names and {node.name for node in functions} != {*names.split(",")}:
        sys.exit(f"{module} has no functions {names}")
    lines = {line for node in functions for line in range(node.lineno, (node.end_lineno or 0) + 1)}
    numbered = enumerate(mutants(tree))
    return {(module, i): text for i, text in numbered if not names or int(text.partition(":")[0]) in lines}


def main() -> None:
    """Run all mutants of what is named on the command line and print those that survive."""
    descriptions: dict[tuple[str, int], str] = {}
    for argument in sys.argv[1:] or TESTS:
        descriptions |= chosen(argument)
    print(f"{len(descriptions)} mutants", flush=True)
    survivors = 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
    with multiprocessing.get_context("fork").Pool(min(cores, 2), maxtasksperchild=1) as pool:
        unchanged = [(module, -1) for module in dict.fromkeys(module for module, _ in descriptions)]
        if failed := "".join(pool.map(failure, unchanged, chunksize=1)):
            sys.exit(f"{failed}\nthe tests fail on the unmodified files")
        for task, failed in zip(descriptions, pool.imap(failure, descriptions, chunksize=1), strict=True):
            survivors += not failed
            file = FILES[task[0]].relative_to(ROOT)
            print(f"{'killed  ' if failed else 'survived'}  {file}:{descriptions[task]}", flush=True)
    print(f"{len(descriptions) - survivors} killed, {survivors} survived")


if __name__ == "__main__":
    main()
