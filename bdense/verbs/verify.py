"""``bdense verify``: a student's recorded FID, measured again."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bdense.arguments import require_types
from bdense.data.datasets import load_dataset
from bdense.data.names import split_format
from bdense.diffusion import BATCH
from bdense.diffusion.sampling import SETUP, Sampler, samplers_from
from bdense.errors import BdenseError, InputError
from bdense.knobs import KnobError
from bdense.metrics.extractors import Extractor, load_extractor
from bdense.metrics.records import FID, PromptFile
from bdense.metrics.references import Reference, dataset_reference, read_reference
from bdense.metrics.setup import Setup
from bdense.models.diffusers_files import EXTRACTOR, folder_of
from bdense.models.latents import drawn_shape
from bdense.models.store import load_model
from bdense.models.zoo import REFERENCES, resolve_reference
from bdense.verbs.common import Progress, chosen_device
from bdense.verbs.evaluation import FIDEvaluation
from bdense.verbs.options import RecordedHardware, VerifyOptions
from bdense.verbs.sample import chosen_prompts, codec_of, conditions_of

# What rounding may move a FID by, relative to it. A digits student (2 NFE, 4096 images): other
# thread counts 6e-10, other instruction sets of the CPU up to 3e-6, weights off by 0.1 % 1e-3;
# bfloat16 in place of float32 4e-3, which two machines' bfloat16 may be apart too.
TOLERANCE, LOW_PRECISION_TOLERANCE = 1e-4, 1e-2


def verify(own: VerifyOptions, hardware: RecordedHardware) -> None:
    """Run the verb.

    Raises:
        BdenseError: The FID is another one.
    """
    device = chosen_device(hardware)
    model, metadata = load_model(own.model)
    recorded, setup = _recorded(own.model, metadata)
    pipeline = own.pipeline or own.model
    texts = chosen_prompts(own.prompts)
    _require_prompts(recorded, own.prompts, texts)
    conditions = conditions_of(model, pipeline, texts, cache=own.cache)
    codec = codec_of(model, metadata, pipeline, device)
    sampler = _sampler(own.model, metadata, recorded)
    if hardware.threads is None and setup.threads is not None:
        torch.set_num_threads(setup.threads)
    model.to(device).execute(setup.execution)
    extractor = _extractor(own, recorded, device)
    reference = _reference(own, recorded, extractor)
    _require_recorded(recorded, setup, extractor, reference)
    evaluation = FIDEvaluation(
        extractor=extractor,
        reference=reference,
        image_shape=drawn_shape(model, metadata),
        images=recorded.images,
        batch=setup.batch or BATCH,
        conditions=conditions,
        codec=codec,
    )
    show = Progress().counting(recorded.images, "images drawn")
    seed = recorded.seeds["evaluation"]
    fid = evaluation.fid(model, sampler, seed=seed, on_image=show)
    _tell(own, recorded.value, fid.value, setup, evaluation.setup(model))


def _tell(own: VerifyOptions, recorded: float, fid: float, setup: Setup, here: Setup) -> None:
    """Print the verdict."""
    exact = setup.execution.precision == "float32"
    tolerance = recorded * (TOLERANCE if exact else LOW_PRECISION_TOLERANCE)
    apart = abs(fid - recorded)
    verdict = "equal" if not apart else "within rounding" if apart <= tolerance else "different"
    was, now = setup.as_dict(), here.as_dict()
    changed = {name: (was[name], now[name]) for name in setup.differing(here)}
    if own.json:
        found = {"verdict": verdict, "recorded": recorded, "fid": fid, "tolerance": tolerance}
        print(json.dumps(found | {"recorded_setup": was, "setup": now, "differing": [*changed]}))
    else:
        print(f"{own.model}: recorded FID {recorded:.8g}, measured again {fid:.8g}: {verdict}")
        for name, (before, after) in changed.items():
            print(f"{name}: recorded {before}, here {after}")
    if verdict == "different":
        why = f"; it also differs in {', '.join(changed)}" if changed else ""
        raise BdenseError(
            f"{own.model} records FID {recorded:.8g} and gives {fid:.8g}, {apart:.2g} apart, and "
            f"rounding explains {tolerance:.1g}{why}"
        )


def _recorded(source: str, metadata: Mapping[str, Any]) -> tuple[FID, Setup]:
    """What a model's metadata say of its FID."""
    try:
        fid = FID.read(metadata["fid"])
        require_types(fid)
        _require_repeatable(fid)
        setup = Setup.read(metadata.get(SETUP, {}))
    except (KeyError, TypeError, AttributeError, InputError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise InputError(
            f"{source} records no FID that can be measured again ({reason}); `bdense "
            "distill --extractor` and bdense-search record one"
        ) from error
    return fid, setup


def _require_repeatable(fid: FID) -> None:
    """Refuse what types alone let through."""
    if not math.isfinite(fid.value):
        raise InputError(f"its value is {fid.value}")
    seed: object = fid.seeds["evaluation"]
    if type(seed) is not int or seed < 0:
        raise InputError(f"its seed is {seed!r}, not a whole number of at least 0")


def _sampler(source: str, metadata: Mapping[str, Any], recorded: FID) -> Sampler:
    """The model's own sampler of the recorded NFE, at the recorded guidance."""
    samplers = samplers_from(metadata)
    for sampler in samplers:
        if sampler.nfe == recorded.nfe:
            return sampler
    served = ", ".join(str(sampler.nfe) for sampler in samplers)
    raise InputError(
        f"{source} records a FID at NFE {recorded.nfe}, but has samplers for {served or 'none'}; "
        "its metadata were changed"
    )


def _extractor(own: VerifyOptions, recorded: FID, device: torch.device) -> Extractor:
    """The recorded extractor: the one asked for, the folder's own, or by its name."""
    place = Path(own.model) if Path(own.model).exists() else folder_of(own.model)
    kept = (place if place.is_dir() else place.parent) / EXTRACTOR
    spec = own.extractor or recorded.extractor + (f":{kept}" if kept.is_file() else "")
    if own.extractor is None and spec.startswith("torchscript:"):
        raise KnobError(
            "extractor", f"is missing: the FID is in features of {spec}; give it with its path"
        )
    return load_extractor(spec, cache=own.cache, device=device)


def _reference(own: VerifyOptions, recorded: FID, extractor: Extractor) -> Reference:
    """What the FID was measured against: the one asked for, or by its recorded name."""
    if own.data is not None and own.reference is not None:
        raise KnobError("reference", f"{own.reference} takes the place of `data`; drop one")
    file, data = own.reference, own.data
    if file is None and data is None:
        published = {each.path.name: each.name for each in REFERENCES.values()}
        name, _, digest = recorded.reference.rpartition(":")
        file = published.get(name)
        if file is None and digest != recorded.reference:
            name = "data" if split_format(recorded.reference) else "reference"
            raise KnobError(
                name, f"is missing: the FID is against {recorded.reference}; give its path"
            )
        data = recorded.reference
    if file is not None:
        return read_reference(resolve_reference(file), extractor)
    assert data is not None
    return dataset_reference(load_dataset(data), extractor, cache=own.cache)


def _require_prompts(recorded: FID, file: str | None, texts: Sequence[str]) -> None:
    """Refuse other prompts than the recorded ones, where the FID says them."""
    if (was := recorded.prompts) is None:
        return
    if file is None:
        raise KnobError("prompts", f"are needed: the FID was measured under {was.text()}")
    now = PromptFile.of(file, texts)
    if now.sha256 != was.sha256:
        raise KnobError(
            "prompts",
            f"{file} is different: the FID was measured under {was.text()}, and these are "
            f"{now.text()}; give the recorded ones",
        )


def _require_recorded(
    recorded: FID, setup: Setup, extractor: Extractor, reference: Reference
) -> None:
    """Refuse another extractor or reference than the recorded ones, before images are drawn."""
    was, now = setup.data_sha256, reference.data_sha256
    if recorded.extractor_sha256 != extractor.sha256:
        raise InputError(
            f"the FID was measured with weights {recorded.extractor_sha256[:16]} of "
            f"{recorded.extractor}, and those here are {extractor.sha256[:16]}; give the recorded "
            f"ones, --extractor {extractor.name.partition(':')[0]}:FILE"
        )
    if recorded.reference != reference.name:
        raise InputError(
            f"the FID was measured against {recorded.reference}, not {reference.name}; give that"
        )
    if was is not None and now is not None and was != now:
        raise InputError(
            f"the images of {reference.name} are others here ({now[:16]}) than those that the FID "
            f"was measured against ({was[:16]})"
        )
