"""Progress bars: widgets in a notebook that has ipywidgets, else text on stderr."""

import os
import sys
import warnings
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm


def progress_bar(stream: TextIO | None = None, **settings: Any) -> "tqdm[Any]":  # noqa: ANN401
    """A bar of tqdm with these settings of its own; ``stream`` None is stderr."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that ipywidgets are missing: the bar is text then
        from tqdm.auto import tqdm
    return tqdm(file=stream or sys.stderr, **settings)


def is_live(stream: TextIO) -> bool:
    """Whether a bar can move there: on a terminal, or in a notebook's cell."""
    if stream.isatty():
        return os.get_terminal_size(stream.fileno()).columns > 0  # 0 of one without a window
    return type(stream).__module__.startswith("ipykernel.")
