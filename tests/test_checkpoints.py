"""Checkpoints: what is written is read back, and other files are refused by name."""

import errno
import json
import os
import platform
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bdense import files
from bdense.diffusion.branches import widen_head
from bdense.diffusion.ddpm import DDPMSchedule, DiscreteSchedule
from bdense.diffusion.epd import EPD
from bdense.diffusion.preconditioning import DDPM
from bdense.diffusion.sampling import Sampler
from bdense.errors import CheckpointError, InputError
from bdense.files import atomic_write, file_lock, sha256_model
from bdense.models import store as checkpoints
from bdense.models.store import (
    denoiser_sha256,
    load_denoiser,
    load_tensors,
    save_denoiser,
    save_tensors,
)
from tests.disks import small_disk
from tests.fuzz import LEFT_BY_DOWNLOADS, damaged_tree, read_or_refused
from tests.small import same_weights, small_teacher


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "model.safetensors"


def test_tensors_and_metadata_come_back(path):
    tensors = {
        "half": torch.tensor([0.5, -1.0], dtype=torch.float16),
        "double": torch.tensor(1 / 3, dtype=torch.float64),
        "transposed": torch.arange(6).view(2, 3).T,
    }
    metadata = {"kind": "test", "nested": {"list": [1, 2.5, None], "text": "Größe"}}
    save_tensors(path, tensors, metadata)
    found, facts = load_tensors(path)
    assert facts == metadata
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("num_branches", [1, 4])
def test_a_denoiser_comes_back_with_its_metadata(path, num_branches):
    denoiser = widen_head(small_teacher(dropout=0.1, channels=3), num_branches).train()
    save_denoiser(path, denoiser, {"kind": "student", "weights": [0.5, 2.0]})
    loaded, metadata = load_denoiser(path)
    assert metadata == {"kind": "student", "weights": [0.5, 2.0]}
    assert loaded.describe() == denoiser.describe()
    assert same_weights(loaded, denoiser)
    assert not loaded.training


def test_the_hash_is_of_architecture_and_weights():
    one, same, other = small_teacher(), small_teacher(), small_teacher(seed=1)
    assert denoiser_sha256(one) == denoiser_sha256(same)
    assert denoiser_sha256(one) != denoiser_sha256(other)
    assert denoiser_sha256(one) != denoiser_sha256(small_teacher(dropout=0.1))
    assert denoiser_sha256(one) != denoiser_sha256(one.double())


def test_a_missing_file_is_named(tmp_path):
    for name in ("none.safetensors", "none.pkl"):
        with pytest.raises(CheckpointError, match=name):
            load_denoiser(tmp_path / name)
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        load_tensors(tmp_path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pkl"])
@pytest.mark.parametrize(("content", "said"), LEFT_BY_DOWNLOADS)
def test_what_a_download_leaves_is_named(tmp_path, suffix, content, said):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        load_denoiser(path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_named(path, share):
    save_denoiser(path, small_teacher(), {})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read.*cut short"):
        load_denoiser(path)


def test_a_disk_that_does_not_answer_is_not_a_broken_file(path, monkeypatch):
    save_denoiser(path, small_teacher(), {})

    def fail(*_, **__):
        raise OSError(f"Stale file handle (os error {errno.ESTALE})")  # safetensors' wording

    monkeypatch.setattr(checkpoints, "safe_open", fail)
    with pytest.raises(OSError, match="Stale file handle") as caught:
        load_tensors(path)
    assert (caught.value.errno, caught.value.filename) == (errno.ESTALE, str(path))


@pytest.mark.parametrize(
    ("header", "told"),
    [
        (None, r"header keys: \[\]"),
        ({"maker": "someone", "date": "today"}, r"header keys: \['date', 'make"),
        ({"bdense": '{"format": 2}'}, "has format 2"),
        ({"bdense": "{}"}, "has format None"),
        ({"bdense": "not JSON"}, "damaged"),
        ({"bdense": "[1]"}, "damaged"),
        ({"bdense": "[" * 10**5}, "nested too deeply"),
        # Far more than its model needs.
        ({"bdense": "[],".join(["["] + [""] * 2**21)}, "more than 4194304 letters"),
    ],
    ids=range(8),
)
def test_a_header_that_is_not_of_this_version_is_refused(path, header, told):
    path.parent.mkdir()
    save_file({"weight": torch.zeros(2)}, path, metadata=header)
    with pytest.raises(CheckpointError, match=told):
        load_denoiser(path)


def test_a_file_of_ours_without_a_denoiser_is_named(path):
    save_tensors(path, {"x": torch.zeros(1)}, {"kind": "sfd-training"})
    with pytest.raises(CheckpointError, match="holds sfd-training, not a denoiser"):
        load_denoiser(path)


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": "abc"},
        {"architecture": {"num_branches": "x"}},
        {"architecture": {"num_branches": -1}},
        {"architecture": {"config": {"channel_mult": [1.5, 2]}}},
        {"architecture": {"config": 3}},
        {"architecture": {"config": {"num_blocks": 10**9}}},
        {"architecture": {"config": {"model_channels": 4 * 10**8}}},
        {"sampler": {"num_intervals": 3}},
        {"sampler": 3},
        {"sampler": Sampler(num_intervals=3, afs=True).describe() | {"schedule": {"rho": "x"}}},
        {"sampler": Sampler(num_intervals=3, afs=True).describe() | {"solver": "best"}},
    ],
    ids=str,
)
def test_damaged_headers_are_named(path, change):
    teacher = small_teacher()
    whole = teacher.describe()
    damaged = change.get("architecture", {})
    if isinstance(damaged, dict):
        inner = damaged.get("config", {})
        config = whole["config"] | inner if isinstance(inner, dict) else inner
        damaged = whole | damaged | {"config": config}
    save_tensors(path, teacher.state_dict(), change | {"architecture": damaged})
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_denoiser(path)


def test_headers_damaged_at_random_are_read_or_refused(path):
    teacher = small_teacher()
    row = ((0.5, 0.5),) * 3
    epd = Sampler(num_intervals=3, afs=False, solver=EPD(r=row, w=row, o=row, s=row))
    ddpm = DDPMSchedule(num_train_timesteps=50)
    discrete = DiscreteSchedule(sigma_min=0.1, sigma_max=20, process=ddpm)
    samplers = (epd, Sampler(num_intervals=3, afs=True, schedule=discrete))
    path.parent.mkdir()
    for seed in range(80):
        header = {
            "format": 1,
            "architecture": {**teacher.describe(), **DDPM(num_train_timesteps=50).options()}
            | ({"precond": "ddpm"} if seed % 2 else {"sigma_data": 0.5}),
            "sampler": samplers[seed % 2].describe(),
            "nfe": [2],
        }
        text = json.dumps(damaged_tree(header, seed))
        save_file(teacher.state_dict(), path, metadata={"bdense": text})
        with read_or_refused(seed):
            load_denoiser(path)


def test_weights_of_another_architecture_are_named(path):
    teacher = small_teacher()
    state = teacher.state_dict()
    architecture = {"architecture": teacher.describe()}
    head = f"model.{teacher.model.head_name}"

    save_tensors(path, {k: v for k, v in state.items() if k != f"{head}.bias"}, architecture)
    with pytest.raises(CheckpointError, match=rf"missing \['{head}\.bias'\], not expected \[\]"):
        load_denoiser(path)

    save_tensors(path, state | {"extra": torch.zeros(1)}, architecture)
    with pytest.raises(CheckpointError, match=r"missing \[\], not expected \['extra'\]"):
        load_denoiser(path)

    wider = widen_head(teacher, 2).state_dict()
    save_tensors(path, wider, architecture)
    names = rf"of another shape \['{head}\.bias', '{head}\.weight'\]"
    with pytest.raises(CheckpointError, match=names):
        load_denoiser(path)


def test_a_file_appears_by_its_rename(path):
    with atomic_write(path) as scratch:
        scratch.write_text("whole")
        assert scratch.parent == path.parent
        assert not path.exists()
    assert path.read_text() == "whole"


def test_an_error_leaves_the_old_file_alone(path):
    save_tensors(path, {"x": torch.zeros(1)}, {"kind": "old"})

    def write_half() -> None:
        with atomic_write(path) as scratch:
            scratch.write_text("half a fi")
            raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="the disk is full"):
        write_half()
    assert load_tensors(path)[1] == {"kind": "old"}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("unet/config.json", True),
        ("tokenizer/merges.txt", True),
        ("prompts.txt", False),
        (".cache/huggingface/x.json", False),
    ],
)
def test_the_digest_of_a_folder_is_of_what_is_read(tmp_path, name, counts):
    (tmp_path / "model_index.json").write_text("{}")
    before = sha256_model(tmp_path)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("{}")
    assert (sha256_model(tmp_path) != before) == counts


def test_the_name_that_a_rename_gave_is_on_the_disk_too(path, monkeypatch):
    synced, sync = [], os.fsync

    def noted(descriptor: int) -> None:
        synced.append((Path(f"/proc/self/fd/{descriptor}").readlink(), path.exists()))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    with atomic_write(path) as scratch:
        scratch.write_text("whole")
    assert synced == [(scratch, False), (path.parent, True)]


def test_permissions_are_those_of_new_files_without_changing_the_umask(path, monkeypatch):
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", None)  # to ask for it so is to change it
            with atomic_write(path) as scratch:
                scratch.write_text("whole")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


HOLDER = """
import os, signal, sys
from pathlib import Path
from bdense.files import file_lock

with file_lock(Path(sys.argv[1])):
    os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_a_long_wait_for_a_lock_logs_its_holder(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(files, "LONG_WAIT_SECONDS", 0.2)
    lock = tmp_path / "lock"
    lock.write_text("an earlier holder, whose name was longer than that of the one to come")
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)])
    os.waitpid(holder.pid, os.WUNTRACED)
    threading.Timer(0.4, holder.send_signal, (signal.SIGCONT,)).start()
    with file_lock(lock):
        assert lock.read_text() == f"{platform.node()}:{os.getpid()}\n"
    assert holder.wait(30) == 0
    (message,) = caplog.messages
    assert f"the lock {lock}, held by {platform.node()}:{holder.pid};" in message


def test_a_lock_works_on_a_full_disk(tmp_path):
    with small_disk(tmp_path / "disk", 64) as disk:
        disk.fill()
        with file_lock(disk.place / "lock"):
            pass
        assert (disk.place / "lock").read_text() == ""


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(InputError, match="lock is a link"), file_lock(tmp_path / "lock"):
        pass
    assert (tmp_path / "precious").read_text() == "kept"


def test_a_lock_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "lock")
    refused = pytest.raises(InputError, match="lock is a device or a pipe")
    with refused, file_lock(tmp_path / "lock"):
        pass


@pytest.mark.parametrize("name", ["pipe.pkl", "pipe.safetensors"])
def test_a_model_that_is_a_pipe_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError):
        load_denoiser(tmp_path / name)


def test_a_lock_is_held_by_one_at_a_time(tmp_path):
    order = []

    def second() -> None:
        with file_lock(tmp_path / "lock"):
            order.append("second")

    other = threading.Thread(target=second)
    with file_lock(tmp_path / "lock"):
        other.start()
        other.join(timeout=0.1)
        order.append("first")
    other.join()
    assert order == ["first", "second"]
