"""The tree as a test: every room reads the same, and imports go one way."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "python" / "moe_kernels"
ROOMS = sorted(path for path in (PACKAGE / "ops").iterdir() if (path / "api.py").exists())

#: what each layer may import of ours; a room's files may always import what is listed for their own name
ALLOWED = {
    "activation": set(),
    "env": {"_dispatch", "_extension"},
    "_checks": set(),
    "_extension": set(),
    "_dispatch": {"_extension", "env"},
    "memory": {"_extension"},
    "native": set(),
    "_opaque": set(),
    "triton": {"_opaque", "activation", "native", "pairs_triton"},
    "pairs_triton": set(),
    "unpack_triton": set(),
    "autograd": {"native", "triton", "activation"},
    "reference": {"activation"},
    "api": {"_checks", "_dispatch", "activation", "autograd", "native", "reference"},
}
#: files of a room beyond the six, each of them data that other rooms may read
DATA_FILES = {
    "magnitudes", "methods", "packed", "parts", "plan", "prepacked", "quantized", "recipe", "ternary", "tiles",
    "token_filter",
}  # fmt: skip
#: rooms in plain PyTorch: their results are what other rooms' kernels read, and no gradient flows through them
WITHOUT_KERNELS = {"quantize"}
#: rooms whose ops change weights or make new ones outside of autograd
WITHOUT_GRADIENTS = {"merge", "task_vector"}
#: rooms whose Triton kernels have no gradients, so that api chooses them
FORWARD_ONLY = {"ternary_linear"}
#: files of a room that hold more of its public functions: they may import what api may, and api
PUBLIC_FILES = {
    "logit_fusion": {"features", "heads", "presets", "tilt", "verify"},
    "route": {"capacity", "expert_choice", "forced", "logits", "losses", "random", "top_p", "two_level"},
    "routed_lora": {"serving"},
    "task_vector": {"compress", "part", "patch"},
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "moe_kernels":
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "moe_kernels"}
    return found


@pytest.mark.parametrize("room", ROOMS, ids=lambda path: path.name)
def test_room_has_its_files(room):
    names = {path.stem for path in room.glob("*.py")}
    with_kernels = room.name not in WITHOUT_KERNELS
    needed = {"__init__", "api", "reference"} | ({"native"} if with_kernels else set())
    needed |= {"autograd"} if with_kernels and room.name not in WITHOUT_GRADIENTS else set()
    assert needed <= names
    public = PUBLIC_FILES.get(room.name, set())
    assert (
        public
        <= names
        <= {"__init__", "api", "reference", "autograd", "native", "triton", "pairs_triton", "unpack_triton"}
        | DATA_FILES
        | public
    )
    if with_kernels:
        sources = {path.name for path in (ROOT / "csrc" / "ops" / room.name).iterdir()}
        assert any(name.endswith("_cpu.cpp") for name in sources)
    test = ROOT / "tests" / "ops" / f"test_{room.name.lstrip('_')}.py"
    assert test.exists(), "each room has its test file"


def test_no_sources_without_a_room():
    assert {path.name for path in (ROOT / "csrc" / "ops").iterdir()} == {room.name for room in ROOMS} - WITHOUT_KERNELS


@pytest.mark.parametrize("room", ROOMS, ids=lambda path: path.name)
def test_imports_within_a_room_go_one_way(room):
    for path in room.glob("*.py"):
        if path.stem == "__init__" or path.stem in DATA_FILES:
            continue
        is_public = path.stem in PUBLIC_FILES.get(room.name, ())
        allowed = ALLOWED["api"] | {"api"} if is_public else ALLOWED[path.stem]
        # elsewhere autograd chooses among the kernels
        if path.stem == "api" and room.name in WITHOUT_GRADIENTS | FORWARD_ONLY:
            allowed = allowed | {"triton", "unpack_triton"}
        for name in imports(path):
            parts = name.removeprefix("moe_kernels.").split(".")
            if parts[0] == "ops":
                if parts[1] == room.name:
                    assert parts[2] in allowed | DATA_FILES, f"{path}: {name}"
                else:  # another room: its data, or the file of the same rank
                    assert parts[2] in {path.stem.removeprefix("pairs_")} | DATA_FILES, f"{path}: {name}"
            else:
                assert parts[0] in allowed, f"{path}: {name}"


@pytest.mark.parametrize("name", ["activation", "env", "_checks", "_extension", "_dispatch", "_opaque", "memory"])
def test_imports_below_the_rooms(name):
    for found in imports(PACKAGE / f"{name}.py"):
        parts = found.removeprefix("moe_kernels.").split(".")
        assert parts[0] in ALLOWED[name] | {"_host"}, f"{name}: {found}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "nn").rglob("*.py")), ids=lambda path: path.name)
def test_modules_are_made_of_public_ops(path):
    for name in imports(path):
        parts = name.removeprefix("moe_kernels.").split(".")
        assert parts[0] not in {"integrations", "distributed", "demo", "_dispatch", "_extension"}, f"{path}: {name}"
        assert parts[0] != "ops" or len(parts) <= 3, f"{path}: {name}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "distributed").glob("*.py")), ids=lambda path: path.name)
def test_distributed_is_made_of_modules_and_public_ops(path):
    for name in imports(path):
        parts = name.removeprefix("moe_kernels.").split(".")
        assert parts[0] in {"distributed", "nn", "ops", "activation", "_checks", "_dispatch"}, f"{path}: {name}"
        assert parts[0] != "ops" or len(parts) <= 3, f"{path}: {name}"


def test_files_stay_short():
    for folder, pattern in ((PACKAGE, "*.py"), (ROOT / "csrc", "*.cpp"), (ROOT / "csrc", "*.h")):
        for path in folder.rglob(pattern):
            assert len(path.read_text().splitlines()) <= 600, f"{path}: split it"


def test_every_environment_variable_is_listed():
    listed = (PACKAGE / "env.py").read_text()
    for folder in (PACKAGE, ROOT / "csrc"):
        for path in folder.rglob("*.*"):
            if path.suffix not in (".py", ".cpp", ".h"):
                continue
            for word in path.read_text().replace('"', " ").replace("'", " ").split():
                if word.startswith("MOE_KERNELS_") and word.isidentifier():
                    assert word in listed, f"{path}: {word}"
