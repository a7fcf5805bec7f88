"""The reader of EDM pickles: the right weights under the right names, and nothing run, ever."""

import collections
import copyreg
import io
import json
import math
import pickle
import pickletools
import random
import struct
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from bdense.errors import CheckpointError, UnsafePickleError
from bdense.models.edm import denoiser_from_edm
from bdense.models.pickles import ForeignNetwork, read_edm_pickle
from tests.fuzz import damaged_bytes, damaged_tree, read_or_refused
from tests.goldens import discover
from tests.small import same_weights, small_teacher


def described(file):
    """The entry of edm-nets.json that the file was made from: the longest name it starts with."""
    nets = json.loads((file.parent / "edm-nets.json").read_text())
    names = [name for name in nets if file.name.startswith(name)]
    if not names:
        pytest.skip(f"edm-nets.json does not describe {file.name}")
    return nets[max(names, key=len)]


@pytest.mark.golden
@pytest.mark.parametrize("file", discover("edm-*.pkl"))
def test_names_shapes_and_arguments_are_the_reference_s(file):
    expected = described(file)
    network = read_edm_pickle(file)
    shapes = {name: list(tensor.shape) for name, tensor in network.state_dict.items()}
    assert shapes == expected["state_dict"]
    assert list(shapes) == list(expected["state_dict"])
    assert network.init_kwargs == expected["init_kwargs"]
    attributes = {
        name: math.inf if value == "inf" else value
        for name, value in expected["attributes"].items()
    }
    assert network.attributes == attributes


@pytest.mark.golden
@pytest.mark.parametrize("file", discover("edm-*.pkl"))
def test_every_tensor_has_the_bytes_that_lie_in_the_file(file):
    """A tensor's bytes end its nested stream, after their count: found here without the reader."""
    streams = [
        argument
        for _, argument, _ in pickletools.genops(file.read_bytes())
        if isinstance(argument, bytes) and argument.startswith(b"\x80\x02\x8a\x0a")
    ]
    tensors = read_edm_pickle(file).state_dict
    assert len(streams) == len(tensors)
    for stream, (name, tensor) in zip(streams, tensors.items(), strict=True):
        count = struct.pack("<q", tensor.numel())
        assert stream.endswith(count + tensor.numpy().tobytes()), name


@pytest.mark.golden
@pytest.mark.parametrize("file", discover("evil*.pkl"))
def test_hostile_files_are_refused_and_run_nothing(file, tmp_path, monkeypatch):
    marks = [Path(tempfile.gettempdir()) / "pwned", tmp_path / "pwned"]
    assert not any(mark.exists() for mark in marks), "remove the file left by someone else"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="evil"):
        read_edm_pickle(file)
    assert not any(mark.exists() for mark in marks)


@pytest.mark.golden
@pytest.mark.parametrize("file", discover("sfd-ckpt-*.pkl"))
def test_an_sfd_checkpoint_is_its_network_and_its_options(file):
    """The tiny one is the EDM network of that name with the layers of the step condition."""
    teacher = read_edm_pickle(file.with_name("edm-song-tiny.nosrc.pkl"))
    student = read_edm_pickle(file)
    step = {name for name in student.state_dict if "_step" in name}
    assert student.state_dict.keys() - step == teacher.state_dict.keys()
    for name, value in teacher.state_dict.items():
        assert torch.equal(student.state_dict[name], value)
    assert len(step) == 34
    assert (student.class_name, student.modules["model"].class_name) == ("EDMPrecond", "SongUNet")
    assert student.modules["model.enc.8x8_block0"].attributes["num_heads"] == 1
    assert student.training_kwargs is not None
    known = {"num_steps": 4, "M": 3, "afs": True, "schedule_type": "polynomial"}
    known |= {"sampler_tea": "dpmpp", "sigma_min": 0.006, "guidance_type": None}
    assert student.training_kwargs.items() >= known.items()
    assert student.attributes["sigma_max"] == 80.0
    assert (student.init_kwargs, student.embedded_source_bytes) == ({}, 0)
    assert teacher.training_kwargs is None


@pytest.mark.golden
@pytest.mark.parametrize("file", discover("*-tiny*.pkl"))
@pytest.mark.parametrize("share", [0.0, 1e-5, 0.01, 0.5, 0.99, 1 - 1e-6])
def test_a_truncated_file_is_named(file, share, tmp_path):
    cut = tmp_path / "cut.pkl"
    data = file.read_bytes()
    cut.write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointError, match=r"cut\.pkl"):
        read_edm_pickle(cut)


# ---- pickles made here, by the machinery of the genuine ones ----


class Persistent:
    """What torch_utils.persistence makes of a module, with a state of our choice."""

    def __init__(self, class_name="Tiny", source="x = 1\n", **state):
        tables = {"_parameters": {}, "_buffers": {}, "_modules": {}, "_init_kwargs": {}}
        self.meta = {
            "type": "class",
            "version": 6,
            "module_src": source,
            "class_name": class_name,
            "state": tables | state,
        }

    def __reduce__(self):
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


class StoredTensor:
    """A tensor in the encoding of the EDM files, with any geometry over its storage."""

    def __init__(self, values, size=None, stride=None, offset=0):
        self.values = values
        self.geometry = (offset, size or tuple(values.shape), stride or values.stride())

    def __reduce__(self):
        storage = self.values.storage()
        hooks = collections.OrderedDict()
        return torch._utils._rebuild_tensor_v2, (storage, *self.geometry, False, hooks)


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Read an object, or bytes as they are, from a file as an EDM pickle."""

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("the genuine constructor was called")

    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    module = types.ModuleType("torch_utils.persistence")
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", module)

    def read_back(contents):
        path = tmp_path / "net.pkl"
        path.write_bytes(contents if isinstance(contents, bytes) else pickle.dumps(contents, 4))
        return read_edm_pickle(path)

    return read_back


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("table", [dict, collections.OrderedDict])
def test_a_small_network_is_rebuilt_with_its_names_and_values(read, table):
    weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    child = Persistent(
        "Linear",
        source="class Linear: ...\n",
        _parameters=table(weight=weight, bias=None),
        _buffers=table(kept=torch.tensor([7], dtype=torch.int64), scratch=torch.zeros(2)),
        _non_persistent_buffers_set={"scratch"},
    )
    network = Persistent(
        "EDMPrecond",
        source="class EDMPrecond: ...\n",
        _modules=table(model=child, hook=None, blocks=torch.nn.ModuleDict()),
        _init_kwargs={"channel_mult": [1, 2], "eps": np.float32(0.5), "note": None},
        sigma_max=float("inf"),
        sigma_min=np.float64(0.002),
        label_dim=10,
    )
    result = read({"ema": network, "loss_fn": Persistent("EDMLoss"), "dataset_kwargs": {}})
    assert isinstance(result, ForeignNetwork)
    assert result.class_name == "EDMPrecond"
    assert result.init_kwargs == {"channel_mult": [1, 2], "eps": 0.5, "note": None}
    assert list(result.state_dict) == ["model.weight", "model.kept"]
    assert torch.equal(result.state_dict["model.weight"], weight.detach())
    assert not result.state_dict["model.weight"].requires_grad
    assert torch.equal(result.state_dict["model.kept"], torch.tensor([7]))
    assert result.attributes == {"sigma_max": float("inf"), "sigma_min": 0.002, "label_dim": 10}
    assert result.embedded_source_bytes == len("class Linear: ...\nclass EDMPrecond: ...\nx = 1\n")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"_parameters": {"w": 3}}, "parameter's tensor is a int"),
        ({"_modules": {"child": [1]}}, "child is a list, not a module"),
        ({"_buffers": [1]}, "_buffers is missing or not a dictionary"),
        ({"_init_args": (1, 2)}, r"positional arguments.*\(1, 2\)"),
        ({}, "has no weights"),
    ],
)
def test_a_network_that_is_not_one_is_named(read, state, message):
    with pytest.raises(CheckpointError, match=message):
        read({"ema": Persistent(**state)})


def test_other_contents_are_named(read, tmp_path):
    with pytest.raises(CheckpointError, match=r"no 'ema' or 'model', only \['loss', 'nets'\]"):
        read({"nets": 1, "loss": 2})
    with pytest.raises(CheckpointError, match="'model' is a int, not a network"):
        read({"model": 1, "loss": 2})
    with pytest.raises(CheckpointError, match="holds a list, not a dictionary"):
        read([1])
    with pytest.raises(CheckpointError, match="'ema' is a int, not a network"):
        read({"ema": 1})
    with pytest.raises(CheckpointError, match="not a pickle"):
        read(b"PK\x03\x04 a zip")
    with pytest.raises(CheckpointError, match="not a complete EDM or SFD pickle"):
        read(b"\x80\x04\xff\xff")
    with pytest.raises(CheckpointError, match=r"absent\.pkl: No such file"):
        read_edm_pickle(tmp_path / "absent.pkl")
    with pytest.raises(CheckpointError, match="Is a directory"):
        read_edm_pickle(tmp_path)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize(
    ("geometry", "message"),
    [
        ({"size": (1 << 40,), "stride": (0,)}, "storage of 4 values"),
        ({"size": (4,), "offset": 1}, "out of bounds"),
        ({"size": (2,), "stride": (-1,)}, "Negative strides"),
    ],
)
def test_a_tensor_cannot_reach_beyond_its_bytes(read, geometry, message):
    weight = StoredTensor(torch.zeros(4), **geometry)
    with pytest.raises(CheckpointError, match=message):
        read({"ema": Persistent(_parameters={"w": weight})})


def test_a_module_that_is_shared_or_inside_itself_is_refused(read):
    loop, child = Persistent(), Persistent()
    loop.meta["state"]["_modules"]["again"] = within = Persistent()
    within.meta["state"] = loop.meta["state"]
    for network in (loop, Persistent(_modules={"one": child, "two": child})):
        with pytest.raises(CheckpointError, match="is in the network more than once"):
            read({"ema": network})


# ---- tricks: the canary is what every one of them would call ----
CALLS = []


def canary(*args, **kwargs):
    CALLS.append((args, kwargs))
    return {}


class Reduced:
    def __reduce__(self):
        return canary, ("from __reduce__",)


class Canary:
    def __new__(cls, *args):
        canary(args)
        return object.__new__(cls)

    def __setstate__(self, state):
        canary(state)


PROTO = b"\x80\x04"
HERE = __name__.encode()
EMA = b"}\x8c\x03ema"  # the start of {"ema": ...}; ``END`` closes it
END = b"s."


def text(value):
    return b"\x8c" + bytes([len(value)]) + value


def stack_global(module, name):
    return text(module) + text(name) + b"\x93"


ORDERED_DICT = stack_global(b"collections", b"OrderedDict")
MODULE_DICT = stack_global(b"torch.nn.modules.container", b"ModuleDict")
SCALAR = stack_global(b"numpy._core.multiarray", b"scalar")
LOAD = stack_global(b"torch.storage", b"_load_from_bytes")
CANARY = stack_global(HERE, b"canary")
SLOT_STATE = b"N}" + text(b"__call__") + ORDERED_DICT + b"s\x86"  # (None, {"__call__": <builder>})

# A module of an SFD file with weight-less tables and the training options that follow.
EDM_PRECOND = stack_global(b"models.networks_edm", b"EDMPrecond")
EASY_DICT = stack_global(b"dnnlib.util", b"EasyDict")

TRICKS = {
    "reduce, STACK_GLOBAL": CANARY + b")R",
    "reduce, GLOBAL": b"c" + HERE + b"\ncanary\n)R",
    "INST": b"(i" + HERE + b"\ncanary\n",
    "OBJ": b"(" + CANARY + b"o",
    "NEWOBJ": stack_global(HERE, b"Canary") + b")\x81",
    "NEWOBJ_EX": stack_global(HERE, b"Canary") + b")}\x92",
    "BUILD on a foreign class": stack_global(HERE, b"Canary") + b")\x81}b",
    "a dotted name behind an allowed module": stack_global(b"collections", b"abc.sys.exit"),
    "a dotted name behind an allowed global": stack_global(
        b"collections", b"OrderedDict.fromkeys"
    ),
    "a dotted module": stack_global(b"torch.nn.modules", b"container.ModuleDict"),
    "a sibling of an allowed global": stack_global(b"torch._utils", b"_import_dotted_name"),
    "getattr": stack_global(b"builtins", b"getattr"),
    "the old name of builtins": b"c__builtin__\neval\n",
    "copyreg": stack_global(b"copyreg", b"_reconstructor"),
    "a persistent id, text": b"Pwhatever\n",
    "a persistent id, binary": text(b"whatever") + b"Q",
    "BUILD on an allowed function": ORDERED_DICT + b"}" + text(b"build") + b"Nsb",
    "BUILD with slots on an allowed function": ORDERED_DICT + SLOT_STATE + b"b",
    "a module that SFD's networks import": stack_global(b"models.networks_edm", b"np"),
    "a dotted name behind an SFD class": stack_global(b"models.networks_edm", b"Linear.forward"),
    "a class of SFD's that no network is": stack_global(b"models.networks_edm", b"AttentionOp"),
    "another of SFD's modules": stack_global(b"models.networks_ldm", b"EDMPrecond"),
    "a sibling of EasyDict": stack_global(b"dnnlib.util", b"call_func_by_name"),
    "the loss that SFD's options name": stack_global(b"training.loss", b"loss"),
    "BUILD on SFD's options": EASY_DICT + b")\x81}" + text(b"items") + b"Nsb",
    "numpy object scalar": stack_global(b"numpy", b"dtype") + text(b"O8") + b"\x85R",
}


@pytest.mark.parametrize("trick", TRICKS.values(), ids=TRICKS)
@pytest.mark.parametrize("place", ["ema", "beside it"])
def test_a_trick_is_refused_before_it_runs(read, trick, place):
    CALLS.clear()
    data = EMA + trick + END if place == "ema" else b"}" + text(b"loss_fn") + trick + END
    with pytest.raises(UnsafePickleError):
        read(PROTO + data)
    assert CALLS == []


DOUBLED = b")" + b"2\x86" * 40  # a tuple that holds one tuple twice, and so on: 2^40 values
DOUBLED_KEY = b"}" + DOUBLED + b"Ns"
BY_MEMO = b")" + b"".join(b"\x940h%ch%c\x86" % (level, level) for level in range(40))
BROKEN = {
    "BUILD on the container class itself": MODULE_DICT + b"}" + text(b"class_name") + b"Nsb",
    "BUILD with slots on the container class": MODULE_DICT + SLOT_STATE + b"b",
    "NEWOBJ of an allowed function": ORDERED_DICT + b")\x81",
    "container with arguments": MODULE_DICT + b"K\x01\x85\x81",
    "container with a state of numbers": MODULE_DICT + b")\x81K\x01b",
    "container with slots": MODULE_DICT + b")\x81" + SLOT_STATE + b"b",
    "BUILD on an SFD class itself": EDM_PRECOND + b"}" + text(b"stands_for") + b"Nsb",
    "BUILD with slots on an SFD class": EDM_PRECOND + SLOT_STATE + b"b",
    "an SFD module with arguments": EDM_PRECOND + b"K\x01\x85\x81",
    "an SFD module with slots": EDM_PRECOND + b")\x81" + SLOT_STATE + b"b",
    "an SFD module that is called": EDM_PRECOND + b"K\x01\x85R",
    "SFD's options made of arguments": EASY_DICT + b"]\x85\x81",
    "an item set on an SFD class": EASY_DICT + b"NNs",
    "tensor bytes that are text": LOAD + text(b"hello") + b"\x85R",
    "scalar without a type": SCALAR + b"NC\x01a\x86R",
    "an item set on an allowed function": ORDERED_DICT + b"NNs",
    "a list appended to an allowed function": ORDERED_DICT + b"(Ne",
    "a memo as large as memory": b"Nr" + struct.pack("<I", 0xFFFFFFF0),
    "a key too deep to hash": b"}N" + b"\x85" * 200_000 + b"Ns",
    "a key that doubles": DOUBLED_KEY,
    "a key that doubles by the memo": b"}" + BY_MEMO + b"Ns",
    "a key that doubles in a tensor's bytes": LOAD
    + b"C"
    + bytes([len(PROTO + DOUBLED_KEY) + 1])
    + PROTO
    + DOUBLED_KEY
    + b".\x85R",
    "a set's key that doubles": b"\x8f(" + DOUBLED + b"\x90",
    "a dtype that doubles": stack_global(b"numpy", b"dtype") + DOUBLED + b"\x85R",
    "a string as large as memory": b"\x8d" + struct.pack("<Q", 1 << 50) + b"abc",
    "bytes as large as memory": b"\x8e" + struct.pack("<Q", 1 << 62) + b"abc",
}


@pytest.mark.parametrize("trick", BROKEN.values(), ids=BROKEN)
def test_misuse_of_what_is_allowed_is_an_error_and_leaves_nothing(read, trick):
    with pytest.raises(CheckpointError):
        read(PROTO + EMA + trick + END)
    good = Persistent(_modules={"m": torch.nn.ModuleDict()}, _parameters={"w": torch.ones(2)})
    assert read({"ema": good}).state_dict["w"].tolist() == [1.0, 1.0]


def test_the_extension_registry_is_out_of_reach(read):
    """A cached extension is handed out by the pickle machine without a question to find_class."""
    CALLS.clear()
    code = 0xF7
    copyreg.add_extension(__name__, "canary", code)
    copyreg._extension_cache[code] = canary
    try:
        for opcode in (b"\x82\xf7", b"\x83\xf7\x00", b"\x84\xf7\x00\x00\x00"):
            with pytest.raises(UnsafePickleError, match="EXT"):
                read(PROTO + EMA + opcode + b")R" + END)
    finally:
        copyreg.remove_extension(__name__, "canary", code)
        copyreg._extension_cache.pop(code, None)
    assert CALLS == []


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        (Reduced(), UnsafePickleError),
        (Canary(), UnsafePickleError),
        (torch.nn.Linear(1, 1), UnsafePickleError),
        ({"weights": torch.zeros(1)}, CheckpointError),
    ],
)
def test_tensor_bytes_that_hold_anything_else_are_refused(read, contents, expected):
    CALLS.clear()
    stream = io.BytesIO()
    torch.save(contents, stream, _use_new_zipfile_serialization=False)
    data = stream.getvalue()
    load = LOAD + b"B" + struct.pack("<I", len(data)) + data + b"\x85R"
    with pytest.raises(expected, match="tensor's bytes hold"):
        read(PROTO + EMA + load + END)
    assert CALLS == []


def sfd_pickle(training=None, weight=None, **state):
    """Bytes of {"model": an EDMPrecond by reference} with plain values as its state."""
    tables = {"_parameters": {"w": weight}, "_buffers": {}, "_modules": {}}
    options = {} if training is None else {"training_kwargs": training}
    body = pickle.dumps(tables | options | state, 4)[2:-1]  # without protocol and STOP
    return PROTO + b"}" + text(b"model") + EDM_PRECOND + b")\x81" + body + b"bs."


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_a_network_by_reference_runs_nothing_of_its_class(read, monkeypatch):
    """Also where a module of that very name could be imported."""
    CALLS.clear()
    module = types.ModuleType("models.networks_edm")
    module.EDMPrecond = Canary
    monkeypatch.setitem(sys.modules, "models", types.ModuleType("models"))
    monkeypatch.setitem(sys.modules, "models.networks_edm", module)
    network = read(sfd_pickle({"num_steps": 4, "afs": True}, StoredTensor(torch.ones(2))))
    assert network.class_name == "EDMPrecond"
    assert network.training_kwargs == {"num_steps": 4, "afs": True}
    assert network.state_dict["w"].tolist() == [1.0, 1.0]
    assert CALLS == []


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize(
    ("training", "message"),
    [
        (None, "training_kwargs is missing or not a dictionary"),
        ([1], "training_kwargs is missing or not a dictionary"),
        ({"loss": {1, 2}}, "argument loss is a set, not a plain value"),
    ],
)
def test_options_that_are_none_are_named(read, training, message):
    with pytest.raises(CheckpointError, match=message):
        read(sfd_pickle(training, StoredTensor(torch.ones(2))))


def test_options_inside_themselves_are_refused(read):
    loop: dict = {}
    loop["again"] = loop
    with pytest.raises(CheckpointError):
        read(sfd_pickle(loop, torch.ones(1)))


def doubled() -> list:
    """A list of 2^40 values in some bytes."""
    found: list = [1]
    for _ in range(40):
        found = [found, found]
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"a": doubled()},
        {"a": ["x" * 10**6] * 100},
        {"a": [{"y" * 10**6: 1}] * 100},
        {"a": [10**100_000] * 100},
    ],
    ids=["lists", "texts", "names", "numbers"],
)
def test_values_given_many_times_are_refused(read, options):
    with pytest.raises(CheckpointError, match="more than 10000 options"):
        read({"ema": Persistent(_init_kwargs=options, _parameters={"w": torch.ones(1)})})


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_weights_that_share_a_storage_are_refused(read):
    shared = StoredTensor(torch.zeros(1000))
    with pytest.raises(CheckpointError, match="more weights than bytes"):
        read({"ema": Persistent(_parameters={f"w{i}": shared for i in range(1000)})})


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_a_pickle_damaged_at_random_is_read_or_refused(read):
    """Its options; its bytes; and its opcodes, taken from one place of it to another."""
    network, config = small_teacher(), dict(small_teacher().describe()["config"])
    classes = ["EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond"]

    def pickled(tree):
        weights = {name: StoredTensor(value) for name, value in network.state_dict().items()}
        about = tree.get("about", {})
        attributes = {str(name): about[name] for name in about} if isinstance(about, dict) else {}
        options = {"model_type": "SongUNet"} | dict(tree.get("options") or {})
        module = Persistent(
            tree.get("class"), _init_kwargs=options, _parameters=weights, **attributes
        )
        return pickle.dumps({"ema": module}, 4)

    about = {"sigma_data": 0.5, "M": 1000, "C_1": 0.001, "beta_d": 19.9, "sigma_min": 0.02}
    whole = {"class": classes[0], "options": config, "about": about}
    content = pickled(whole)
    assert same_weights(denoiser_from_edm(read(content)), network)
    places = [place for _, _, place in pickletools.genops(content)]
    for seed in range(25):
        draw = random.Random(seed)
        mixed, (to, start) = bytearray(content), draw.choices(places, k=2)
        mixed[to:to] = content[start : start + draw.choice([1, 2, 30])]
        tree = damaged_tree(whole | {"class": classes[seed % 4]}, seed)
        options = tree.get("options") or {}
        contents = [damaged_bytes(content, seed), bytes(mixed)]
        contents += [pickled(tree)] if isinstance(options, dict) else []
        for each in contents:
            with read_or_refused(seed):
                denoiser_from_edm(read(each))


def test_hostile_source_beside_good_weights_is_counted_and_left_alone(read, tmp_path):
    source = f"open({str(tmp_path / 'pwned')!r}, 'w')\n"
    network = Persistent(source=source, _parameters={"w": torch.ones(1)})
    assert read({"ema": network}).embedded_source_bytes == len(source)
    assert not (tmp_path / "pwned").exists()
