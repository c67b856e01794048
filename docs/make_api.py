"""Write the API reference, as web pages made from the docstrings, into a folder.

`python docs/make_api.py FOLDER`

Made by pdoc; the first page is FOLDER/index.html. A module that cannot be imported and an annotation that cannot be
resolved are errors. That every public name has a docstring is checked by ruff (rules D1 in pyproject.toml).
"""

import argparse
import pkgutil
import warnings
from pathlib import Path

import custom_ddpm.pipelines
import pdoc

import custom_ddpm


def module_names() -> list[str]:
    """The package's public modules. They are named one by one, as pdoc leaves out those that no `__all__` lists."""
    names = ["custom_ddpm", "custom_ddpm.pipelines"]
    # An editable install has the pipelines outside the package's folder: they are searched on their own.
    for package in (custom_ddpm, custom_ddpm.pipelines):
        names += [module.name for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    return sorted({name for name in names if not name.split(".")[-1].startswith("_")})


def main() -> None:
    """Read the name of the folder and write the pages."""
    parser = argparse.ArgumentParser(description="Write the API reference into a folder.")
    parser.add_argument("folder", type=Path, help="where the pages go")
    args = parser.parse_args()
    warnings.filterwarnings("error", module="pdoc")
    # A package without `__all__` brings its modules along, which are named here too.
    warnings.filterwarnings("ignore", ".* has already been added", module="pdoc")
    pdoc.render.configure(docformat="google", math=True)
    pdoc.pdoc(*module_names(), output_directory=args.folder)


if __name__ == "__main__":
    main()
