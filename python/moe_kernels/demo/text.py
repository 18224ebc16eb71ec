"""English text that every Python brings: the language reference behind ``help()``."""

from typing import NamedTuple


class Texts(NamedTuple):
    """Two halves of one source, which share no topic."""

    calibration: str
    evaluation: str


def reference_texts() -> Texts:
    """The help topics of this Python, every other one for calibration and the rest for evaluation.

    About 460,000 characters in all; they differ a little between Python versions, and so do the demo's numbers.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise RuntimeError(
            f"demo: the module pydoc_data must come with this Python, got {error}; install the full standard library "
            "(Debian: libpython3-stdlib)"
        ) from error
    names = sorted(topics)
    return Texts(
        calibration="\n\n".join(topics[name] for name in names[0::2]),
        evaluation="\n\n".join(topics[name] for name in names[1::2]),
    )
