"""Folders in diffusers' format, here or on the Hugging Face hub: their parts and weights.

A pipeline is a folder of parts (``unet``, ``scheduler``, ``vae``), each with its configuration and
its weights, if it has any. Only safetensors are read, and each weight must be there.
"""

import contextlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bdense.errors import CheckpointError, InputError, extra, listed
from bdense.files import require_no_page, require_no_pipe

CONFIG, INDEX = "config.json", "model_index.json"
# In a student's pipeline, beside diffusers' own files: metadata that they have no place for.
METADATA = "bdense.json"
# Endings of torch pickles, which are not read.
TORCH_FILES = (".bin", ".ckpt", ".pt", ".pth")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
WEIGHTS = "diffusion_pytorch_model"
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
# In a folder that ``export_folder`` writes: the student's weights, and those of the small
# classifier in whose features its FID is, where it is one.
MODEL_FILE, EXTRACTOR = "model.safetensors", "extractor.safetensors"
# There too: the folder of the student's diffusers pipeline.
PIPELINE = "diffusers"
# What is fetched of a pipeline: configurations, and weights without the copies in another
# precision that some repositories have beside them.
_MODELS = ("unet/", "transformer/", "vae/", "vqvae/")
_SAFETENSORS = (".safetensors", "-*.safetensors", ".safetensors.index.json")
_PATTERNS = (
    *(INDEX, METADATA, "README.md", "tokenizer/*.json", "tokenizer/merges.txt"),
    *(f"{part}scheduler_config.json" for part in ("", "scheduler/")),
    *(f"{part}{CONFIG}" for part in ("", "text_encoder/", *_MODELS)),
    *(f"{part}{WEIGHTS}{ending}" for part in ("", *_MODELS) for ending in _SAFETENSORS),
    *(f"text_encoder/model{ending}" for ending in _SAFETENSORS),
)
_MOST_BYTES = 2**22  # of a configuration
_WEIGHTS_FILE = re.compile(r"\w+(?:-\d+-of-\d+)?(?:\.(\w+)(?:-\d+-of-\d+)?)?\.safetensors")


def is_hub_id(source: str) -> bool:
    """Whether ``source`` has the form OWNER/NAME; a file ending means a file."""
    files = (".pkl", ".safetensors", *TORCH_FILES)
    return bool(_HUB_ID.fullmatch(source)) and Path(source).suffix not in files


def folder_of(source: str | Path, files: Sequence[str] = ()) -> Path:
    """The folder itself, or one with the needed files of a hub repository.

    huggingface_hub caches downloads and resumes them.

    Args:
        source: A folder, or OWNER/NAME.
        files: Patterns of what is needed; by default the parts of a pipeline that are read.

    Raises:
        CheckpointError: It is neither a folder nor a hub id.
        InputError: The hub cannot be reached, or huggingface_hub is not installed.
    """
    if Path(source).is_dir():
        return Path(source)
    source = str(source)
    if not is_hub_id(source):
        raise CheckpointError(f"{source} is neither a diffusers folder nor a hub id OWNER/NAME")
    with extra("hub", f"{source} is not a file here, and as a hub id it"):
        from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(source, allow_patterns=[*(files or _PATTERNS)]))
        if not files and is_pushed(folder):
            snapshot_download(source, allow_patterns=[MODEL_FILE, EXTRACTOR])
        return folder
    except CheckpointError:
        raise
    except Exception as error:
        why = why_refused(error, ", and it is not in the cache")
        raise InputError(
            f"cannot fetch {source} from the Hugging Face hub ({why}); fetch "
            f"{hub_page(source)} by hand into a folder and give the folder"
        ) from error


def hub_page(repo_id: str) -> str:
    """Its address on the Hub, or on the mirror of HF_ENDPOINT."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo_id}"


def pipeline_folder(source: str | Path) -> Path:
    """The folder of ``folder_of``, or the pipeline in it if ``export_folder`` wrote it."""
    folder = folder_of(source)
    return folder / PIPELINE if (folder / PIPELINE / INDEX).is_file() else folder


def is_pushed(folder: Path) -> bool:
    """Whether it is a folder of ``export_folder``, which ``HubRepository.push`` uploads."""
    return (folder / CONFIG).is_file() and read_json(folder / CONFIG).get("file") == MODEL_FILE


def why_refused(error: Exception, cached: str = "") -> str:
    """One line on an error of huggingface_hub, without addresses that may hold secrets.

    Args:
        cached: What to add where there is no network.
    """
    from huggingface_hub import constants, errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return "its terms must be accepted on its page first; then set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no model of this name is there, or it is private: then set HF_TOKEN"
    if status == 401:
        return "the token was refused with status 401; set another HF_TOKEN"
    if status == 403:
        return "it was refused with status 403; the token has no right to it, or space is short"
    if status is not None:
        return f"the server answered with status {status}"
    if constants.HF_HUB_OFFLINE:
        return f"HF_HUB_OFFLINE is set{cached}"
    if isinstance(error, ConnectionError | errors.LocalEntryNotFoundError) or "Connect" in (
        type(error).__name__
    ):
        return f"{constants.ENDPOINT} cannot be reached{cached}"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def read_json(file: Path) -> dict[str, Any]:
    """A configuration.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        require_no_pipe(file)
        if file.stat().st_size > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES} bytes")
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} does not hold a configuration")
    return found


def load_part(model_class: Any, folder: Path, **options: Any) -> Any:  # noqa: ANN401
    """A model of diffusers or transformers with the weights of a folder, in eval mode, in float32.

    Args:
        model_class: With ``from_pretrained``, which knows the weights' names of older versions.

    Raises:
        CheckpointError: There are no safetensors, or weights are missing, not expected or of
            another shape; names them.
    """
    for each in folder.glob("*.safetensors"):
        require_no_page(each)
    try:
        with _quiet():
            model, found = model_class.from_pretrained(
                folder,
                use_safetensors=True,
                output_loading_info=True,
                variant=_variant(folder),
                **options,
            )
    except (OSError, ValueError, RuntimeError) as error:
        pickles = [path.name for path in sorted(folder.glob("*")) if path.suffix in TORCH_FILES]
        hint = (
            f"; only safetensors are read, not {pickles[0]}: save the model again with diffusers' "
            "save_pretrained"
            if pickles
            else "; fetch it again, or save it again with save_pretrained"
        )
        reason = " ".join(str(error).split()).removesuffix(".")
        raise CheckpointError(f"diffusers cannot load {folder} ({reason}){hint}") from error
    _require_complete(folder, found)
    return model.float().eval()


def load_transformers(kind: str, folder: Path, what: str) -> Any:  # noqa: ANN401
    """A model of transformers, as ``load_part``, without gradients.

    Args:
        what: What needs it, for errors.

    Raises:
        CheckpointError: As ``load_part``, or the folder describes another model.
        InputError: transformers is not installed.
    """
    with extra("diffusers", what):
        import transformers
        from transformers.utils.logging import disable_progress_bar
    disable_progress_bar()  # type: ignore[no-untyped-call]
    if kind not in (kinds := read_json(folder / CONFIG).get("architectures") or []):
        raise CheckpointError(
            f"{folder / CONFIG} describes {', '.join(kinds) or 'no model'}; {what} needs a {kind}"
        )
    return load_part(getattr(transformers, kind), folder).requires_grad_(False)


def load_processor(kind: str, folder: Path) -> Any:  # noqa: ANN401
    """A tokenizer or image processor of transformers.

    Raises:
        CheckpointError: It cannot be read.
    """
    import transformers

    try:
        return getattr(transformers, kind).from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"cannot read a {kind} from {folder} ({reason})") from error


def public_name(source: str | Path, folder: Path) -> str:
    """A hub id, or the name of a folder, without folders of this machine."""
    return folder.resolve().name if Path(source).is_dir() else str(source)


def _variant(folder: Path) -> str | None:
    """``fp16`` of NAME.fp16.safetensors, in a folder that has no weights in another precision."""
    found = {
        match[1] for file in folder.iterdir() if (match := _WEIGHTS_FILE.fullmatch(file.name))
    }
    return None if None in found else min(found, default=None)


def _require_complete(folder: Path, found: Mapping[str, Any]) -> None:
    """Refuse what ``from_pretrained`` only warns about."""
    parts = {
        "missing": sorted(found["missing_keys"]),
        "not expected": sorted(found["unexpected_keys"]),
        "of another shape": [*found.get("mismatched_keys", ()), *found.get("error_msgs", ())],
    }
    problems = [
        f"{len(names)} {'is' if len(names) == 1 else 'are'} {what}: {listed(names)}"
        for what, names in parts.items()
        if names
    ]
    if problems:
        raise CheckpointError(
            f"the weights of {folder} are not those that its {CONFIG} describes: "
            f"{'; '.join(problems)}; save the model again with save_pretrained"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' warnings and errors, which are raised here."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
