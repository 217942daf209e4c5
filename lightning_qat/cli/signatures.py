"""Signatures read from source without running it, so that configuration knows every argument before torch is loaded."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NO_DEFAULT = object()


@dataclass(frozen=True)
class Argument:
    """An argument that a configuration can give.

    Attributes:
        name: Its name.
        types: Names of the types it takes, if all of them are plain (``int``, ``float``, ``bool``, ``str``).
        is_optional: Whether it takes None.
        default: Its default, or ``NO_DEFAULT``.
    """

    name: str
    types: frozenset[str]
    is_optional: bool
    default: Any


def read_arguments(target: str) -> list[Argument]:
    """Return the arguments of the class or function with the dotted path ``target``.

    Those with a default that is no literal are left out: the callable then takes its own.

    Raises:
        LookupError: If the source does not hold it.
    """
    module, _, name = target.rpartition(".")
    return list(_arguments_of(*_find(module, name)).values())


@dataclass(frozen=True)
class _Module:
    """A parsed file and what it imports."""

    name: str
    is_package: bool
    tree: ast.Module

    def origins(self) -> dict[str, tuple[str, str]]:
        """Return, for names that it imports, the module and the name there."""
        found = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom):
                parent = node.module or ""
                if node.level:
                    base = self.name.split(".")[: None if self.is_package and node.level == 1 else -node.level]
                    parent = ".".join([*base, *([node.module] if node.module else [])])
                found.update({each.asname or each.name: (parent, each.name) for each in node.names})
        return found


@functools.cache
def _parse(module: str) -> _Module:
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)  # of a name without dots it imports nothing
    if spec is None or not spec.submodule_search_locations:
        raise LookupError(f"There is no package {top!r}.")
    for location in spec.submodule_search_locations:
        path = Path(location, *rest)
        for candidate, is_package in ((path / "__init__.py", True), (path.with_suffix(".py"), False)):
            if candidate.is_file():
                return _Module(module, is_package, ast.parse(candidate.read_text(encoding="utf-8")))
    raise LookupError(f"There is no source of {module!r}.")


def _find(module: str, name: str) -> tuple[_Module, ast.ClassDef | ast.FunctionDef]:
    """Return the definition of ``name``, followed through imports."""
    parsed = _parse(module)
    for node in parsed.tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return parsed, node
    if name in (origins := parsed.origins()):
        return _find(*origins[name])
    raise LookupError(f"{module} does not define {name!r}.")


def _arguments_of(module: _Module, definition: ast.ClassDef | ast.FunctionDef) -> dict[str, Argument]:
    if isinstance(definition, ast.FunctionDef):
        return {each.name: each for each in _of_function(module, definition)}
    for node in definition.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            return {each.name: each for each in _of_function(module, node)}
    found: dict[str, Argument] = {}
    for base in definition.bases:
        # Bases of another package, or of the standard library, have no arguments here.
        with contextlib.suppress(LookupError):
            found.update(_arguments_of(*_find(module.name, ast.unparse(base))))
    if any("dataclass" in ast.unparse(each) for each in definition.decorator_list):
        found.update({each.name: each for each in _fields_of(module, definition)})
    return found


def _fields_of(module: _Module, definition: ast.ClassDef) -> Iterator[Argument]:
    for node in definition.body:
        if not isinstance(node, ast.AnnAssign) or "ClassVar" in ast.unparse(node.annotation):
            continue
        argument = _argument(module, ast.unparse(node.target), node.annotation, node.value)
        if argument is not None and not argument.name.startswith("_"):
            yield argument


def _of_function(module: _Module, function: ast.FunctionDef) -> Iterator[Argument]:
    positional = [each for each in [*function.args.posonlyargs, *function.args.args] if each.arg not in ("self", "cls")]
    missing = len(positional) - len(function.args.defaults)
    defaults = [None] * missing + function.args.defaults
    pairs = [
        *zip(positional, defaults, strict=True),
        *zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True),
    ]
    for each, default in pairs:
        if (argument := _argument(module, each.arg, each.annotation, default)) is not None:
            yield argument


def _argument(module: _Module, name: str, annotation: ast.expr | None, default: ast.expr | None) -> Argument | None:
    """Return an argument, or None if its default is not plain."""
    value = NO_DEFAULT
    if default is not None and (value := _literal(module, default)) is NO_DEFAULT:
        return None
    names = _type_names(annotation)
    types = names - {"None"}
    is_plain = bool(types) and types <= {"int", "float", "bool", "str"}
    return Argument(name, frozenset(types if is_plain else ()), "None" in names or value is None, value)


def _literal(module: _Module, node: ast.expr) -> Any:
    """Return the value of a literal or of a constant of the module that is one."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        pass
    for each in module.tree.body:
        if isinstance(each, ast.Assign) and [ast.unparse(target) for target in each.targets] == [ast.unparse(node)]:
            return _literal(module, each.value)
    return NO_DEFAULT


def _type_names(annotation: ast.expr | None) -> set[str]:
    """Return the names of the members of a union; what is no plain name is there as ``object``."""
    match annotation:
        case ast.Name(id=name):
            return {name}
        case ast.Constant(value=None):
            return {"None"}
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _type_names(left) | _type_names(right)
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            return {"None"} | _type_names(inner)
        case ast.Subscript(value=ast.Name(id="Union"), slice=ast.Tuple(elts=members)):
            return set().union(*map(_type_names, members))
    return {"object"}


def read_registry(module: str, name: str) -> dict[str, str]:
    """Return the dotted paths in the registry ``name`` of ``module``, a mapping from names to classes.

    Raises:
        LookupError: If the source does not hold it.
    """
    parsed = _parse(module)
    origins = parsed.origins()
    for node in parsed.tree.body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name and isinstance(node.value, ast.Dict):
            pairs = zip(node.value.keys, node.value.values, strict=True)
            return {ast.literal_eval(key): ".".join(origins[ast.unparse(value)]) for key, value in pairs if key}
    raise LookupError(f"{module} has no registry {name!r}.")
