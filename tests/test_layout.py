"""The layout of the package: sizes of modules, functions and folders, late imports."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "ccu_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_MODULE_LINES, MAX_FUNCTION_LINES, MAX_MODULES = 350, 50, 12
# Heavy libraries that many commands do not need.
LATE = {
    "matplotlib",
    "adjustText",
    "orbax",
    "tensorflow",
    "tensorflow_datasets",
    "torch",
}
LATE |= {"absl"}  # the logger of Orbax
# These set the environment before JAX is imported.
SETS_ENVIRONMENT = {"launch.py", "benchmarks/__main__.py"}


def _name(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_modules_and_functions_are_short(path):
    text = path.read_text("utf-8")
    assert len(text.splitlines()) <= MAX_MODULE_LINES
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef)
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert not long


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_only_heavy_libraries_are_imported_inside_functions(path):
    if _name(path) in SETS_ENVIRONMENT:
        return
    functions = [
        node
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef)
    ]
    late = {
        name.partition(".")[0]
        for function in functions
        for node in ast.walk(function)
        for name in _imported(node)
    }
    assert late <= LATE


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def test_folders_hold_at_most_twelve_modules():
    folders = {path.parent for path in MODULES}
    sizes = {
        folder: sum(path.name != "__init__.py" for path in folder.glob("*.py"))
        for folder in folders
    }
    assert max(sizes.values()) <= MAX_MODULES
