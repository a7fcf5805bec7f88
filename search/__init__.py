"""The search service: branch weights by Optuna, Ray and PostgreSQL, on top of ``bdense``.

``open_study`` is its Python API, see ``search.api``.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from search.api import OpenStudy, open_study

__all__ = ["OpenStudy", "open_study"]


def __getattr__(name: str) -> Any:  # noqa: ANN401  loaded when it is asked for
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from search import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted(__all__)
