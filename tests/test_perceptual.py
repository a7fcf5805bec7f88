"""LPIPS: through the files that a user has, with random weights of their shapes in them."""

import copy
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from bdense.errors import CheckpointError, InputError
from bdense.files import sha256_file
from bdense.methods import perceptual
from bdense.methods.perceptual import LPIPS, LPIPS_URL, VGG16_URL
from bdense.models.store import denoiser_sha256, load_denoiser, load_tensors, save_denoiser
from tests.commands import done
from tests.small import same_weights, sfd, small_teacher, small_trajectories

VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """$TORCH_HOME with both files, as downloaded ones would lie there."""
    home = tmp_path_factory.mktemp("torch")
    (home / "hub/checkpoints").mkdir(parents=True)
    draw = torch.Generator().manual_seed(0)
    state, channels, index = {}, 3, 0
    for width in VGG16:
        if not width:
            index += 1
            continue
        shape = (width, channels, 3, 3)
        scale = math.sqrt(2 / (9 * channels))
        state[f"features.{index}.weight"] = scale * torch.randn(shape, generator=draw)
        state[f"features.{index}.bias"] = torch.zeros(width)
        channels, index = width, index + 2
    state["classifier.0.bias"] = torch.zeros(4096)  # stands for what is not used
    torch.save(state, home / "hub/checkpoints/vgg16-397923af.pth")
    linear = [torch.rand(1, c, 1, 1, generator=draw) for c in (64, 128, 256, 512, 512)]
    torch.save(linear, home / "hub/checkpoints/lpips_weights.pt")
    return home


@pytest.fixture
def lpips(folder, monkeypatch) -> LPIPS:
    monkeypatch.setenv("TORCH_HOME", str(folder))
    return LPIPS()


def images(channels: int, seed: int) -> torch.Tensor:
    """[1, channels, 8, 8] in [-1, 1]."""
    draw = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(1, channels, 8, 8, generator=draw) - 1


def test_it_is_piq_s_lpips_of_enlarged_images_in_its_range(lpips, folder, monkeypatch):
    """And piq looks for its files where ours lie."""
    import piq.perceptual

    class Whole:
        """Stands for torchvision's network, whose file would have its classifier too."""

        def __init__(self, **_):
            self.features = perceptual._vgg16_features()[0]

    monkeypatch.setattr(piq.perceptual, "vgg16", Whole)
    reference = piq.LPIPS(replace_pooling=True)
    x, y = images(3, 0), images(3, 1)
    large = [F.interpolate(z, size=(224, 224), mode="bilinear") for z in (x, y)]
    expected = reference(*((z + 1) / 2 for z in large))
    assert expected > 0.01
    assert lpips(x, y).item() == pytest.approx(expected.item(), rel=1e-5)
    as_reference = LPIPS(as_reference=True)
    assert as_reference(x, y).item() == pytest.approx(reference(*large).item(), rel=1e-5)
    assert lpips(x, x).item() == 0


def test_grey_images_are_three_equal_channels(lpips):
    x, y = images(1, 0), images(1, 1)
    expected = lpips(x.expand(-1, 3, -1, -1), y.expand(-1, 3, -1, -1))
    assert lpips(x, y).item() == pytest.approx(expected.item(), rel=1e-6)
    with pytest.raises(InputError, match="1 or 3 channels, got 2"):
        lpips(images(2, 0), images(2, 1))


def test_gradients_flow_to_the_images_alone(lpips):
    x = images(1, 0).requires_grad_()
    lpips(x, images(1, 1)).backward()
    assert x.grad.abs().max() > 0
    network = list(lpips._loss.parameters())
    assert len(network) == 2 * 13
    assert not any(p.requires_grad or p.grad is not None for p in network)


def test_it_names_itself_by_its_files(lpips, folder):
    checkpoints = folder / "hub/checkpoints"
    assert lpips.describe() == {
        "name": "lpips",
        "network": "vgg16, average pooling",
        "side": 224,
        "range": [0, 1],
        "vgg16_sha256": sha256_file(checkpoints / "vgg16-397923af.pth"),
        "lpips_sha256": sha256_file(checkpoints / "lpips_weights.pt"),
    }
    assert LPIPS(as_reference=True).describe()["range"] == [-1, 1]


def test_missing_weights_are_named_with_where_to_put_them(tmp_path, monkeypatch, folder):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def refuse(url: str, path: Path, *, what: str, **_):
        raise InputError(f"cannot download {what}; fetch {url} by hand and put it at {path}")

    checkpoints = tmp_path / "hub/checkpoints"
    monkeypatch.setattr("bdense.models.torch_weights.fetch", refuse)
    expected = f"LPIPS weights; fetch {LPIPS_URL} by hand and put it at {checkpoints}/lpips_w"
    with pytest.raises(InputError, match=re.escape(expected)):
        LPIPS()
    checkpoints.mkdir(parents=True)
    (checkpoints / "lpips_weights.pt").symlink_to(folder / "hub/checkpoints/lpips_weights.pt")
    monkeypatch.undo()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = checkpoints / "vgg16-397923af.pth"
    path.write_bytes(b"")
    with pytest.raises(
        InputError, match=rf"not hold VGG16 weights .* give the file of {VGG16_URL}"
    ):
        LPIPS()
    torch.save({"features.0.weight": torch.zeros(1)}, path)
    with pytest.raises(InputError, match=r"not hold VGG16 weights \(size mismatch for 0\.weight"):
        LPIPS()
    torch.save([torch.zeros(1, 64, 1, 1)], checkpoints / "own.pt")
    (checkpoints / "lpips_weights.pt").unlink()
    (checkpoints / "own.pt").rename(checkpoints / "lpips_weights.pt")
    with pytest.raises(InputError, match=r"does not hold LPIPS weights \(not one weight for each"):
        LPIPS()


class Halved:
    """A distance in closed form."""

    def __init__(self, name: str = "halved") -> None:
        self.name = name
        self.asked: list[torch.Size] = []

    def __call__(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.asked.append(images.shape)
        return (images - targets).square().mean() / 2

    def describe(self) -> dict:
        return {"name": self.name}


def test_it_is_added_for_every_pixel_at_the_end_of_the_last_interval(tmp_path):
    """As in the reference: a 0-dim distance added to each element of the loss before the sum."""
    teacher = small_teacher()
    trajectories = small_trajectories(teacher, count=1, substeps=2)
    loss, one = Halved(), torch.ones(1)
    path = tmp_path / "checkpoint.safetensors"
    short = {"images": 4}
    student = sfd(
        trajectories, one, perceptual=loss, checkpoint=path, checkpoint_seconds=0, **short
    )
    assert loss.asked == [torch.Size((4, 1, 8, 8))]
    assert load_tensors(path)[1]["identity"]["perceptual"] == {"name": "halved"}
    with pytest.raises(CheckpointError, match="differs in: perceptual"):
        sfd(trajectories, one, perceptual=Halved("other"), checkpoint=path, **short)

    # Written out. NFE 2 with AFS: intervals 1 and 2 are trained, the loss is of the second.
    plain = sfd(trajectories, one, **short)
    assert not same_weights(plain, student)
    own = copy.deepcopy(teacher).train()
    optimizer = torch.optim.Adam(own.parameters(), lr=1e-3, fused=True)
    walk, t = trajectories[0], trajectories.grid.student()
    x = walk.start + (t[1] - t[0]) * (walk.start / (1 + t[0] ** 2).sqrt())
    for n in (1, 2):
        end = walk.states[2 * n - 1]
        x_next = x + (t[n + 1] - t[n]) * ((x - own(x, t[n])) / t[n])
        elements = (x_next - end).abs()
        if n == 2:
            elements = elements + Halved()(x_next, end)
        optimizer.zero_grad()
        (elements.sum() / len(x)).backward()
        optimizer.step()
        x = x_next.detach()
    for p, q in zip(own.parameters(), student.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)


def test_bdense_distill_takes_it(lpips, tmp_path):
    teacher, student = tmp_path / "teacher.safetensors", tmp_path / "student.safetensors"
    save_denoiser(teacher, small_teacher(), {"kind": "teacher"})
    digests = set()
    for choice in ((), ("--perceptual", "lpips-sfd")):
        short = ("--nfe", 1, "--substeps", 2, "--batch", 1, "--kimg", 0.001, "--lr", 1e-3)
        done("distill", teacher, *short, *choice, "--force", "--out", student)
        loaded, metadata = load_denoiser(student)
        digests.add(denoiser_sha256(loaded))
    assert len(digests) == 2
    assert metadata["perceptual"] == LPIPS(as_reference=True).describe()
    card = student.with_suffix(".md").read_text()
    assert "| perceptual loss | lpips on the last interval, images in [-1, 1] |" in card


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "piq", None)
    with pytest.raises(InputError, match=r"LPIPS needs .*piq.*; pip install .bdense\[lpips\]"):
        LPIPS()
