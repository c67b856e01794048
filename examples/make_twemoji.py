"""Turn the Twemoji pictures of the npm package `emoji-datasource-twitter` into a dataset that `load_dataset` opens.

    npm pack emoji-datasource-twitter && tar xzf emoji-datasource-twitter-*.tgz
    python examples/make_twemoji.py package <new folder>

The graphics are Twemoji, copyright Twitter, Inc and other contributors, CC BY 4.0: who shows them, or what was trained
on them, names them. The package around them is Cal Henderson's, under the MIT licence.
"""

import argparse
import json
import sys
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

CARD = """\
---
pretty_name: Twemoji
license: cc-by-4.0
---

# Twemoji

The emoji of the Twemoji set, 64x64, RGBA, labelled with their Unicode category. Graphics copyright Twitter, Inc
and other contributors, licensed under [CC BY 4.0](https://creativecommons.org/licenses/by/4.0/),
<https://github.com/jdecked/twemoji>; their pixels taken unchanged from the npm package `emoji-datasource-twitter`.
"""


def twemoji(package: Path) -> Dataset:
    """The pictures of the unpacked npm package, in the order of their file names.

    All are RGBA (the package keeps some with a palette), as drawn: colours over a transparent ground. The label is the
    category that `emoji.json` gives the emoji; a skin tone has the category of its emoji.

    Raises:
        ValueError: if the package has no pictures, or one that `emoji.json` does not know.
    """
    category = {}
    for emoji in json.loads((package / "emoji.json").read_text(encoding="utf-8")):
        for variant in [emoji, *emoji.get("skin_variations", {}).values()]:
            category[variant["image"]] = emoji["category"]
    paths = sorted((package / "img" / "twitter" / "64").glob("*.png"))
    if not paths:
        raise ValueError(f"no pictures in {package / 'img' / 'twitter' / '64'}: is {package} the unpacked package?")
    unknown = [path.name for path in paths if path.name not in category]
    if unknown:
        raise ValueError(f"{len(unknown)} pictures are not in {package / 'emoji.json'}, the first is {unknown[0]}")
    features = Features({"image": Image(), "label": ClassLabel(names=sorted(set(category.values())))})
    columns = {
        "image": [PILImage.open(path).convert("RGBA") for path in paths],
        "label": [category[path.name] for path in paths],
    }
    return Dataset.from_dict(columns, features=features)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="folder that the npm package was unpacked into")
    parser.add_argument("output", type=Path, help="folder to make")
    arguments = parser.parse_args()
    try:
        pictures = twemoji(arguments.package)
        arguments.output.mkdir(parents=True)
    except (OSError, ValueError) as error:
        sys.exit(f"{parser.prog}: {error}")
    pictures.to_parquet(arguments.output / "train.parquet")
    (arguments.output / "README.md").write_text(CARD)
