"""Download everything that a study file needs, so that its workers need no internet access."""

from collections.abc import Iterator

import torch

from bdense.data.datasets import load_dataset
from bdense.metrics.clip_score import FILES as CLIP_FILES
from bdense.metrics.extractors import load_extractor, missing_checkpoint
from bdense.models.diffusers_files import folder_of
from bdense.models.store import load_model
from bdense.models.zoo import PROMPT_SETS, PUBLIC_MODELS, resolve_reference
from search.places import cache_folder
from search.spec.study import StudySpec


def fetch_all(spec: StudySpec) -> Iterator[str]:
    """Download data, teacher, reference and the extractor's weights, as far as missing.

    Yields:
        A line for each: what it is and where.

    Raises:
        InputError: Something cannot be downloaded; says where to put it by hand.
    """
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
