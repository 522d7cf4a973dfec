"""Imports inside the package go downward only, and operators know nothing of Flax."""

import ast
from collections.abc import Iterator
from pathlib import Path

import moe_jax

PACKAGE = Path(moe_jax.__file__).parent

# What a layer may import besides itself. Modules directly under moe_jax are the commands, save for
# the foundation.
FOUNDATION = {
    *("config", "curriculum", "fields", "platform", "schedules", "sharding", "sizes", "units"),
    "validation",
}
OPS = FOUNDATION | {"ops"}
LAYERS = OPS | {"layers"}
MODELS = LAYERS | {"models"}
MIDDLE = MODELS | {"data"}
TRAINING = MIDDLE | {"inference", "planning", "interop"}
ALLOWED = {
    "ops": FOUNDATION,
    "layers": OPS,
    "models": LAYERS,
    "data": {"config", "curriculum", "fields"},
    "inference": MIDDLE,
    "planning": MODELS,
    "interop": MODELS,
    "training": TRAINING,
    "commands": TRAINING | {"training"},
    **{name: FOUNDATION for name in FOUNDATION},
}
# A layer that must not import a library.
FORBIDDEN_LIBRARIES = {"ops": {"flax"}}


def _layer(parts: tuple[str, ...]) -> str:
    """The layer of a module by its path under the package: ("layers", "mlp") is in "layers"."""
    if len(parts) == 1 and parts[0] not in FOUNDATION | set(ALLOWED):
        return "commands"
    return parts[0]


def _imports(tree: ast.Module, module: tuple[str, ...], is_package: bool) -> Iterator[str]:
    """Absolute dotted names that a module imports, with the names after `import` appended."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module.split(".") if node.module else []
            if node.level:
                drop = node.level - 1 if is_package else node.level
                base = [*module[: len(module) - drop], *base]
            yield from (".".join([*base, alias.name]) for alias in node.names)


def violations(package: Path) -> list[str]:
    """One line for every import under `package` (a folder named moe_jax) that the rules forbid."""
    found = []
    for file in sorted(package.rglob("*.py")):
        is_package = file.name == "__init__.py"
        path = file.relative_to(package.parent).with_suffix("").parts
        module = path[:-1] if is_package else path
        layer = _layer(module[1:]) if len(module) > 1 else "moe_jax/__init__.py"
        if layer != "moe_jax/__init__.py" and layer not in ALLOWED:
            found.append(f"{file}: the folder {layer} has no place among the layers")
            continue
        for name in _imports(ast.parse(file.read_text()), module, is_package):
            parts = tuple(name.split("."))
            if parts[0] in FORBIDDEN_LIBRARIES.get(layer, ()):
                found.append(f"{file}: {layer} imports {name}")
            if parts[0] == package.name and len(parts) > 1:
                target = _layer(_module_parts(package, parts[1:]))
                if target != layer and target not in ALLOWED.get(layer, ()):
                    found.append(f"{file}: {layer} imports {name}")
    return found


def _module_parts(package: Path, parts: tuple[str, ...]) -> tuple[str, ...]:
    """`parts` less a last name that is not a module but something inside it."""
    if package.joinpath(*parts).is_dir() or package.joinpath(*parts).with_suffix(".py").exists():
        return parts
    return parts[:-1] or parts


def test_imports_go_downward() -> None:
    assert violations(PACKAGE) == []


def test_the_check_finds_planted_violations(tmp_path: Path) -> None:
    def plant(path: str, text: str) -> None:
        file = tmp_path / "moe_jax" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    plant("__init__.py", "")
    plant("main.py", "from moe_jax.training import loop\nfrom moe_jax import train_lm\n")
    plant("train_lm.py", "from moe_jax.config import Config\n")
    plant("config.py", "from moe_jax.ops import rope\n")
    plant("ops/rope.py", "from flax import nnx\nimport jax\n")
    plant("ops/routing.py", "def f():\n    from ..layers import mlp\n")
    plant("layers/mlp.py", "from moe_jax.ops.rope import rotate\nimport moe_jax.models.decoder\n")
    plant("data/packing.py", "from moe_jax import config\nfrom moe_jax.sharding import BATCH\n")
    plant("models/decoder.py", "from moe_jax.data import packing\n")
    plant("training/loop.py", "from moe_jax.data import packing\nfrom moe_jax.main import run\n")
    plant("planning/memory.py", "from moe_jax.inference import generate\n")
    plant("extras/thing.py", "import os\n")

    found = [line.removeprefix(f"{tmp_path}/moe_jax/") for line in violations(tmp_path / "moe_jax")]
    assert found == [
        "config.py: config imports moe_jax.ops.rope",
        "data/packing.py: data imports moe_jax.sharding.BATCH",
        "extras/thing.py: the folder extras has no place among the layers",
        "layers/mlp.py: layers imports moe_jax.models.decoder",
        "models/decoder.py: models imports moe_jax.data.packing",
        "ops/rope.py: ops imports flax.nnx",
        "ops/routing.py: ops imports moe_jax.layers.mlp",
        "planning/memory.py: planning imports moe_jax.inference.generate",
        "training/loop.py: training imports moe_jax.main.run",
    ]
