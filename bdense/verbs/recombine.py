"""``bdense recombine``: a student of all branches of another, by coefficients c of sum 1."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from bdense.command import Force
from bdense.data.datasets import load_dataset
from bdense.diffusion.branches import recombine_branches
from bdense.diffusion.sampling import SETUP, samplers_from
from bdense.errors import InputError
from bdense.execution import Execution
from bdense.knobs import KnobError
from bdense.methods.distill import keep_student
from bdense.metrics.extractors import load_extractor
from bdense.metrics.recombination import search_coefficients
from bdense.metrics.records import FID
from bdense.metrics.references import dataset_reference
from bdense.models.latents import draws_latents
from bdense.models.store import load_stored
from bdense.verbs.common import Progress, chosen_hardware, require_model_out
from bdense.verbs.evaluation import FIDEvaluation
from bdense.verbs.options import IMAGES, Evaluation, Hardware, RecombineOptions

# The FID of the branches combined by c, on the latents of a seed.
Judge = Callable[[Sequence[float], int], FID]
# Metadata of the branched student that is not true of another.
_OF_THE_BRANCHED = ("identity", "fid", SETUP)


def recombine(
    own: RecombineOptions,
    replacing: Force,
    evaluation: Evaluation,
    execution: Execution,
    hardware: Hardware,
) -> None:
    """Run the verb."""
    device = chosen_hardware(execution, hardware)
    if evaluation.extractor is None and own.c is None:
        raise KnobError("extractor", "is missing: c is searched by FID; give it, or `c`")
    if evaluation.extractor is None and evaluation.images is not None:
        raise KnobError("images", "needs `extractor`, which measures the FID")
    student, metadata = load_stored(own.branched)
    if student.num_branches < 2:
        raise InputError(
            f"{own.branched} has one branch; give a student that bdense distill wrote with "
            "--keep-branches"
        )
    if evaluation.extractor is not None and draws_latents(student, metadata):
        raise KnobError("extractor", "measures images, and this student draws latents; give `c`")
    c: Sequence[float] | None = own.c
    if c is not None:
        recombine_branches(student, c)  # refuses coefficients that do not fit
    require_model_out(own.out, force=replacing.force, inputs=[own.branched])
    student.to(device).execute(execution)
    metadata = {key: value for key, value in metadata.items() if key not in _OF_THE_BRANCHED}
    if evaluation.extractor is not None:
        extractor = load_extractor(evaluation.extractor, cache=evaluation.cache, device=device)
        fids = FIDEvaluation(
            extractor=extractor,
            reference=dataset_reference(load_dataset(own.data), extractor, cache=evaluation.cache),
            image_shape=student.image_shape,
            images=evaluation.images or IMAGES,
        )
        sampler = samplers_from(metadata)[0]

        def fid(c: Sequence[float], seed: int) -> FID:
            return fids.fid(recombine_branches(student, c), sampler, seed=seed)

        c, metadata["fid"] = _measured(fid, own, student.num_branches)
        metadata[SETUP] = fids.setup(recombine_branches(student, c)).as_dict()
    assert c is not None
    metadata["coefficients"] = list(c)
    keep_student(own.out, recombine_branches(student, c), None, metadata)
    print(own.out)


def _measured(
    fid: Judge, own: RecombineOptions, num_branches: int
) -> tuple[Sequence[float], dict[str, Any]]:
    """The coefficients to write, given or searched, and their FID; both are printed.

    Searched coefficients that are not better than branch K on fresh latents are dropped.
    """
    c = own.c or _searched(fid, own, num_branches)
    only_last = [0.0] * (num_branches - 1) + [1.0]
    last, combined = fid(only_last, own.seed), fid(c, own.seed)
    difference = combined.value - last.value
    noise = combined.noise_of_difference(last)
    assert noise is not None
    records = {"last_branch": last.as_dict(), "combined": combined.as_dict()}
    print(json.dumps({"c": list(c), **records, "difference": difference, "noise": noise}))
    name = f"branch {num_branches} alone"
    comparison = f"FID {combined.value:.4g} - {last.value:.4g} = {difference:+.2g} +- {noise:.2g}"
    if difference < -2 * noise:
        print(f"better than {name} by more than two standard errors: {comparison}")
    elif own.c is None:
        print(f"no better than {name}, which is written, by two standard errors: {comparison}")
        return only_last, last.as_dict()
    else:
        print(f"no better than {name} by two standard errors: {comparison}")
    return c, combined.as_dict()


def _searched(fid: Judge, own: RecombineOptions, num_branches: int) -> list[float]:
    """The best coefficients on latents that the final FIDs do not use."""
    show, values = Progress(), []

    def measure(c: Sequence[float]) -> float:
        values.append(fid(c, own.seed + 1).value)
        show(len(values), own.evaluations, f"lowest FID {min(values):.4g}")
        return values[-1]

    return search_coefficients(measure, num_branches, own.evaluations)
