"""Files damaged at random, from fixed seeds: each is read, or refused in words."""

import contextlib
import copy
import random
import resource
import signal
from collections.abc import Iterator
from typing import Any

from bdense.errors import InputError

_SECONDS, _KIB = 20, 500 * 1024
_NASTY = (
    *(None, True, 0, -1, 3, 10**9, 2**63, 10**30, 1e-300, 1e300, float("nan"), float("inf")),
    *("", "x", "x" * 5000, "1e9", [], {}, [[]], [10**9] * 3, list(range(3000)), {"kind": "x"}),
)


def damaged_tree(tree: Any, seed: int) -> Any:
    """A copy of a tree of plain values with one to three of them replaced, removed or doubled."""
    draw = random.Random(seed)
    tree = copy.deepcopy(tree)
    for _ in range(draw.randint(1, 3)):
        places = list(_places(tree))
        if not places:
            break
        parent, key = draw.choice(places)
        match draw.randrange(6):
            case 0:
                del parent[key]
            case 1:
                for _ in range(draw.choice([3, 60])):
                    parent[key] = [parent[key]]
            case 2 if isinstance(parent, dict):
                parent[draw.choice(["x", "kind", "sigma_max", "M"])] = parent[key]
            case 3 if type(parent[key]) in (int, float):
                parent[key] *= draw.choice([-1, 0, 0.5, 2, 1e6, 10**12])
            case _:
                parent[key] = copy.deepcopy(draw.choice(_NASTY))
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    for key in keys:
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from _places(tree[key])


def damaged_bytes(content: bytes, seed: int) -> bytes:
    """A copy with bytes or 4-byte numbers replaced, a part cut out or doubled, or its end lost."""
    draw = random.Random(seed)
    found = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(found) or 1)
        length = draw.choice([1, 4, 50])
        match draw.randrange(5):
            case 0:
                found[at : at + 1] = draw.randbytes(1)
            case 1:
                found[at : at + 4] = draw.choice([b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\xff" * 4])
            case 2:
                del found[at : at + length]
            case 3:
                found[at:at] = found[at : at + length]
            case 4 if draw.random() < 0.3:
                del found[max(at, 1) :]
    return bytes(found)


@contextlib.contextmanager
def read_or_refused(of: object) -> Iterator[None]:
    """Pass if what is inside ends well or in an InputError, in bounded time and memory."""

    def too_long(*_: object) -> None:
        raise TimeoutError(f"{of}: it hangs")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    handler = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(_SECONDS)
    try:
        yield
    except InputError:
        pass
    except Exception as error:
        raise AssertionError(f"{of}: {error!r}") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < _KIB, of


# What stands where a file should be, and what is said of it.
LEFT_BY_DOWNLOADS = [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
    (b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", "a page of HTML"),
]
