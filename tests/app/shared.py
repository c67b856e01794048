"""What the tests of the tabs need: the schedules once more, in NumPy, and reading what a tab shows."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np

T = 1000


def alpha_bars(schedule: str) -> np.ndarray:
    """ᾱ_0 … ᾱ_T by the definitions of the papers, with extended precision; index t."""
    u = np.arange(T + 1, dtype=np.longdouble) / T
    if schedule == "linear":
        betas = np.linspace(np.longdouble("0.0001"), np.longdouble("0.02"), T)
    elif schedule == "scaled_linear":
        betas = np.linspace(np.sqrt(np.longdouble("0.0001")), np.sqrt(np.longdouble("0.02")), T) ** 2
    elif schedule == "squaredcos_cap_v2":
        curve = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - curve[1:] / curve[:-1], np.longdouble("0.999"))
    else:
        betas = np.full(T, 1 - np.exp(np.longdouble(-12) / T))
    return np.concatenate([[np.longdouble(1)], np.cumprod(1 - betas)])


def parsed(html: str) -> ElementTree.Element:
    """The page as a tree; fails where an element is not closed or an attribute not quoted."""
    return ElementTree.fromstring(f"<main>{html}</main>")


def formula_numbers(root: ElementTree.Element) -> set[str]:
    return {element.text for element in root.iter("b")}


def placeholders(texts: dict[str, dict[str, str]]) -> list[dict[str, list[str]]]:
    """For each language, the fields to fill in of every text."""
    return [{key: sorted(re.findall(r"\{\w+\}", text)) for key, text in words.items()} for words in texts.values()]
