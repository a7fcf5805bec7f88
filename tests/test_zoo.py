"""Public files: the table against published figures, and models by name or path."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

import bdense.models.store
import bdense.models.zoo
from bdense.diffusion.denoiser import build_denoiser
from bdense.errors import CheckpointError, InputError
from bdense.files import sha256_file
from bdense.models.store import load_denoiser, load_model
from bdense.models.zoo import (
    CHECKPOINTS,
    HUB_CHECKPOINTS,
    PROMPT_SETS,
    REFERENCES,
    resolve_checkpoint,
    resolve_reference,
)
from tests.goldens import discover
from tests.small import same_weights, small_teacher

CIFAR10 = "edm-cifar10-32x32-uncond-vp"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The folder of public files, empty."""
    monkeypatch.setenv("BDENSE_CHECKPOINTS", str(tmp_path / "public"))
    return tmp_path / "public"


# Counted in NVlabs' own networks.py (008a4e5), built with the options of its train.py and
# README.md; names and shapes of all weights were those of ours.
@pytest.mark.parametrize(
    ("name", "parameters", "image_shape", "label_dim", "dropout"),
    [
        ("edm-cifar10-32x32-uncond-vp", 55_733_891, (3, 32, 32), 0, 0.13),
        ("edm-cifar10-32x32-uncond-ve", 56_397_827, (3, 32, 32), 0, 0.13),
        ("edm-cifar10-32x32-cond-vp", 55_735_299, (3, 32, 32), 10, 0.13),
        ("edm-cifar10-32x32-cond-ve", 56_400_643, (3, 32, 32), 10, 0.13),
        ("edm-ffhq-64x64-uncond-vp", 61_805_571, (3, 64, 64), 0, 0.05),
        ("edm-ffhq-64x64-uncond-ve", 62_761_091, (3, 64, 64), 0, 0.05),
        ("edm-afhqv2-64x64-uncond-vp", 61_805_571, (3, 64, 64), 0, 0.25),
        ("edm-afhqv2-64x64-uncond-ve", 62_761_091, (3, 64, 64), 0, 0.25),
        ("edm-imagenet-64x64-cond-adm", 295_899_267, (3, 64, 64), 1000, 0.1),
    ],
)
def test_the_networks_have_the_published_sizes(name, parameters, image_shape, label_dim, dropout):
    published = CHECKPOINTS[name]
    with torch.device("meta"):
        denoiser = build_denoiser(dict(published.architecture))
    assert sum(p.numel() for p in denoiser.parameters()) == parameters
    assert (denoiser.image_shape, denoiser.label_dim) == (image_shape, label_dim)
    assert denoiser.model.config.dropout == dropout
    if published.size is not None:
        # float32, and some hundred kilobytes of structure and program text.
        weights = 4 * sum(value.numel() for value in denoiser.state_dict().values())
        assert 0 < published.size - weights < 1_000_000


def test_every_file_has_its_address_and_terms():
    edms = {name for name in REFERENCES if name.endswith(("-32x32", "-64x64"))}
    assert edms == {"cifar10-32x32", "ffhq-64x64", "afhqv2-64x64", "imagenet-64x64"}
    for name, file in {**CHECKPOINTS, **{name: REFERENCES[name] for name in edms}}.items():
        kind = "pretrained" if name in CHECKPOINTS else "fid-refs"
        ending = "pkl" if name in CHECKPOINTS else "npz"
        assert file.url == f"https://nvlabs-fi-cdn.nvidia.com/edm/{kind}/{name}.{ending}"
        assert file.licence == "CC-BY-NC-SA-4.0"
        assert "arXiv 2206.00364" in file.citation
    others = {REFERENCES[name] for name in REFERENCES.keys() - edms} | set(PROMPT_SETS.values())
    for file in others:
        assert file.url.startswith("https://")
        assert "EDM" not in file.citation
        assert file.licence in ("MIT", "CC-BY-4.0", "unknown")
    # Each has a file of its own, also beside those of EDM.
    assert len({file.path for file in {*REFERENCES.values(), *PROMPT_SETS.values()}}) == 8


# ---- on the Hugging Face hub ----

HUB = "google/ddpm-cifar10-32"


def test_ddpms_cifar10_network_has_the_papers_size():
    """35.7 million parameters (Ho et al. 2020, section 4 and appendix B), at T = 1000."""
    pytest.importorskip("diffusers", reason="needs the diffusers extra")
    with torch.device("meta"):
        denoiser = build_denoiser(dict(HUB_CHECKPOINTS[HUB].architecture))
    assert sum(p.numel() for p in denoiser.parameters()) == 35_746_307
    assert (denoiser.image_shape, denoiser.label_dim) == ((3, 32, 32), 0)
    # Linear betas from 1e-4 to 0.02: the first level, and all but noise at the last.
    assert denoiser.precond.sigma_min == pytest.approx((1e-4 / (1 - 1e-4)) ** 0.5)
    assert denoiser.precond.sigma_max == pytest.approx(157.4, abs=0.1)
    # Everything that a file of it would have is stated here, not left to diffusers' defaults.
    described = denoiser.describe()
    assert described.pop("trained_betas") is None
    assert described.pop("num_branches") == 1
    assert described == HUB_CHECKPOINTS[HUB].architecture


def test_a_hub_models_terms_come_with_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    read = {"source": HUB, "scheduler": "DDPMScheduler", "licence": "apache-2.0"}
    monkeypatch.setattr(bdense.models.store, "folder_of", lambda _: tmp_path)
    monkeypatch.setattr(
        bdense.models.store, "read_diffusers", lambda source, folder: (small_teacher(), dict(read))
    )
    _, metadata = load_model(HUB)
    assert "arXiv 2006.11239" in metadata.pop("citation")
    assert metadata == {
        "source": HUB,
        "scheduler": "DDPMScheduler",
        "url": "https://huggingface.co/google/ddpm-cifar10-32",
        "licence": "Apache-2.0",
    }
    assert load_model("another/model")[1] == read


def test_a_hub_model_is_here_once_its_weights_are(monkeypatch, tmp_path):
    pytest.importorskip("huggingface_hub", reason="needs the diffusers extra")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    published = HUB_CHECKPOINTS[HUB]
    assert published.path == tmp_path / "models--google--ddpm-cifar10-32"
    snapshot = published.path / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert not published.is_here
    (snapshot / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    assert published.is_here


# ---- files by name ----


def test_a_name_is_its_file_in_the_folder(folder, monkeypatch):
    asked = []

    def fetch(url: str, path: Path, **pins: object) -> Path:
        asked.append((url, path, pins))
        return path

    monkeypatch.setattr(bdense.models.zoo, "fetch", fetch)
    known = CHECKPOINTS[CIFAR10]
    assert resolve_checkpoint(CIFAR10) == folder / f"{CIFAR10}.pkl"
    pins = {"what": CIFAR10, "sha256": known.sha256, "size": None}
    assert asked == [(known.url, known.path, pins)]


def test_an_unknown_name_lists_the_public_ones(folder):
    with pytest.raises(InputError, match="no checkpoint file edm-cifar, ") as c:
        resolve_checkpoint("edm-cifar")
    assert all(name in str(c.value) for name in CHECKPOINTS)
    with pytest.raises(InputError, match="did you mean cifar10-32x32"):
        resolve_reference("cifar10")


def test_a_path_that_is_not_there_lists_no_public_names(folder):
    for path in ("nothing.pkl", "models/student.safetensors"):
        with pytest.raises(InputError, match=f"no checkpoint file {path}$"):
            resolve_checkpoint(path)


def test_another_file_in_its_place_is_refused_unless_asked_for_by_path(folder):
    path = folder / f"{CIFAR10}.pkl"
    path.parent.mkdir()
    path.write_bytes(b"other")
    with pytest.raises(InputError, match=r"its sha256 is .*, or give a file by its path"):
        resolve_checkpoint(CIFAR10)
    assert resolve_checkpoint(path) == path


def test_a_missing_model_lists_the_names(folder):
    with pytest.raises(InputError, match=f"no checkpoint file nothing, .*{CIFAR10}"):
        load_model("nothing")
    with pytest.raises(InputError, match="the name of the model is empty"):
        load_model("")


def test_a_mistyped_path_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    with pytest.raises(InputError, match="no file runs/teacher"):
        load_model("runs/teacher")


@pytest.mark.parametrize("ending", ["pt", "pth", "bin", "ckpt"])
def test_pickles_of_torch_are_refused_with_what_is_read(tmp_path, ending):
    path = tmp_path / f"model.{ending}"
    path.write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=rf"model\.{ending} .* not read; give .safetensors"):
        load_model(path)


@pytest.mark.golden
@pytest.mark.parametrize("file", discover("edm-song-tiny.nosrc.pkl"))
def test_a_published_model_comes_with_its_terms(folder, monkeypatch, file):
    """From the folder of public files, where it was put by hand."""
    here = dataclasses.replace(CHECKPOINTS[CIFAR10], sha256=sha256_file(file))
    for module in (bdense.models.zoo, bdense.models.store):
        monkeypatch.setattr(module, "CHECKPOINTS", {CIFAR10: here})
    folder.mkdir()
    shutil.copy(file, here.path)
    denoiser, metadata = load_model(CIFAR10)
    assert same_weights(denoiser, load_denoiser(file)[0])
    assert metadata["source"] == CIFAR10
    assert metadata["licence"] == "CC-BY-NC-SA-4.0"
    assert metadata["url"] == here.url
    # By its path it is the same model under its own name.
    assert load_model(here.path)[1]["licence"] == "CC-BY-NC-SA-4.0"
    assert load_model(here.path)[1]["source"] == f"{CIFAR10}.pkl"
