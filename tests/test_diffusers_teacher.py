"""DDPM teachers in diffusers' format, against diffusers itself."""

import builtins
import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from bdense.diffusion.branches import widen_head
from bdense.errors import CheckpointError, InputError, ShapeError
from bdense.methods import METHODS
from bdense.models.diffusers_files import is_hub_id
from bdense.models.diffusers_teacher import read_diffusers
from bdense.models.store import denoiser_sha256, load_denoiser, save_denoiser
from search.spec.file import read_spec
from tests.small import same_weights
from tests.studies import resolve_here, write

diffusers = pytest.importorskip("diffusers", reason="needs the diffusers extra")

T = 50


def new_unet(**options: object) -> object:
    """Two levels with attention, untrained, with a head that matters."""
    torch.manual_seed(0)
    settings = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return diffusers.UNet2DModel(**settings | options).eval()


def new_scheduler(**options: object) -> object:
    return diffusers.DDIMScheduler(
        **{"num_train_timesteps": T, "beta_end": 0.2, "clip_sample": False} | options
    )


def save(folder: Path, unet: object, scheduler: object, *, flat: bool = False) -> Path:
    unet.save_pretrained(folder if flat else folder / "unet")
    scheduler.save_pretrained(folder if flat else folder / "scheduler")
    return folder


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path / "ddpm-tiny", new_unet(), new_scheduler())


# ---- values ----


PREDICTIONS = ("epsilon", "sample", "v_prediction")
PROCESSES = [{"beta_schedule": name} for name in ("linear", "scaled_linear", "squaredcos_cap_v2")]
ZERO_SNR = {"rescale_betas_zero_snr": True}


@pytest.mark.parametrize(
    ("prediction", "process"),
    [
        *itertools.product(PREDICTIONS, PROCESSES),
        *((prediction, ZERO_SNR) for prediction in PREDICTIONS[1:]),
    ],
)
@torch.no_grad()
def test_a_step_is_diffusers_own_ddim_step(tmp_path, prediction, process):
    """z = alpha x: one DDIM step there is one Euler step here."""
    unet = new_unet()
    scheduler = new_scheduler(prediction_type=prediction, **process)
    denoiser = read_diffusers(save(tmp_path, unet, scheduler))[0]
    scheduler.set_timesteps(T)
    time = 30
    alpha_bar, alpha_bar_next = scheduler.alphas_cumprod[[time, time - 1]].double()
    z = torch.randn(3, 1, 8, 8)
    expected = scheduler.step(unet(z, time).sample, time, z).prev_sample

    sigma, sigma_next = (((1 - a) / a).sqrt() for a in (alpha_bar, alpha_bar_next))
    x = z.double() / alpha_bar.sqrt()
    slope = (x - denoiser(x.float(), sigma).double()) / sigma
    got = (x + (sigma_next - sigma) * slope) * alpha_bar_next.sqrt()
    torch.testing.assert_close(got.float(), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_between_two_times_the_network_sees_a_fraction(folder):
    unet, scheduler = new_unet(), new_scheduler()
    denoiser = read_diffusers(folder)[0]
    x = torch.randn(2, 1, 8, 8)
    log = scheduler.alphas_cumprod.double().log()
    sigma = (-(0.7 * log[20] + 0.3 * log[21])).expm1().sqrt()
    times = torch.full((2,), 20.3)
    eps = unet(x / (1 + sigma.float() ** 2).sqrt(), times).sample
    torch.testing.assert_close(denoiser(x, sigma), x - sigma.float() * eps, rtol=1e-4, atol=1e-4)
    # One level for each image is the same.
    both = denoiser(x, torch.stack([sigma, sigma]))
    torch.testing.assert_close(both, denoiser(x, sigma))


@torch.no_grad()
def test_classes_are_one_hot_rows(tmp_path):
    unet = new_unet(num_class_embeds=5)
    denoiser = read_diffusers(save(tmp_path, unet, new_scheduler()))[0]
    assert denoiser.label_dim == 5
    x, sigma = torch.randn(2, 1, 8, 8), new_scheduler().alphas_cumprod[10]
    sigma = ((1 - sigma) / sigma).sqrt()
    eps = unet(x / (1 + sigma**2).sqrt(), 10, class_labels=torch.tensor([3, 1])).sample
    labels = torch.eye(5)[[3, 1]]
    torch.testing.assert_close(denoiser(x, sigma, labels), x - sigma * eps, rtol=1e-4, atol=1e-5)
    assert denoiser(x, sigma).shape == x.shape
    with pytest.raises(ShapeError, match=r"\[2, 5\] .* got \[2, 4\]"):
        denoiser(x, sigma, torch.zeros(2, 4))


@torch.no_grad()
def test_of_a_learned_variance_the_mean_half_is_read(tmp_path):
    unet, scheduler = new_unet(out_channels=2), new_scheduler()
    denoiser = read_diffusers(save(tmp_path, unet, scheduler))[0]
    x, alpha_bar = torch.randn(2, 1, 8, 8), scheduler.alphas_cumprod[10]
    sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
    eps = unet(x / (1 + sigma**2).sqrt(), 10).sample[:, :1]
    torch.testing.assert_close(denoiser(x, sigma), x - sigma * eps, rtol=1e-4, atol=1e-5)
    # Branches and a file keep it.
    save_denoiser(tmp_path / "kept.safetensors", widen_head(denoiser, 3), {})
    kept = load_denoiser(tmp_path / "kept.safetensors")[0].branches(x, sigma)
    torch.testing.assert_close(kept, denoiser(x, sigma)[:, None].expand_as(kept))


def test_a_copy_in_half_precision_alone_is_read(tmp_path):
    new_unet().half().save_pretrained(tmp_path / "unet", variant="fp16")
    new_scheduler().save_pretrained(tmp_path / "scheduler")
    found = read_diffusers(tmp_path)[0].state_dict()
    halves = new_unet().half().float().state_dict()
    assert all(torch.equal(found[f"model.unet.{name}"], value) for name, value in halves.items())


@pytest.mark.parametrize("name", ["config.json", "other.safetensors"])
def test_a_part_that_is_a_pipe_is_not_waited_for(folder, name):
    (folder / "unet" / name).unlink(missing_ok=True)
    os.mkfifo(folder / "unet" / name)
    with pytest.raises(InputError):
        read_diffusers(folder)


@pytest.mark.parametrize("method", METHODS)
def test_a_teachers_levels_are_the_default_where_it_knows_them(folder, method):
    teacher, known = read_diffusers(folder)
    assert 0.006 < teacher.precond.sigma_min < teacher.precond.sigma_max < 80
    own = METHODS[method]()
    given = {"steps": 4, "until": 2} if method == "progressive" else {}
    own.check(own.Config.read({**own.Config.usual(known, teacher), **given}), teacher, known)


def test_a_study_takes_a_folder_and_the_levels_that_it_knows(folder, tmp_path, monkeypatch):
    resolve_here(monkeypatch)
    found = read_spec(write(tmp_path, teacher={"checkpoint": "ddpm-tiny"}))
    precond = read_diffusers(folder)[0].precond
    bounds = [found.method.options[name] for name in ("sigma_min", "sigma_max")]
    assert bounds == [precond.sigma_min, precond.sigma_max]
    before = found.fingerprint()
    (folder / "README.md").write_text("nothing that is read")
    assert found.fingerprint() == before
    new_unet(layers_per_block=2).save_pretrained(folder / "unet")
    assert found.fingerprint() != before
    (folder / "vae").mkdir()
    # With an autoencoder what it draws are latents, and the images are those that are decoded.
    config = {"_class_name": "AutoencoderKL", "latent_channels": 1, "block_out_channels": [8, 8]}
    (folder / "vae/config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"makes images of \(3, 16, 16\)"):
        read_spec(write(tmp_path, teacher={"checkpoint": "ddpm-tiny"}))


# ---- what a student is made of ----


def test_safetensors_need_none_of_diffusers_files(folder, tmp_path):
    denoiser = widen_head(read_diffusers(folder)[0], 2)
    path = tmp_path / "kept.safetensors"
    save_denoiser(path, denoiser, {})
    shutil.rmtree(folder)
    loaded = load_denoiser(path)[0]
    assert loaded.describe() == denoiser.describe()
    assert json.loads(json.dumps(loaded.describe())) == loaded.describe()
    assert same_weights(loaded, denoiser)
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor(0.7)
    assert torch.equal(loaded(x, sigma), denoiser(x, sigma))


# ---- what is read ----


def test_both_layouts_are_one_model(folder, tmp_path):
    flat = save(tmp_path / "flat", new_unet(), new_scheduler(), flat=True)
    one, other = read_diffusers(folder)[0], read_diffusers(flat)[0]
    assert denoiser_sha256(one) == denoiser_sha256(other)


def test_metadata_say_where_it_is_from_and_whose_it_is(folder):
    assert read_diffusers(folder)[1] == {
        "source": "ddpm-tiny",
        "class": "UNet2DModel",
        "scheduler": "DDIMScheduler",
    }
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# DDPM\n")
    new_scheduler(clip_sample=True).save_pretrained(folder / "scheduler")
    metadata = read_diffusers(folder)[1]
    assert (metadata["licence"], metadata["clip_sample"]) == ("apache-2.0", 1.0)


def test_ids_of_the_hub():
    assert is_hub_id("google/ddpm-cifar10-32")
    for other in ("ddpm", "a/b.pkl", "a/b.pt", "a/b.safetensors", "a/b/c", "/a/b", "../a", "./a"):
        assert not is_hub_id(other), other


def test_a_hub_out_of_reach_is_one_line(monkeypatch):
    import huggingface_hub

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route\nand a long story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(InputError, match=r"google/ddpm-.* \(no route\); fetch https://.* by hand"):
        read_diffusers("google/ddpm-cifar10-32")


def test_a_hub_repository_is_read_from_its_snapshot(folder, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot(source: str, allow_patterns: list[str]) -> str:
        asked.append((source, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    metadata = read_diffusers("someone/ddpm")[1]
    assert metadata["source"] == "someone/ddpm"
    ((source, patterns),) = asked
    assert source == "someone/ddpm"
    assert "unet/diffusion_pytorch_model.safetensors" in patterns
    assert not any(pattern.endswith(".bin") for pattern in patterns)


# ---- what is refused ----


def test_a_missing_library_says_how_to_install_it(folder, tmp_path, monkeypatch):
    path = tmp_path / "kept.safetensors"
    save_denoiser(path, read_diffusers(folder)[0], {})
    real = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name.split(".")[0] == "diffusers":
            raise ImportError("No module named 'diffusers'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    for read in (lambda: read_diffusers(folder), lambda: load_denoiser(path)):
        with pytest.raises(InputError, match=r"pip install 'bdense\[diffusers\]'"):
            read()


@pytest.mark.parametrize(
    ("file", "keys", "message"),
    [
        ("unet/config.json", {"_class_name": "UNet3DConditionModel"}, "a UNet3DConditionModel;"),
        ("unet/config.json", {"out_channels": 3}, "out_channels=3, not in_channels=1"),
        ("unet/config.json", {"sample_size": [8, 16]}, "images here are square"),
        ("unet/config.json", {"time_embedding_type": "fourier"}, "'fourier'"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        ("unet/config.json", {"layers_per_block": 2}, "diffusers cannot load"),
        ("unet/config.json", {"layers_per_block": 10**9}, "more than 10000 modules"),
        ("unet/config.json", {"block_out_channels": [8, 4 * 10**8]}, "cannot be built"),
        ("unet/config.json", {"block_out_channels": [8, 4000]}, r"describes \d+ weights"),
        ("unet/config.json", {"down_block_types": 3}, "config.json has a damaged header"),
        ("unet/config.json", None, r"config\.json cannot be read as JSON"),
        ("scheduler/scheduler_config.json", {"_class_name": "UniPC"}, "describes a UniPC"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, "got 'sigmoid'"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "got 'flow'"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "v_prediction"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**10}, "must be 2 to"),
    ],
)
def test_models_and_schedulers_that_cannot_be_denoisers(folder, file, keys, message):
    path = folder / file
    path.write_text("{" if keys is None else json.dumps(json.loads(path.read_text()) | keys))
    with pytest.raises(CheckpointError, match=message):
        read_diffusers(folder)


def test_other_folders_are_named(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"neither unet/config\.json nor config\.json"):
        read_diffusers(tmp_path)
    shutil.rmtree(folder / "scheduler")
    with pytest.raises(CheckpointError, match="no scheduler/scheduler_config"):
        read_diffusers(folder)
