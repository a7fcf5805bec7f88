"""A search's one-shot training: one student, told its weights -> FIDs along a curve."""

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bdense.files import write_json
from bdense.methods.distill import TrainedStage
from bdense.methods.one_shot import Coordinates, OneShot
from bdense.metrics.records import FID
from search.study.progress_text import evaluating
from search.study.results import Curve, CurvePoint, TrialResult
from search.worker.result import provenance

if TYPE_CHECKING:
    from search.worker.evaluate import Row

CURVE_FILE = "curve.json"


def measure_curve(row: "Row", count: int) -> TrialResult:
    """Train the row's one student, and measure it at ``count`` points of the space."""
    assets, started = row.assets, time.perf_counter()
    method = assets.method
    assert isinstance(method, OneShot)
    *_, last = row.distilled(lambda _: None)
    trained = time.perf_counter()
    points = [tuple(point) for point in method.coordinates.spread(count).tolist()]
    fids = _measured(row, method, last, points)
    curve = _curve(method.coordinates, points, fids)
    seconds = {
        "student_seconds": trained - started,
        "evaluation_seconds": time.perf_counter() - trained,
    }
    return TrialResult(
        value=curve.ranked[0].fid,
        curve=curve,
        teacher_fid=assets.teacher_fid,
        arm=row.task.arm,
        timings={name: round(value, 3) for name, value in seconds.items()},
        **provenance(
            assets.fingerprint,
            {"training": row.task.seed, "evaluation": assets.evaluator.latents},
            assets.device_name,
        ),
    )


def _measured(
    row: "Row", method: OneShot, last: TrainedStage, points: Sequence[tuple[float, ...]]
) -> list[FID]:
    """The student's FID at each point, each stored in the row's folder at once."""
    assets, kept = row.assets, row.folder / CURVE_FILE
    images = assets.spec.evaluation.num_images
    fids = [FID.read(each) for each in json.loads(kept.read_text())] if kept.exists() else []
    row.log("evaluating", points=len(points), images=images)
    for point in points[len(fids) :]:
        before = len(fids) * images

        def on_image(done: int, before: int = before) -> None:
            row.tell(last.plan, evaluating(before + done, len(points) * images))

        measured = assets.evaluator.measure(
            method.student_at(last.student, point),
            last.sampler,
            training_seed=row.task.seed,
            on_image=on_image,
            check=row.attempt.check,
            images=images,
        )
        fids.append(measured.fid)
        write_json(kept, [each.as_dict() for each in fids])
    return fids


def _curve(
    coordinates: Coordinates, points: Sequence[tuple[float, ...]], fids: Sequence[FID]
) -> Curve:
    lowest = min(fids, key=lambda fid: fid.value)
    space = coordinates.space
    return Curve(
        axes=list(space.axes),
        points=[
            CurvePoint(
                params=space.at(point),
                coordinates=list(point),
                fid=fid.value,
                error=fid.noise_of_difference(lowest),
            )
            for point, fid in zip(points, fids, strict=True)
        ],
        conditions=lowest.conditions(),
    )
