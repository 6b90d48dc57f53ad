"""The layout of the package: sizes of modules, functions and folders, late imports."""

import ast
import collections
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "ccu_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_MODULE_LINES, MAX_FUNCTION_LINES, MAX_MODULES = 350, 50, 12
# Heavy libraries that many commands do not need; absl is the logger of Orbax.
LATE = {"absl", "adjustText", "matplotlib", "orbax", "tensorflow", "torch"}
LATE |= {"tensorflow_datasets"}
# These set the environment before JAX is imported.
SETS_ENVIRONMENT = {"launch.py", "benchmarks/__main__.py"}


@pytest.mark.parametrize(
    "path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix()
)
def test_modules_and_functions_are_short_and_import_at_the_top(path):
    text = path.read_text("utf-8")
    assert len(text.splitlines()) <= MAX_MODULE_LINES
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef):
            continue
        num_lines = (node.end_lineno or 0) - node.lineno + 1
        assert num_lines <= MAX_FUNCTION_LINES, node.name
        late = {name.partition(".")[0] for x in ast.walk(node) for name in _imported(x)}
        if path.relative_to(PACKAGE).as_posix() not in SETS_ENVIRONMENT:
            assert late <= LATE, node.name


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def test_folders_hold_at_most_twelve_modules():
    folders = [path.parent for path in MODULES if path.name != "__init__.py"]
    assert max(collections.Counter(folders).values()) <= MAX_MODULES
