"""Registries: members by name, built in or brought by another package through an entry point.

A package adds a member under one of the groups ``bdense.methods``, ``bdense.weights``,
``bdense.networks``, ``bdense.solvers``, ``bdense.stochastic_solvers`` and ``bdense.trackers``::

    [project.entry-points."bdense.methods"]
    mine = "mypackage.mine:Mine"
"""

import importlib
import importlib.metadata
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar, cast

from bdense.errors import InputError, did_you_mean

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Names to members, each imported when first asked for.

    Args:
        noun: What a member is called in messages.
        group: Of entry points that add members.
        builtin: Name to ``module:attribute``.
    """

    def __init__(self, noun: str, group: str, builtin: Mapping[str, str]) -> None:
        self._noun = noun
        self._group = group
        self._builtin = dict(builtin)

    def __getitem__(self, name: str) -> T:
        """The member of that name."""
        if name in self._builtin:
            module, _, attribute = self._builtin[name].partition(":")
            return cast(T, getattr(importlib.import_module(module), attribute))
        for point in self._added():
            if point.name == name:
                try:
                    return cast(T, point.load())
                except (ImportError, AttributeError) as error:
                    package = point.dist.name if point.dist else point.value
                    raise InputError(
                        f"the {self._noun} {name!r} of the package {package} cannot be loaded "
                        f"({error}); mend or remove that package"
                    ) from error
        hint = did_you_mean(name, self)
        raise InputError(f"no {self._noun} is called {name!r}; there are {', '.join(self)}{hint}")

    def __contains__(self, name: Any) -> bool:  # noqa: ANN401  as Mapping's
        return name in self._builtin or any(point.name == name for point in self._added())

    def __iter__(self) -> Iterator[str]:
        yield from self._builtin
        yield from (point.name for point in self._added() if point.name not in self._builtin)

    def __len__(self) -> int:
        return len(list(iter(self)))

    def _added(self) -> importlib.metadata.EntryPoints:
        return importlib.metadata.entry_points(group=self._group)
