"""Read networks from pickles of EDM (NVlabs/edm) and SFD (diff-sampler) without running them.

An EDM pickle stores each module as the source text of its class and its ``__dict__``, and EDM's
own loader executes that text. An SFD pickle names classes for Python to import. Here the pickle
machine gets stand-ins that keep names, numbers and weights. It refuses every global except the
few that these networks need.
"""

import io
import itertools
import math
import pickle
import pickletools
import reprlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
from torch import Tensor

from bdense.errors import CheckpointError, UnsafePickleError
from bdense.files import require_no_page, require_no_pipe

# These opcodes reach objects without ``find_class``: the extension registry answers from a cache
# of live objects, and the loader decides what a persistent id means. No EDM file has them.
_REFUSED_OPCODES = frozenset({"EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID"})
_MEMO_OPCODES = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
# A tuple that holds another one twice, level after level, takes exponential time to hash or print,
# and 100 000 nested ones overflow the interpreter's stack. Real ones have below 20 values.
_MAX_TUPLE_SIZE = 100
# Pickles at the start of a tensor's bytes, in front of its values.
_PICKLES_OF_STORAGE = 5
# Lists that hold one another twice and are copied out grow exponentially.
_MAX_VALUES = 10_000
_MAX_NAME = 1000
_MAX_DIMENSIONS = 8
_NUMPY_SCALARS = frozenset(
    {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}
)
# Classes of SFD's networks; keys of the network for sampling in EDM's and SFD's files.
_SFD_CLASSES = (
    *("EDMPrecond", "SongUNet", "DhariwalUNet", "UNetBlock"),
    *("Conv2d", "Linear", "GroupNorm", "PositionalEmbedding"),
)
_NETWORK_KEYS = ("ema", "model")
# What the pickle machine, torch and the stand-ins raise on malformed bytes.
_MALFORMED = (
    *(pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, LookupError),
    *(ArithmeticError, RuntimeError, MemoryError, AssertionError),
)


@dataclass(frozen=True)
class ForeignNetwork:
    """A network read from a foreign checkpoint, as plain data.

    Attributes:
        class_name: Outer class, such as ``EDMPrecond`` or ``VPPrecond``.
        init_kwargs: Constructor arguments as plain values, without defaults. Empty for SFD's
            files, which do not have them.
        state_dict: Weights and persistent buffers on the CPU, under the names and in the order of
            ``torch.nn.Module.state_dict``.
        attributes: Plain scalars of the outer module (``sigma_min``, ``label_dim``, ...).
        embedded_source_bytes: Size of the program text in the file, which is never executed.
        modules: Class name and plain scalars of every module inside, by its dotted name.
        training_kwargs: Options that an SFD student was distilled with; None in EDM's files.
    """

    class_name: str
    init_kwargs: dict[str, Any]
    state_dict: dict[str, Tensor]
    attributes: dict[str, Any]
    embedded_source_bytes: int
    modules: dict[str, "ForeignModule"]
    training_kwargs: dict[str, Any] | None = None


@dataclass(frozen=True)
class ForeignModule:
    """One module inside a foreign network: its class and its plain scalars."""

    class_name: str
    attributes: dict[str, Any]


def read_edm_pickle(path: Path) -> ForeignNetwork:
    """Read the network for sampling of a pickle: EDM's ``ema`` or SFD's ``model``.

    Raises:
        UnsafePickleError: The file needs a global that is not allowed; names it.
        CheckpointError: The file is missing, cut short, not a pickle, or holds something else.
    """
    path = Path(path)
    require_no_pipe(path)
    try:
        with path.open("rb") as file:
            if file.read(1) != pickle.PROTO:
                raise CheckpointError(
                    "not a pickle of protocol 2 or later; give a .pkl file as published by "
                    "NVlabs/edm"
                )
            file.seek(0)
            # The whole pickle as data, before any of its opcodes runs.
            _Scan(_REFUSED_OPCODES).read(file)
            file.seek(0)
            reader = _Reader(file)
            network = _network(reader.load())
        texts = (text.encode("utf-8", "surrogatepass") for text in reader.sources)
        found = _describe(network, sum(map(len, texts)))
        # Tensors that share a storage are small in the file, and are copied one by one.
        if sum(value.nbytes for value in found.state_dict.values()) > 2 * path.stat().st_size:
            raise CheckpointError("holds more weights than bytes: its tensors share their storage")
        return found
    except CheckpointError as error:
        require_no_page(path)
        raise type(error)(f"{path}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error.strerror}") from error
    except _MALFORMED as error:
        raise CheckpointError(
            f"{path}: not a complete EDM or SFD pickle ({error}); download or copy the file again"
        ) from error


class _Scan:
    """Follows a pickle's opcodes without building anything, and refuses what does harm.

    Its stack and memo hold, for each value, how many a tuple holds when it is written out, and 1
    for anything else; None is a mark.

    Args:
        refused: Names of opcodes.
    """

    def __init__(self, refused: Collection[str] = ()) -> None:
        self._refused = refused
        self._stack: list[int | None] = []
        self._memo: dict[int, int | None] = {}

    def read(self, file: BinaryIO) -> None:
        """Read one pickle, up to its STOP."""
        for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if opcode.name in self._refused:
                raise UnsafePickleError(
                    f"uses opcode {opcode.name} ({argument!r}), which reaches outside the file "
                    "and which no EDM or SFD network needs; nothing in it was run"
                )
            # The machine allocates its memo up to the highest index; a real one counts up from 0.
            if opcode.name in _MEMO_OPCODES and isinstance(argument, int) and argument > count:
                raise CheckpointError(f"stores memo entry {argument} at opcode {count}")
            self._follow(opcode, argument)

    def _follow(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:  # noqa: ANN401
        name, stack = opcode.name, self._stack
        if name in _MEMO_OPCODES or name == "MEMOIZE":
            self._memo[len(self._memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name == "DUP":
            stack.append(stack[-1])
        else:
            parts = self._taken(opcode.stack_before)
            is_tuple = name.startswith("TUPLE") or name == "FROZENSET"
            size = 1 + sum(filter(None, parts)) if is_tuple else 1
            if size > _MAX_TUPLE_SIZE:
                raise CheckpointError(
                    f"holds a tuple of more than {_MAX_TUPLE_SIZE} values; no such network does"
                )
            marks = [kind is pickletools.markobject for kind in opcode.stack_after]
            stack.extend(None if is_mark else size for is_mark in marks)

    def _taken(self, kinds: Sequence[pickletools.StackObject]) -> list[int | None]:
        """Take what an opcode takes off the stack: all above the mark, if it has one."""
        parts = []
        if pickletools.markobject in kinds:
            while (part := self._stack.pop()) is not None:
                parts.append(part)
            kinds = kinds[: kinds.index(pickletools.markobject)]
        return [*parts, *(self._stack.pop() for _ in kinds)]


class _Inert:
    """Base of the stand-ins: refuses BUILD, the opcode that sets attributes."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        raise UnsafePickleError(f"sets attributes of a {_kind(self)}, which no such network does")


@dataclass(frozen=True, eq=False)
class _Builder(_Inert):
    """Stand-in for an allowed global that the file calls.

    A class, because a file could write to the attributes of a plain function.
    """

    build: Callable[..., object]

    def __call__(self, *args: object) -> object:
        return self.build(*args)


@dataclass(frozen=True, eq=False)
class _Storage(_Inert):
    values: Tensor  # 1-D, on the CPU


@dataclass(frozen=True, eq=False)
class _Weight(_Inert):
    tensor: Tensor


class _DType:
    """A numpy scalar's type: the call has its code, the state that follows its byte order."""

    __slots__ = ("code", "order")

    def __init__(self, code: object, *_: object) -> None:
        if code not in _NUMPY_SCALARS:
            raise UnsafePickleError(
                f"uses numpy.dtype {reprlib.repr(code)}; accepted are "
                f"{', '.join(sorted(_NUMPY_SCALARS))}"
            )
        self.code = str(code)
        self.order = "="

    def __setstate__(self, state: tuple[object, ...]) -> None:
        if state[1] not in ("<", ">", "|", "="):
            raise CheckpointError(f"numpy.dtype of byte order {reprlib.repr(state[1])}")
        self.order = str(state[1])


class _Module(_Inert):
    """Stand-in for a module: the name of its class and its ``__dict__``."""

    __slots__ = ("class_name", "state")

    class_name: str
    state: dict[str, Any]


class _NamedModule(_Module):
    """A module that the file creates by its class's name (NEWOBJ, then BUILD)."""

    __slots__ = ()
    stands_for: ClassVar[str]

    def __new__(cls) -> "_NamedModule":
        self = super().__new__(cls)
        self.class_name, self.state = cls.stands_for, {}
        return self

    def __setstate__(self, state: object) -> None:
        self.state = _table(state, f"the state of a {self.class_name}")


def _named_module(name: str) -> type[_NamedModule]:
    return type(f"_{name}", (_NamedModule,), {"__slots__": (), "stands_for": name})


class _EasyDict(_Inert, dict[object, object]):
    """SFD's dictionary of training options: NEWOBJ, then items."""

    __slots__ = ()

    def __new__(cls) -> "_EasyDict":
        return super().__new__(cls)


_NAMED_GLOBALS: dict[tuple[str, str], type] = {
    ("torch.nn.modules.container", "ModuleDict"): _named_module("ModuleDict"),
    ("dnnlib.util", "EasyDict"): _EasyDict,
    **{("models.networks_edm", name): _named_module(name) for name in _SFD_CLASSES},
}


class _Reader(pickle.Unpickler):
    """A pickle machine that can reach only the stand-ins below."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.sources: set[str] = set()
        self._storages: dict[object, _Storage] = {}
        self._globals: dict[tuple[str, str], object] = {
            ("torch_utils.persistence", "_reconstruct_persistent_obj"): _Builder(self._persistent),
            ("collections", "OrderedDict"): _Builder(lambda: {}),
            ("torch._utils", "_rebuild_parameter"): _Builder(_parameter),
            ("torch._utils", "_rebuild_tensor_v2"): _Builder(_tensor),
            ("torch.storage", "_load_from_bytes"): _Builder(self._storage),
            ("numpy.core.multiarray", "scalar"): _Builder(_scalar),
            ("numpy._core.multiarray", "scalar"): _Builder(_scalar),
            ("numpy", "dtype"): _Builder(_DType),
            **_NAMED_GLOBALS,
        }

    def find_class(self, module_name: str, global_name: str, /) -> object:
        """The stand-in for an allowed global; a dotted name is not followed."""
        found = self._globals.get((module_name, global_name))
        if found is not None:
            return found
        accepted = ", ".join(".".join(name) for name in self._globals)
        raise UnsafePickleError(
            f"asks for {module_name}.{global_name}, which no EDM or SFD network needs; nothing in "
            f"it was run. Allowed are {accepted}"
        )

    def _persistent(self, meta: object) -> _Module:
        """A module from its class name and state; its source text is only measured."""
        meta = _table(meta, "a persistent object")
        if meta.get("type") != "class":
            raise CheckpointError(
                f"holds a persistent object of type {reprlib.repr(meta.get('type'))}, not 'class'"
            )
        source = meta.get("module_src")
        if isinstance(source, str):
            self.sources.add(source)
        module = _Module()
        module.class_name = meta.get("class_name", "")
        if not isinstance(module.class_name, str):
            raise CheckpointError("holds a class whose name is not a string")
        module.state = _table(meta.get("state"), f"the state of {module.class_name}")
        return module

    def _storage(self, data: object) -> _Storage:
        """A tensor's values; bytes that the file names twice are read once."""
        if data not in self._storages:
            self._storages[data] = _storage(data)
        return self._storages[data]


def _kind(value: object) -> str:
    return type(value).__name__.lstrip("_")


def _table(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise CheckpointError(f"{what} is missing or not a dictionary of names")
    return value


def _storage(data: object) -> _Storage:
    """Tensor bytes, themselves a pickle, read by torch's restricted reader."""
    if not isinstance(data, bytes):
        raise CheckpointError(f"a tensor's bytes are a {_kind(data)}")
    if not data.startswith(pickle.PROTO):
        raise UnsafePickleError("a tensor's bytes are not pickles, as torch wrote them")
    stream, scan = io.BytesIO(data), _Scan()
    for _ in range(_PICKLES_OF_STORAGE):
        scan.read(stream)
    try:
        loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        lines = str(error).splitlines() or [""]
        reason = next((line for line in lines if "GLOBAL" in line), lines[0])
        raise UnsafePickleError(
            f"a tensor's bytes hold more than a tensor: {reason.strip()}"
        ) from error
    if not isinstance(loaded, torch.TypedStorage):
        raise CheckpointError(f"a tensor's bytes hold a {_kind(loaded)}")
    return _Storage(torch.empty(0, dtype=loaded.dtype).set_(loaded._untyped_storage))


def _tensor(
    storage: object, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object
) -> _Weight:
    if not isinstance(storage, _Storage):
        raise CheckpointError(f"a tensor's storage is a {_kind(storage)}")
    if not isinstance(size, tuple) or len(size) > _MAX_DIMENSIONS:
        raise CheckpointError(f"a tensor's shape is {reprlib.repr(size)}")
    # A view that repeats elements is small in the file but has any size once it is copied.
    if math.prod(size) > storage.values.numel():
        raise CheckpointError(
            f"a tensor of shape {size} has a storage of {storage.values.numel()} values"
        )
    return _Weight(storage.values.as_strided(size, stride, offset))


def _parameter(weight: object, *_: object) -> _Weight:
    if not isinstance(weight, _Weight):
        raise CheckpointError(f"a parameter's tensor is a {_kind(weight)}")
    return weight


def _scalar(dtype: object, data: object) -> bool | int | float:
    if not isinstance(dtype, _DType) or not isinstance(data, bytes) or len(data) > 8:
        raise CheckpointError("a numpy scalar without its type and bytes")
    (value,) = np.frombuffer(data, dtype=np.dtype(dtype.order + dtype.code)).tolist()
    return value  # type: ignore[no-any-return]  # numpy types tolist as Any; the codes above are plain numbers


def _network(contents: object) -> _Module:
    wanted = " or ".join(map(repr, _NETWORK_KEYS))
    if not isinstance(contents, dict):
        raise CheckpointError(f"holds a {_kind(contents)}, not a dictionary with {wanted}")
    found = next((name for name in _NETWORK_KEYS if name in contents), None)
    if found is None:
        raise CheckpointError(f"has no {wanted}, only {reprlib.repr(sorted(map(str, contents)))}")
    network = contents[found]
    if not isinstance(network, _Module):
        raise CheckpointError(f"{found!r} is a {_kind(network)}, not a network")
    return network


def _describe(network: _Module, source_bytes: int) -> ForeignNetwork:
    if network.state.get("_init_args"):
        raise CheckpointError(
            f"{network.class_name} was built with positional arguments, whose names are unknown: "
            f"{reprlib.repr(network.state['_init_args'])}"
        )
    state_dict: dict[str, Tensor] = {}
    modules: dict[str, ForeignModule] = {}
    _collect(network, "", state_dict, modules, set())
    if not state_dict:
        raise CheckpointError(f"{network.class_name} has no weights")
    named = isinstance(network, _NamedModule)
    kwargs = {} if named else network.state.get("_init_kwargs")
    training = network.state.get("training_kwargs") if named else None
    return ForeignNetwork(
        class_name=network.class_name,
        init_kwargs=_plain_table(kwargs, f"{network.class_name}._init_kwargs"),
        state_dict=state_dict,
        attributes=_scalars(network),
        embedded_source_bytes=source_bytes,
        modules=modules,
        training_kwargs=_plain_table(training, "training_kwargs") if named else None,
    )


def _scalars(module: _Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in module.state.items()
        if not name.startswith("_") and isinstance(value, bool | int | float | str)
    }


def _collect(
    module: _Module,
    prefix: str,
    into: dict[str, Tensor],
    modules: dict[str, ForeignModule],
    seen: set[int],
) -> None:
    """Collect weights, in the order of ``torch.nn.Module.state_dict``, and submodules."""
    where = f"{prefix or 'the network '}({module.class_name})"
    if len(prefix) > _MAX_NAME:
        raise CheckpointError(f"holds modules whose names have more than {_MAX_NAME} letters")
    # A module inside itself would never end, and one shared at every level doubles the work.
    if id(module) in seen:
        raise CheckpointError(f"{where} is in the network more than once")
    seen.add(id(module))
    transient = module.state.get("_non_persistent_buffers_set", ())
    for kind in ("_parameters", "_buffers"):
        for name, weight in _table(module.state.get(kind), f"{where}.{kind}").items():
            if weight is None or (kind == "_buffers" and name in transient):
                continue
            into[prefix + name] = _parameter(weight).tensor
    for name, child in _table(module.state.get("_modules"), f"{where}._modules").items():
        if isinstance(child, _Module):
            modules[prefix + name] = ForeignModule(child.class_name, _scalars(child))
            _collect(child, f"{prefix}{name}.", into, modules, seen)
        elif child is not None:
            raise CheckpointError(f"{where}.{name} is a {_kind(child)}, not a module")


def _plain_table(value: object, what: str) -> dict[str, Any]:
    room = iter(range(_MAX_VALUES))
    return {name: _plain(item, name, room) for name, item in _table(value, what).items()}


def _plain(value: object, name: str, room: Iterator[int]) -> object:
    """``value`` if it consists of numbers, strings, lists and dictionaries, as many as fit."""
    letters = len(name) + (len(value) if isinstance(value, str) else 0)
    # A long text or number takes the room of several: the file may name it many times.
    bits = value.bit_length() if isinstance(value, int) else 0
    if next(itertools.islice(room, letters // 100 + bits // 1000, None), None) is None:
        raise CheckpointError(f"holds more than {_MAX_VALUES} options; no such network does")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, name, room) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item, key, room) for key, item in _table(value, name).items()}
    raise CheckpointError(f"the network's argument {name} is a {_kind(value)}, not a plain value")
