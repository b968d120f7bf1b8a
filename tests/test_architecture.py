"""The layers of the package, checked by its imports: no module imports from a higher layer.

seq2seq -> attention -> functional -> {checks, autograd -> ops} -> backends -> each backend
-> {reference, _C, kernels}
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fused_attn

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fused_attn"
KERNELS = ROOT / "kernels"

# Lowest first. A module may import only from lower layers or from its own package.
LAYERS = (
    ("_C", "kernels", "choices"),
    ("problem", "reference", "modules"),
    ("composed", "composites", "fakes", "operands", "prepared"),
    ("backends.*.*",),
    ("backends.*",),
    ("backends",),
    ("checks", "ops", "routes"),
    ("autograd", "export"),
    ("ragged",),
    ("functional", "scores", "layer_options", "layer_parts", "warm_up", "recurrent"),
    ("attention",),
    ("packed",),
    ("decoder_parts", "decoder_spec"),
    ("decoder_steps", "greedy", "native_decoder"),
    ("decoder",),
    ("interop",),
    ("seq2seq",),
    ("info", "testing"),
    ("cli",),
    ("__main__",),
)
# The rooms of the toolkit, lowest first. The ground are modules; the others are packages.
GROUND = ("config", "errors", "vocabulary", "metrics", "devices", "option_rules", "outputs")
ROOMS = (
    "data",
    "tasks",
    "model",
    "search",
    "checkpoints",
    "inference",
    "training",
    "commands",
)
# The command line reads these before it needs torch.
WITHOUT_TORCH = (
    *("config", "errors", "vocabulary", "metrics", "tasks"),
    *("data.pairs", "data.links", "data.pair_files", "data.tokenizers"),
    *("data.texts", "data.text_files"),
    *("commands.arguments", "commands.config_file", "commands.option_help"),
    *("option_rules", "outputs", "commands.parser", "commands.train_arguments"),
    "commands.streams",
)
# These may use the packages of the extras; everything else needs only torch.
NEEDS_EXTRAS = ("seq2seq", "interop", "cli", "__main__")
IMPORTS_NATIVE = {"backends.cpu", "backends.cuda", "info"}

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"  # it imports lazily; its cost is tested below
}


def layer(module: str) -> int:
    top, _, rest = module.partition(".")
    depth = rest.count(".") + 1 if rest else 0
    place = ".".join([top, *["*"] * depth]) if top == "backends" else top
    for height, names in enumerate(LAYERS):
        if place in names:
            return height
    raise AssertionError(f"fused_attn/{module} belongs to no layer: add it to LAYERS")


def package(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "backends" and len(parts) > 1 else parts[0]


def absolute(node: ast.ImportFrom, module: str, path: Path) -> str:
    """The absolute name of the module that a from-import names."""
    if not node.level:
        return node.module or ""
    parts = ["fused_attn", *module.split(".")]
    keep = len(parts) - node.level + (path.name == "__init__.py")
    return ".".join([*parts[:keep], *filter(None, [node.module])])


def imports(module: str, path: Path) -> Iterator[str]:
    """Full names of all modules that a file imports anywhere, including by public names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = absolute(node, module, path)
            for alias in node.names:
                if source == "fused_attn" and alias.name in fused_attn._HOME:
                    yield fused_attn._HOME[alias.name]
                elif source == "fused_attn" and alias.name.startswith("__"):
                    continue  # __version__ belongs to no layer
                else:
                    child = f"{source}.{alias.name}".removeprefix("fused_attn.")
                    is_module = child in MODULES or child in ("_C", "kernels")
                    yield f"{source}.{alias.name}" if is_module else source


def internal(module: str, path: Path) -> set[str]:
    names = {name for name in imports(module, path) if name.split(".")[0] == "fused_attn"}
    # A bare `import fused_attn` reaches every public name.
    return {"attention" if name == "fused_attn" else name[len("fused_attn.") :] for name in names}


def external(module: str, path: Path) -> set[str]:
    roots = {name.split(".")[0] for name in imports(module, path)}
    return roots - {"fused_attn"} - sys.stdlib_module_names


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    upward = {
        other
        for other in internal(module, MODULES[module])
        if layer(other) >= layer(module)
        # Imports within one package are not checked here. Each backend is a package of its own.
        and package(other) != package(module)
    }
    assert not upward, f"fused_attn.{module} imports upwards or sideways: {sorted(upward)}"


TOOLKIT = [module for module in MODULES if module.startswith("seq2seq.")]


def room(module: str) -> int:
    """The height of a module of the toolkit."""
    name = module.split(".")[1]
    assert name in (*GROUND, *ROOMS), f"fused_attn/{module} is in no room: add it to ROOMS"
    return 0 if name in GROUND else 1 + ROOMS.index(name)


@pytest.mark.parametrize("module", TOOLKIT)
def test_imports_of_the_toolkit_point_down(module: str) -> None:
    others = {other for other in internal(module, MODULES[module]) if other in TOOLKIT}
    upward = {other for other in others if room(other) > room(module)}
    assert not upward, f"fused_attn.{module} imports upwards: {sorted(upward)}"
    assert "seq2seq" not in internal(module, MODULES[module]), "the face is for users"


def test_no_module_imports_itself_through_others() -> None:
    """Imports for annotations alone count: they too say what a file knows of."""
    edges = {module: internal(module, path) & MODULES.keys() for module, path in MODULES.items()}
    while True:
        leaves = {module for module, others in edges.items() if not others - {module}}
        if not leaves:
            break
        edges = {m: others - leaves for m, others in edges.items() if m not in leaves}
    assert not edges, f"circles among {sorted(edges)}"


def _needs_no_torch(module: str) -> bool:
    name = module.removeprefix("seq2seq.")
    return any(name == known or name.startswith(f"{known}.") for known in WITHOUT_TORCH)


@pytest.mark.parametrize("module", list(filter(_needs_no_torch, TOOLKIT)))
def test_the_command_line_is_read_without_torch(module: str) -> None:
    code = f"import sys, fused_attn.{module}; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert "torch" not in loaded


@pytest.mark.parametrize("module", [m for m in MODULES if m.split(".")[0] not in NEEDS_EXTRAS])
def test_only_the_toolkit_needs_more_than_torch(module: str) -> None:
    allowed = {"torch", "triton"} if module.startswith("backends.triton") else {"torch"}
    assert external(module, MODULES[module]) <= allowed


def test_the_reference_imports_torch_only() -> None:
    path = MODULES["reference"]
    assert not internal("reference", path)
    assert external("reference", path) == {"torch"}


def test_only_native_backends_and_info_import_the_native_module() -> None:
    users = {module for module, path in MODULES.items() if "_C" in internal(module, path)}
    assert users <= IMPORTS_NATIVE


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=lambda path: path.name)
def test_kernels_import_triton_and_one_another(path: Path) -> None:
    name = f"kernels.{path.stem}"
    assert external(name, path) <= {"triton"}
    assert {module.split(".")[0] for module in internal(name, path)} <= {"kernels"}


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"ops"}))
def test_only_ops_names_torch_library(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    named = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    named |= set(imports(module, MODULES[module]))
    assert not {name for name in named if name.startswith("torch.library")}


@pytest.mark.parametrize("suffix", ["", ".__version__"])
def test_importing_the_package_loads_nothing_heavy(suffix: str) -> None:
    code = f"import sys, fused_attn; fused_attn{suffix}; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "triton", "matplotlib", "numpy", "fused_attn._C"} & set(loaded)
