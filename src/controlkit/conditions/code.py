"""The code of a condition: its source file and modules beside it, as far as they determine what it computes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

_INSTALLED = ("site-packages", "dist-packages")
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def imported_beside(source: Path) -> list[Path]:
    """`source`, followed by the Python files of its folder that it imports, directly or through others.

    If the folder is a package, these are its modules. Modules beside `source` in the folder of installed packages are
    not its own.
    """
    source = source.resolve()
    found = [source]
    for path in found:
        for name in _imports(ast.parse(path.read_bytes())):
            parts = name.split(".")
            folder = source.parent.parent if parts[0] == source.parent.name else path.parent
            if folder == path.parent and folder.name in _INSTALLED:
                continue
            for count in range(1, len(parts) + 1):
                module = folder.joinpath(*parts[:count])
                files = (module.with_name(f"{module.name}.py"), module / "__init__.py")
                found += [file for file in files if file not in found and file.is_file()]
    return found


def essential_code(path: Path) -> str:
    """The code of a Python file without comments, docstrings and the decorators that register conditions."""
    tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        if isinstance(node, ast.FunctionDef):
            node.decorator_list = [each for each in node.decorator_list if not _registers(each)]
    return ast.unparse(tree)


def _imports(tree: ast.Module) -> Iterator[str]:
    """Dotted names that a module imports; relative ones without their dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (".".join(filter(None, (node.module, alias.name))) for alias in node.names)


def _registers(decorator: ast.expr) -> bool:
    function = decorator.func if isinstance(decorator, ast.Call) else decorator
    return (function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")) == "condition"
