"""Who may import whom, read from the imports themselves, and how large a core file may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: Folder -> what of this package it may import beside itself. What is not named here (cli, bench, evaluation,
#: inspection, demo, files beside the folders) are tools, which may import everything, and which nobody here
#: may import.
MAY_IMPORT: dict[str, set[str]] = {
    "kernels": set(),
    "settings": {"kernels"},
    "policies": {"settings", "kernels"},
    "decisions": {"settings", "kernels"},
    "host": {"policies", "decisions", "settings", "kernels"},
    "observability": {"policies", "decisions", "settings", "kernels"},
    "scheduling": {"observability", "host", "policies", "decisions", "settings", "kernels"},
    "execution": {"plugin", "observability", "host", "policies", "decisions", "settings", "kernels"},
    "plugin": {"scheduling", "host"},  # what vLLM loads in each process: makes the block manager known
    "server": set(),  # filled below
}
MAY_IMPORT["server"] = {folder for folder in MAY_IMPORT if folder != "server"}
#: Folders that import neither vLLM nor torch; functions of the file below alone import vLLM.
PURE = ("settings", "decisions")
MAY_LOAD_VLLM = {"settings/engine_args.py"}
#: Whose types, and nothing else, are named by the messages that travel on vLLM's objects.
MAY_NAME_VLLM_TYPES = {"decisions/messages.py"}
MOST_LINES, MOST_CLASS_LINES = 300, 250


@dataclass(frozen=True)
class Import:
    """`module` as it is imported; `at_load`: outside every function; `of_types`: under `if TYPE_CHECKING`."""

    file: str
    module: str
    at_load: bool
    of_types: bool

    def __str__(self) -> str:
        return f"{self.file} imports {self.module}"


def _sources() -> Iterator[tuple[str, Path]]:
    """Path as installed below rkv_vllm, and where it lies."""
    yield from ((f"kernels/{path.name}", path) for path in sorted((ROOT / "kernels").glob("*.py")))
    yield from ((f"server/{path.name}", path) for path in sorted((ROOT / "server").glob("*.py")))
    package = ROOT / "rkv_vllm"
    yield from ((path.relative_to(package).as_posix(), path) for path in sorted(package.rglob("*.py")))


TREES = {name: ast.parse(path.read_text()) for name, path in _sources()}
LINES = {name: len(path.read_text().splitlines()) for name, path in _sources()}


def _imports(name: str, node: ast.AST, at_load: bool = True, of_types: bool = False) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(name, alias.name, at_load, of_types)
        elif isinstance(child, ast.ImportFrom):
            for alias in child.names:  # what is imported may be a module itself
                yield Import(name, f"{_origin(name, child)}.{alias.name}", at_load, of_types)
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            for branch, types in ((child.body, True), (child.orelse, of_types)):
                yield from _imports(name, ast.Module(branch, []), at_load, types)
        else:
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(name, child, at_load and not is_function, of_types)


def _origin(name: str, imported: ast.ImportFrom) -> str:
    """The dotted name that stands behind `from`, with the dots in front of it followed."""
    if not imported.level:
        return imported.module or ""
    above = ("rkv_vllm", *name.split("/"))[: -imported.level]
    return ".".join((*above, imported.module) if imported.module else above)


IMPORTS = [found for name, tree in TREES.items() for found in _imports(name, tree)]


def _folder(file: str) -> str:
    return file.partition("/")[0].removesuffix(".py")


def _target(module: str) -> str | None:
    """Folder of this package that is imported; "tools" where it may import everything itself."""
    package, _, rest = module.partition(".")
    if package != "rkv_vllm" or rest == "__version__":
        return None
    return rest.partition(".")[0] if rest.partition(".")[0] in MAY_IMPORT else "tools"


def _is_of(module: str, *packages: str) -> bool:
    return module.partition(".")[0] in packages


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_go_downwards(folder: str) -> None:
    """Proves that a folder imports itself and what lies below it, in functions and for types too."""
    allowed = {None, folder} | MAY_IMPORT[folder]
    ours = [found for found in IMPORTS if _folder(found.file) == folder]
    assert any(_folder(name) == folder for name in TREES)
    assert [str(found) for found in ours if _target(found.module) not in allowed] == []


@pytest.mark.parametrize("folder", PURE)
def test_pure_folders_need_neither_vllm_nor_torch(folder: str) -> None:
    """Proves that rules and settings stand without the engine: the exceptions are named above."""
    wrong = []
    for found in IMPORTS:
        if _folder(found.file) != folder or not _is_of(found.module, "vllm", "torch"):
            continue
        is_vllm = _is_of(found.module, "vllm")
        named = found.of_types and found.file in MAY_NAME_VLLM_TYPES
        loaded = (found.of_types or not found.at_load) and found.file in MAY_LOAD_VLLM
        if not (is_vllm and (named or loaded)):
            wrong.append(str(found))
    assert wrong == []


def test_host_alone_knows_versions_of_vllm() -> None:
    """Proves that no other folder compares with `SUPPORTED` or with the version of an installed vLLM."""
    wrong = []
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if _folder(name) != "host" and isinstance(node, ast.Compare):
                text = ast.unparse(node)
                if "SUPPORTED" in text or "vllm.__version__" in text or "version('vllm" in text:
                    wrong.append(f"{name}: {text}")
    assert wrong == []


def test_core_files_and_classes_are_short() -> None:
    """Proves that each file and class of the core can be read at one sitting."""
    long = [
        f"{name} has {lines} lines"
        for name, lines in LINES.items()
        if _folder(name) in MAY_IMPORT and lines > MOST_LINES
    ]
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and _folder(name) in MAY_IMPORT:
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MOST_CLASS_LINES:
                    long.append(f"{name}: class {node.name} has {lines} lines")
    assert long == []
