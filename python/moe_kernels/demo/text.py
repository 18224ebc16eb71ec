"""Text that every Python brings: the language reference behind ``help()``, the library's own source, its help pages."""

import importlib
import inspect
import pydoc
from typing import NamedTuple


class Texts(NamedTuple):
    """Two parts of one source, which share no paragraph."""

    calibration: str
    evaluation: str


def reference_texts() -> Texts:
    """The help topics of this Python: every other one for calibration, for evaluation what the rest say besides.

    Topics quote each other at length, so a paragraph counts where it comes first. About 370,000 characters in all
    with Python 3.11; they differ a little between Python versions, and so do the demo's numbers.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise RuntimeError(
            f"demo: the module pydoc_data must come with this Python, got {error}; install the full standard library "
            "(Debian: libpython3-stdlib)"
        ) from error
    names = sorted(topics)
    seen: set[str] = set()
    calibration = _new_paragraphs([topics[name] for name in names[0::2]], seen)
    return Texts(calibration, _new_paragraphs([topics[name] for name in names[1::2]], seen))


def source_texts() -> Texts:
    """Source code of the standard library: some modules for calibration, others for evaluation."""
    parts = (("argparse", "ast", "difflib"), ("dataclasses", "heapq", "textwrap", "statistics"))
    return Texts(*("\n".join(inspect.getsource(importlib.import_module(name)) for name in names) for names in parts))


def help_texts() -> Texts:
    """What ``help()`` prints of modules of the standard library: some for calibration, others for evaluation."""
    parts = (("json", "random", "pathlib", "textwrap"), ("statistics", "heapq", "shutil", "fractions"))

    def page(name: str) -> str:
        return pydoc.render_doc(importlib.import_module(name), renderer=pydoc.plaintext)

    return Texts(*("\n".join(map(page, names)) for names in parts))


def _new_paragraphs(texts: list[str], seen: set[str]) -> str:
    """The paragraphs of ``texts`` that are not in ``seen``, in order; adds them to it."""
    new = []
    for paragraph in "\n\n".join(texts).split("\n\n"):
        key = " ".join(paragraph.split())
        if key and key not in seen:
            seen.add(key)
            new.append(paragraph)
    return "\n\n".join(new)
