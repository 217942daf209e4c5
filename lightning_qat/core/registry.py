"""Components by name: ``"mse"`` or ``{"name": "mse", "num_steps": 50}`` for ``MSEObserver(num_steps=50)``."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def build(spec: str | Mapping[str, Any] | T, registry: Mapping[str, type[T]], what: str) -> T:
    """Return the component that ``spec`` names, or ``spec`` itself if it is one.

    Args:
        spec: Name, mapping with a ``name`` and arguments, or component.
        registry: Classes by name.
        what: What is being built, for messages.

    Raises:
        ValueError: If the name is not in the registry; the message offers the nearest.
        TypeError: If ``spec`` is neither, or an argument does not exist.
    """
    if isinstance(spec, str):
        spec = {"name": spec}
    if isinstance(spec, Mapping):
        arguments = dict(spec)
        name = arguments.pop("name", None)
        if name not in registry:
            close = difflib.get_close_matches(str(name).lower(), registry, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"There is no {what} {name!r}.{hint} Known: {', '.join(sorted(registry))}.")
        try:
            return registry[name](**arguments)
        except TypeError as error:
            known = ", ".join(inspect.signature(registry[name]).parameters)
            raise TypeError(f"The {what} {name!r} takes the arguments {known}, got {arguments}: {error}") from error
    if isinstance(spec, type) or not callable(spec):
        raise TypeError(f"Expected one of {', '.join(sorted(registry))} or an object as {what}, got {spec!r}.")
    return spec


def describe(component: Any, registry: Mapping[str, type[Any]]) -> dict[str, Any]:
    """Return the mapping from which :func:`build` makes an equal component, as primitives.

    A component that is not in the registry is described by its class alone, and cannot be built from that.
    """
    names = {cls: name for name, cls in registry.items()}
    cls = type(component)
    if cls not in names:
        return {"name": f"{cls.__module__}.{cls.__qualname__}"}
    return {"name": names[cls], **dataclasses.asdict(component)}
