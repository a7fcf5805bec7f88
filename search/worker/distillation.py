"""Rows whose students are distilled from the study's teacher and judged by FID."""

import itertools
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch

from bdense.data.datasets import load_dataset
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.errors import InputError
from bdense.metrics.clip_score import FILES as CLIP_FILES
from bdense.metrics.extractors import load_extractor, missing_checkpoint
from bdense.models.diffusers_files import folder_of
from bdense.models.store import denoiser_sha256, load_model
from bdense.models.zoo import PROMPT_SETS, PUBLIC_MODELS, resolve_reference
from search.analysis.comparison import settings_text
from search.errors import SpecChangedError, UnpreparedError
from search.places import cache_folder
from search.spec.resolve import variant
from search.spec.study import StudySpec
from search.storage.ledger import Ledger
from search.study.arms import Task
from search.study.results import TrialResult
from search.study.study import GPU_BYTES, TEACHER, TRAJECTORIES, Study
from search.worker.assets import Assets, load, use_device
from search.worker.cost import cost_lines, require_gpu, require_room
from search.worker.evaluate import evaluate
from search.worker.trainer import Attempt, Preparation, Report, Step

RECORDING_SECONDS = 10.0


@dataclass(frozen=True, eq=False)
class Distillation:
    """See ``search.worker.trainer.Trainer``."""

    study: Study
    assets: Assets

    @classmethod
    def prepare(cls, study: Study, together: int, report: Report) -> Iterator[Preparation]:
        """Make teacher, features and references, and record trajectories for a while.

        The last message is of unfinished trajectories where some are left.
        """
        spec = study.spec
        device = use_device(spec)
        cost = require_room(spec, together)
        if cost.device == "cuda":
            study.main.change(GPU_BYTES, lambda _: cost.peak_bytes)
        assets = load(spec, device, report)
        yield from record(study, assets, deadline=time.monotonic() + RECORDING_SECONDS)

    @classmethod
    def open(cls, study: Study, spec: StudySpec) -> Self:
        device, needed = use_device(spec), study.main.attribute(GPU_BYTES)
        if needed is not None and spec.resources.gpus != 0:
            require_gpu(spec, needed)
        assets = load(spec, device)
        _require_same_teacher(study.main, assets.teacher)
        return cls(study, assets)

    @classmethod
    def cost_lines(cls, spec: StudySpec, workers: int | None) -> list[str]:
        if not any(spec.plan.variants):
            return cost_lines(spec, workers=workers)
        lines, one = [], replace(spec, plan=replace(spec.given, variants=({},)))
        for changes in spec.given.variants:
            own = [f"  {line}" for line in cost_lines(variant(one, changes), workers=workers)]
            # What all share, such as a download, is told once.
            new = (line for line in own if line not in lines)
            lines += [f"with {settings_text(changes)}:", *new]
        return lines

    @classmethod
    def fetch(cls, spec: StudySpec) -> Iterator[str]:
        if spec.uses_data:
            assert spec.data is not None  # a spec that uses data names it
            dataset = load_dataset(spec.data)
            yield f"data {spec.data}: {len(dataset.images)} images"
        if (teacher := spec.teacher.checkpoint) is not None:
            load_model(teacher)
            published = PUBLIC_MODELS.get(teacher)
            yield f"teacher {teacher}" + (f": {published.path}" if published is not None else "")
        if (reference := spec.evaluation.reference) is not None:
            yield f"reference {reference}: {resolve_reference(reference)}"
        for name in dict.fromkeys((spec.prompts, spec.evaluation.prompts)):
            if name is not None and name in PROMPT_SETS:
                yield f"prompts {name}: {PROMPT_SETS[name].fetch()}"
        if (scorer := spec.evaluation.clip_score) is not None:
            yield f"CLIP model {scorer}: {folder_of(scorer, CLIP_FILES)}"
        extractor = spec.evaluation.extractor
        if (missing := missing_checkpoint(extractor)) is not None:
            load_extractor(extractor, cache=cache_folder(), device=torch.device("cpu"))
            yield f"extractor {extractor}: {missing[1]}"

    @property
    def fingerprint(self) -> str:
        return self.assets.fingerprint

    def ready(self, task: Task) -> None:
        """Record missing trajectories, and store their folder for ``clean``.

        The launch recorded them already where machines share the cache.
        """
        try:
            store = self.assets.of(task).store(task.seed)
            if store is None:
                return
            if store.missing():
                store.record()
        except InputError as error:
            raise UnpreparedError(f"on {platform.node()}: {error}") from error
        folder = str(store.folder.resolve())
        main = self.study.main
        if folder not in (main.attribute(TRAJECTORIES) or []):
            main.change(TRAJECTORIES, lambda known: sorted({*(known or []), folder}))

    def run(self, attempt: Attempt) -> TrialResult:
        return evaluate(self.assets, attempt)


def record(
    study: Study, assets: Assets, part: int = 0, parts: int = 1, deadline: float = math.inf
) -> Iterator[Preparation]:
    """Record missing trajectory shards until ``deadline``, of ``time.monotonic``."""
    for task in study.tasks_left():
        store = assets.of(task).store(task.seed)
        if store is None:
            return
        store.require_room(round(assets.spec.trajectories.max_gib * 2**30))
        remark = f"seed {task.seed}, {store.nbytes / 2**20:.0f} MiB on disk"
        # By number, not by index: other tasks record while this one starts.
        missing = [shard for shard in store.missing() if shard % parts == part]
        if missing:
            done = store.num_shards - len(store.missing())
            yield Preparation(Step.TRAJECTORIES, done, store.num_shards, remark)
        in_time = itertools.takewhile(lambda _: time.monotonic() <= deadline, missing)
        for _ in store.record_shards(in_time):
            done = store.num_shards - len(store.missing())
            yield Preparation(Step.TRAJECTORIES, done, store.num_shards, remark)


def _require_same_teacher(of: Ledger, teacher: NetworkDenoiser) -> None:
    """Refuse another teacher, such as one of a cache that the machines do not share."""
    mine = denoiser_sha256(teacher)
    if of.attribute(TEACHER) is None:
        of.change(TEACHER, lambda stored: stored or mine)  # another may have been first
    stored = of.attribute(TEACHER)
    if stored != mine:
        raise SpecChangedError(
            f"the teacher on {platform.node()} has other weights (sha256 {mine[:12]}) than the "
            f"one that study {of.name} is measured with ({stored[:12]}), so its FIDs "
            "would not compare: give all machines one BDENSE_CACHE and the same checkpoint, or "
            "start a study of another name"
        )
