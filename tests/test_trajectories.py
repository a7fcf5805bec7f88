"""Recorded trajectories: the same numbers as live ones, whole files, bounded size."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from bdense.diffusion.solvers import Euler
from bdense.errors import CheckpointError, InputError
from bdense.methods.method import Recordings
from bdense.methods.recordings import TrajectoryStore
from tests.small import small_teacher, small_trajectories


def test_float16_costs_half_and_is_another_run(tmp_path):
    live = small_trajectories(small_teacher(), count=2)
    single = TrajectoryStore(live, tmp_path)
    half = TrajectoryStore(live, tmp_path, "float16")
    assert (single.nbytes, half.nbytes) == (2 * 8 * 4 * 64 * 4, 2 * 8 * 4 * 64 * 2)
    assert single.folder != half.folder
    states, exact = half.record()[1].states, live[1].states
    assert 0 < (states - exact).abs().max() < 1e-3 * exact.abs().max()
    assert half.open().describe() != live.describe()


def test_a_store_is_recorded_once_and_by_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("bdense.methods.recordings.MIN_SHARDS", 3)
    live = small_trajectories(small_teacher(), count=5)
    store = TrajectoryStore(live, tmp_path)
    assert (store.shard_length, store.num_shards) == (2, 3)
    assert list(store.record_shards([1])) == [1]
    stamp = store.shard_path(1).stat().st_mtime_ns
    assert store.missing() == [0, 2]
    recorded = store.record()
    assert store.shard_path(1).stat().st_mtime_ns == stamp
    for i in range(5):
        assert torch.equal(recorded[i].states, live[i].states)
        assert torch.equal(recorded[i].start, live[i].start)
    with pytest.raises(IndexError):
        recorded[5]
    headers = 128 * store.num_shards
    data = sum(path.stat().st_size for path in store.folder.glob("*.npy"))
    assert data == store.nbytes + headers


def test_a_shard_is_written_while_the_next_is_computed(tmp_path, monkeypatch):
    """Otherwise the first would wait for the second in vain."""
    monkeypatch.setattr("bdense.methods.recordings.MIN_SHARDS", 3)
    store = TrajectoryStore(small_trajectories(small_teacher(), count=5), tmp_path)
    begun, written = [threading.Event() for _ in range(4)], []
    begun[3].set()
    computed, save = TrajectoryStore._computed, np.save

    def computing(self, shard):
        begun[shard].set()
        return computed(self, shard)

    def saving(file, rows):
        assert begun[len(written) + 1].wait(20)
        save(file, rows)
        written.append(len(rows))

    monkeypatch.setattr(TrajectoryStore, "_computed", computing)
    monkeypatch.setattr(np, "save", saving)
    assert list(store.record_shards(range(3))) == [0, 1, 2]
    assert written == [2 * 8, 2 * 8, 8]
    assert store.missing() == []


def test_rows_read_ahead_are_the_same_whatever_is_asked_for_next(tmp_path):
    """As on a GPU: in order, by parts, again, and from elsewhere."""
    live = small_trajectories(small_teacher(), count=5)
    plain = TrajectoryStore(live, tmp_path).record()
    ahead, cpu = replace(plain), torch.device("cpu")
    halves = slice(0, 2), slice(2, 4)
    for iteration in (0, 1, 2, 2, 4, 0, 3, 4):
        for images in (*halves, slice(None)):
            found = ahead._rows_ahead(iteration, images, cpu)
            assert torch.equal(found, plain.part(iteration, images).states)
            # What is asked for next is being read, and nothing beside it.
            expected = {iteration + 1} if iteration < 4 else set()
            assert {i for i, _ in ahead._next.values()} >= expected
            assert len(ahead._next) <= 3
    assert "_reader" not in plain.__dict__
    assert torch.equal(ahead.on(cpu)[1].states, plain[1].states)


def test_whatever_changes_the_numbers_changes_the_folder(tmp_path):
    teacher = small_teacher()
    base = small_trajectories(teacher)
    others = [
        small_trajectories(small_teacher(seed=1)),
        small_trajectories(teacher, batch=5),
        small_trajectories(teacher, count=5),
        small_trajectories(teacher, substeps=3),
        replace(base, solver=Euler()),
        replace(base, seed=8),
    ]
    folders = {TrajectoryStore(live, tmp_path).folder for live in [base, *others]}
    assert len(folders) == 7
    assert TrajectoryStore(small_trajectories(teacher), tmp_path).folder in folders


def test_a_broken_store_says_what_to_do(tmp_path):
    store = TrajectoryStore(small_trajectories(small_teacher()), tmp_path)
    with pytest.raises(CheckpointError, match="4 of 4 trajectory shards are missing"):
        store.open()
    store.record()
    whole = store.shard_path(0).read_bytes()
    store.shard_path(0).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="delete it to record it again"):
        store.open()
    with store.shard_path(0).open("wb") as file:
        np.save(file, np.zeros((1, 2), np.float32))
    with pytest.raises(CheckpointError, match=r"holds float32 \(1, 2\), expected float32 \(8, 4"):
        store.open()


def test_size_is_refused_before_it_is_spent(tmp_path):
    store = TrajectoryStore(small_trajectories(small_teacher()), tmp_path)
    with pytest.raises(InputError, match=r"raise trajectories\.max_gib"):
        store.require_room(max_bytes=1000)
    huge = TrajectoryStore(small_trajectories(small_teacher(), count=10**12), tmp_path)
    with pytest.raises(InputError, match=r"make room or set trajectories\.mode to live"):
        huge.require_room()
    assert not store.folder.exists()
    with pytest.raises(InputError, match="got str 'int8'"):
        Recordings(tmp_path, "int8")
