"""Public pipelines: what a dry run knows of them without a download, and what a launch needs."""

import pytest
import torch

from bdense.data.prompts import read_prompts
from bdense.diffusion.denoiser import build_denoiser
from bdense.errors import InputError
from bdense.models.latents import drawn_shape
from bdense.models.store import load_model
from bdense.models.zoo import CONVERTED_CHECKPOINTS, HUB_CHECKPOINTS, PROMPT_SETS

pytest.importorskip("diffusers", reason="needs the diffusers extra")
LATENT = {
    name: each
    for name, each in {**HUB_CHECKPOINTS, **CONVERTED_CHECKPOINTS}.items()
    if "codec" in each.known
}


@pytest.mark.parametrize(
    ("name", "millions", "side"),
    [
        # Counted of the published networks.
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", 859.5, 512),
        ("facebook/DiT-XL-2-256", 749.8, 256),
        ("ldm-lsun-bedroom-256", 274.1, 256),
    ],
)
def test_their_sizes_are_the_published_ones(name, millions, side):
    known = LATENT[name].known
    with torch.device("meta"):
        teacher = build_denoiser(dict(LATENT[name].architecture))
        assert drawn_shape(teacher, known) == (3, side, side)
    count = sum(p.numel() for p in teacher.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.05)
    assert known["levels"]["sigma_max"] == pytest.approx(teacher.precond.sigma_max, rel=1e-12)
    assert known["guidance"] == bool(teacher.label_dim or teacher.model.text_dim)


def test_what_is_made_by_hand_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("BDENSE_CHECKPOINTS", str(tmp_path))
    with pytest.raises(InputError, match=r"ldm-lsun-bedroom-256.*lsun_bedrooms\.zip.*convert_ldm"):
        load_model("ldm-lsun-bedroom-256")


def test_captions_go_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("BDENSE_CHECKPOINTS", str(tmp_path))
    (published,) = PROMPT_SETS.values()
    published.path.write_text("file_name,text\n1.jpg,a red cat\n2.jpg,a dog\n")
    assert read_prompts(published.name) == ["a red cat", "a dog"]
