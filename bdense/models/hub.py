"""Models on the Hugging Face Hub: their upload, and what their pages show.

The client is ``huggingface_hub`` (the ``hub`` extra): HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and
its cache are its own. ``load_model`` reads what is pushed here.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bdense.errors import InputError, extra
from bdense.models.card import HOW_TO_SAMPLE, pipeline_tag
from bdense.models.diffusers_files import INDEX, PIPELINE, is_hub_id, read_json, why_refused
from bdense.models.folder import CARD, CONFIG

# Data sets as the Hub calls them.
_DATA_SETS = {
    "cifar10": "uoft-cs/cifar10",
    "fashion-mnist": "zalando-datasets/fashion_mnist",
}
# A new repository has it.
_OF_THE_HUB = {".gitattributes"}


class HubRepository:
    """A model's repository to push to.

    Args:
        repo_id: OWNER/NAME.

    Raises:
        InputError: It has another form, huggingface_hub is not installed, no token is set, or the
            Hub cannot be reached.
    """

    def __init__(self, repo_id: str) -> None:
        if not is_hub_id(repo_id):
            raise InputError(
                f"{repo_id!r} is not the id OWNER/NAME of a model on the Hugging Face Hub"
            )
        with extra("hub", f"pushing {repo_id}"):
            from huggingface_hub import HfApi, get_token
        if get_token() is None:
            raise InputError(
                f"pushing {repo_id} needs a token of the Hugging Face Hub; set HF_TOKEN, or log "
                "in by `hf auth login`"
            )
        self.repo_id = repo_id
        self._api = HfApi(library_name="bdense")
        self.url = f"{self._api.endpoint}/{repo_id}"

    def require_new(self) -> None:
        """Refuse a repository with files, before anything is spent."""
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            self._api.whoami()
            files = set(self._api.list_repo_files(self.repo_id)) - _OF_THE_HUB
        except RepositoryNotFoundError:
            return
        except Exception as error:
            raise InputError(f"cannot push {self.repo_id}: {why_refused(error)}") from error
        if files:
            raise InputError(
                f"{self.url} has files already, such as {min(files)}; choose another name, or "
                "delete it there"
            )

    def push(self, folder: Path) -> str:
        """Upload a folder of ``export_folder`` in one commit; returns the page's address.

        A diffusers pipeline in it goes to the top, where ``DiffusionPipeline.from_pretrained``
        looks. The page's front matter has base model, data sets, licence and FID.

        Raises:
            InputError: The repository has files, or the Hub refuses the upload.
        """
        from huggingface_hub import CommitOperationAdd

        self.require_new()
        has_pipeline = (folder / PIPELINE / INDEX).is_file()
        front = card_data(self.repo_id, read_json(folder / CONFIG), has_pipeline=has_pipeline)
        text = (folder / CARD).read_text().split("\n---\n", 1)[-1]
        # The card's command and Python load the model by its name.
        for verb in ("sample", "verify"):
            text = text.replace(f"bdense {verb} {folder.name}", f"bdense {verb} {self.repo_id}")
        text = text.replace(json.dumps(folder.name), json.dumps(self.repo_id))
        text = text.replace(f"# {folder.name}\n", f"# {self.repo_id.partition('/')[2]}\n", 1)
        if has_pipeline:
            text += _pipeline_section(folder / PIPELINE / CARD, self.repo_id)
        operations = [CommitOperationAdd(CARD, f"---\n{front}\n---\n{text}".encode())]
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix().removeprefix(f"{PIPELINE}/")
            if path.is_file() and name != CARD:
                operations.append(CommitOperationAdd(name, path))
        try:
            self._api.create_repo(self.repo_id, exist_ok=True)
            self._api.create_commit(
                self.repo_id, operations, commit_message="A student distilled by bdense"
            )
        except Exception as error:
            raise InputError(f"cannot push {self.repo_id}: {why_refused(error)}") from error
        return self.url


@contextlib.contextmanager
def pushable_later(folder: str | Path, repo_id: str | None) -> Iterator[None]:
    """Add to an error how to push a model that was written before; without an id nothing."""
    try:
        yield
    except InputError as error:
        if repo_id is None:
            raise
        raise InputError(
            f"{error}; to push the model in {folder}, call "
            f"bdense.push_model(FOLDER, {repo_id!r}) in Python"
        ) from error


def push_model(folder: str | Path, repo_id: str) -> str:
    """Upload a folder of ``export_folder`` to the Hugging Face Hub as OWNER/NAME.

    ``load_model(repo_id)`` reads it; returns the page's address.

    Raises:
        InputError: It is not a model folder; or see ``HubRepository``.
    """
    if not (Path(folder) / CONFIG).is_file():
        raise InputError(f"{folder} is not a model folder; write one by export_folder")
    return HubRepository(repo_id).push(Path(folder))


def _pipeline_section(card: Path, repo_id: str) -> str:
    """How the card of a pipeline says that it is sampled, for the page."""
    section = card.read_text().split(HOW_TO_SAMPLE, 1)[1].split("\n## ", 1)[0]
    section = section.replace(json.dumps(PIPELINE), json.dumps(repo_id))
    return f"\n## With diffusers{section.rstrip()}\n"


def card_data(repo_id: str, metadata: Mapping[str, Any], *, has_pipeline: bool) -> str:
    """The front matter of a student's page, as YAML."""
    from huggingface_hub import EvalResult, ModelCardData

    fid: Mapping[str, Any] = metadata.get("fid") or {}
    teacher, data = str(metadata.get("teacher", "")), metadata.get("data", fid.get("reference"))
    known = _DATA_SETS.get(str(data).partition("@")[0])
    results = None
    if "value" in fid:
        conditions = {name: fid[name] for name in ("images", "nfe", "extractor", "reference")}
        measured = ", ".join(f"{name} {value}" for name, value in conditions.items())
        results = [
            EvalResult(
                task_type=pipeline_tag(metadata),
                dataset_type=known or str(fid["reference"]),
                dataset_name=str(fid["reference"]),
                metric_type="fid",
                metric_name=f"FID ({measured})",
                metric_value=round(fid["value"], 4),
                metric_args=conditions | {"extractor_sha256": fid["extractor_sha256"]},
            )
        ]
    return str(
        ModelCardData(
            model_name=repo_id.partition("/")[2],
            license=(metadata.get("licence") or "unknown").lower(),
            library_name="diffusers" if has_pipeline else "bdense",
            pipeline_tag=pipeline_tag(metadata),
            tags=["diffusion", "distillation", "bdense"],
            base_model=teacher if is_hub_id(teacher) else None,
            datasets=[known] if known else None,
            metrics=["fid"] if results else None,
            eval_results=results,
        )
    )
