"""Public files: the table against what is published of them, and names turned into files."""

import dataclasses
import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import bdense.models.store
import bdense.models.zoo
from bdense.diffusion.denoiser import build_denoiser
from bdense.errors import CheckpointError, InputError
from bdense.files import sha256_file
from bdense.models.store import denoiser_sha256, load_denoiser, load_model, save_denoiser
from bdense.models.zoo import (
    CHECKPOINTS,
    HUB_CHECKPOINTS,
    REFERENCES,
    checkpoint_folder,
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


@pytest.fixture
def published(tmp_path, monkeypatch) -> Iterator[bytes]:
    """A server in place of the publisher's; every checkpoint is these bytes, without pins."""
    content = b"weights" * 1000

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        at = f"http://127.0.0.1:{server.server_port}"
        table = {
            name: dataclasses.replace(file, url=f"{at}/{name}.pkl", sha256=None, size=None)
            for name, file in CHECKPOINTS.items()
        }
        monkeypatch.setattr(bdense.models.zoo, "CHECKPOINTS", table)
        yield content
        server.shutdown()


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
    for name, file in {**CHECKPOINTS, **REFERENCES}.items():
        kind = "pretrained" if name in CHECKPOINTS else "fid-refs"
        ending = "pkl" if name in CHECKPOINTS else "npz"
        assert file.url == f"https://nvlabs-fi-cdn.nvidia.com/edm/{kind}/{name}.{ending}"
        assert file.licence == "CC-BY-NC-SA-4.0"
        assert "arXiv 2206.00364" in file.citation
    assert set(REFERENCES) == {
        "cifar10-32x32",
        "ffhq-64x64",
        "afhqv2-64x64",
        "imagenet-64x64",
    }


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
    # Nothing is left to the library's defaults that a file of it would say.
    described = denoiser.describe()
    assert described.pop("trained_betas") is None
    assert described.pop("num_branches") == 1
    assert described == HUB_CHECKPOINTS[HUB].architecture


def test_a_hub_model_has_its_address_and_terms():
    published = HUB_CHECKPOINTS[HUB]
    assert published.url == "https://huggingface.co/google/ddpm-cifar10-32"
    assert published.licence == "Apache-2.0"
    assert "arXiv 2006.11239" in published.citation


def test_a_hub_models_terms_come_with_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    read = {"source": HUB, "scheduler": "DDPMScheduler", "licence": "apache-2.0"}
    monkeypatch.setattr(bdense.models.store, "read_diffusers", lambda _: (small_teacher(), read))
    _, metadata = load_model(HUB)
    assert metadata == {
        "source": HUB,
        "scheduler": "DDPMScheduler",
        "url": HUB_CHECKPOINTS[HUB].url,
        "licence": "Apache-2.0",
        "citation": HUB_CHECKPOINTS[HUB].citation,
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


def test_a_name_is_downloaded_once(folder, published):
    for _ in range(2):
        path = resolve_checkpoint(CIFAR10)
        assert path == folder / f"{CIFAR10}.pkl"
        assert path.read_bytes() == published


def test_a_path_is_taken_as_it_is(folder, tmp_path):
    path = tmp_path / "mine.pkl"
    path.write_bytes(b"x")
    assert resolve_checkpoint(path) == resolve_checkpoint(str(path)) == path
    assert resolve_reference(str(path)) == path


def test_what_is_neither_lists_the_names(folder):
    with pytest.raises(InputError, match="no checkpoint file edm-cifar, ") as c:
        resolve_checkpoint("edm-cifar")
    assert all(name in str(c.value) for name in CHECKPOINTS)
    with pytest.raises(InputError, match="public are cifar10-32x32, ffhq-64x64"):
        resolve_reference("cifar10")


def test_no_network_is_one_line_with_the_address(folder, monkeypatch):
    elsewhere = dataclasses.replace(CHECKPOINTS[CIFAR10], url="http://host.invalid/a/net.pkl")
    monkeypatch.setattr(bdense.models.zoo, "CHECKPOINTS", {CIFAR10: elsewhere})
    with pytest.raises(InputError) as caught:
        resolve_checkpoint(CIFAR10)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"cannot download {CIFAR10} (")
    assert f"http://host.invalid/a/net.pkl by hand and put it at {folder / 'net.pkl'}" in line


def test_another_file_in_its_place_is_refused_unless_asked_for_by_path(folder):
    path = folder / f"{CIFAR10}.pkl"
    path.parent.mkdir()
    path.write_bytes(b"other")
    with pytest.raises(InputError, match=r"its sha256 is .*, or give a file by its path"):
        resolve_checkpoint(CIFAR10)
    assert resolve_checkpoint(path) == path


def test_the_folder_is_the_users_own(monkeypatch, tmp_path):
    monkeypatch.delenv("BDENSE_CHECKPOINTS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert checkpoint_folder() == tmp_path / "bdense" / "checkpoints"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert checkpoint_folder() == Path.home() / ".cache" / "bdense" / "checkpoints"


# ---- models by whatever one has of them ----


def test_a_file_of_ours_says_itself_whose_it_is(tmp_path):
    path = tmp_path / "teacher.safetensors"
    save_denoiser(path, small_teacher(), {"kind": "teacher", "licence": "MIT"})
    denoiser, metadata = load_model(path)
    assert metadata == {"kind": "teacher", "licence": "MIT"}
    assert denoiser_sha256(denoiser) == denoiser_sha256(load_denoiser(path)[0])


def test_a_missing_model_lists_the_names(folder):
    for missing in ("nothing.pkl", "folder/nothing.safetensors", "nothing"):
        with pytest.raises(InputError, match=f"no checkpoint file {missing}.*{CIFAR10}"):
            load_model(missing)


def test_a_mistyped_path_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    with pytest.raises(InputError, match="no file runs/teacher"):
        load_model("runs/teacher")


@pytest.mark.parametrize("ending", ["pt", "pth", "bin", "ckpt"])
def test_pickles_of_torch_are_told_what_is_read(tmp_path, ending):
    path = tmp_path / f"model.{ending}"
    path.write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=rf"model\.{ending} .* not read; give .safetensors"):
        load_model(path)


@pytest.mark.golden
@pytest.mark.parametrize("file", discover("edm-song-tiny.nosrc.pkl"))
def test_a_published_model_comes_with_its_terms(folder, monkeypatch, file):
    """From the folder of public files, where somebody put it by hand."""
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
    # By its path it is the same, and says its own name.
    assert load_model(here.path)[1]["licence"] == "CC-BY-NC-SA-4.0"
    assert load_model(here.path)[1]["source"] == f"{CIFAR10}.pkl"
