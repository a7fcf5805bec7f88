"""Pickles of EDM and SFD as denoisers: their options, their defaults, their samplers."""

import dataclasses
import json

import pytest
import torch

from bdense.diffusion.preconditioning import IDDPM
from bdense.diffusion.sampling import Sampler, sampler_from
from bdense.diffusion.schedules import Schedule
from bdense.diffusion.step_condition import with_step_condition
from bdense.errors import CheckpointError
from bdense.models.edm import denoiser_from_edm, student_samplers
from bdense.models.pickles import ForeignModule, ForeignNetwork, read_edm_pickle
from bdense.models.store import (
    load_denoiser,
)
from bdense.networks.layers import Linear
from tests.goldens import close, discover, tensors
from tests.networks import tiny_denoiser
from tests.small import same_weights


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "model.safetensors"


def foreign_of(denoiser, class_name, attributes=None, buffers=None, **arguments):
    """What the reader would find in an EDM file of that denoiser."""
    return ForeignNetwork(
        class_name=class_name,
        init_kwargs=arguments,
        state_dict=denoiser.state_dict() | (buffers or {}),
        attributes=attributes or {},
        embedded_source_bytes=0,
        modules={},
    )


SMALL = {
    "img_resolution": 8,
    "img_channels": 2,
    "model_channels": 8,
    "num_blocks": 1,
    "attn_resolutions": [],
}


TRAINING = {
    "num_steps": 5,
    "afs": False,
    "schedule_type": "logsnr",
    "schedule_rho": 7,
    "sigma_min": 0.01,
    "sigma_max": 40.0,
    "use_step_condition": False,
}


def sfd_file_of(denoiser, **training):
    """What the reader would find in an SFD file of that denoiser, or of its teacher's network."""
    modules = {}
    for name, module in denoiser.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float)}
        if isinstance(module, Linear):
            plain["out_features"] = len(module.weight)
        modules[name] = ForeignModule(type(module).__name__, plain)
    modules["model"] = ForeignModule(
        modules["model"].class_name, {"label_dropout": denoiser.model.config.label_dropout}
    )
    attributes = {"img_resolution": 8, "img_channels": 2, "label_dim": denoiser.label_dim}
    return ForeignNetwork(
        class_name="EDMPrecond",
        init_kwargs={},
        state_dict=denoiser.state_dict(),
        attributes=attributes | {"sigma_data": 0.5, "sigma_min": 0.006, "use_fp16": True},
        embedded_source_bytes=0,
        modules=modules,
        training_kwargs=TRAINING | training,
    )


@pytest.mark.golden
@pytest.mark.parametrize("file", discover("edm-*.nosrc.pkl"))
def test_an_edm_pickle_becomes_the_denoiser_it_describes(file):
    """Names and shapes are the reference's own list, and none of them is ours to add."""
    name = file.name.removesuffix(".nosrc.pkl").removesuffix("-np2")
    expected = json.loads((file.parent / "edm-nets.json").read_text())[name]
    denoiser, metadata = load_denoiser(file)
    shapes = {name: list(value.shape) for name, value in denoiser.named_parameters()}
    buffers = {name: list(value.shape) for name, value in denoiser.named_buffers()}
    assert shapes | buffers == expected["state_dict"]
    assert sum(p.numel() for p in denoiser.parameters()) == expected["params"]
    assert denoiser.image_shape == (3, 16, 16)
    arguments = expected["init_kwargs"]
    assert denoiser.model.config.dropout == arguments["dropout"]
    assert denoiser.label_dim == arguments["label_dim"]
    assert type(denoiser.model).__name__ == arguments["model_type"]
    assert denoiser.precond.name == ("vp" if "vp" in name else "edm")
    assert {p.dtype for p in denoiser.parameters()} == {torch.float32}
    assert metadata == {
        "source": file.name,
        "class": "VPPrecond" if "vp" in name else "EDMPrecond",
        "embedded_source_bytes": read_edm_pickle(file).embedded_source_bytes,
    }
    assert not denoiser.training


@pytest.mark.parametrize(
    ("class_name", "network", "precond"),
    [
        ("EDMPrecond", "DhariwalUNet", "edm"),
        ("VPPrecond", "SongUNet", "vp"),
        ("VEPrecond", "SongUNet", "ve"),
        ("iDDPMPrecond", "DhariwalUNet", "iddpm"),
    ],
)
def test_arguments_that_an_edm_file_leaves_out_are_edm_s_defaults(class_name, network, precond):
    """Network class, channel_mult and the preconditioning's options, all unsaid."""
    multipliers = {"SongUNet": (1, 2, 2, 2), "DhariwalUNet": (1, 2, 3, 4)}[network]
    made = tiny_denoiser(
        network, precond=precond, **SMALL | {"channel_mult": multipliers, "dropout": 0.1}
    )
    arguments = SMALL | {"use_fp16": True, "sigma_min": 0.002, "sigma_max": 80.0}
    if precond == "ve":
        arguments = SMALL
    loaded = denoiser_from_edm(foreign_of(made, class_name, **arguments))
    assert loaded.describe() == made.describe()
    assert same_weights(loaded, made)
    assert not loaded.training


@pytest.mark.parametrize(
    ("class_name", "precond", "options"),
    [
        ("EDMPrecond", "edm", {"sigma_data": 1.0}),
        ("VPPrecond", "vp", {"beta_d": 11.0, "beta_min": 0.3, "M": 500, "epsilon_t": 1e-4}),
        ("VEPrecond", "ve", {"sigma_min": 0.01, "sigma_max": 50.0}),
        ("iDDPMPrecond", "iddpm", {"C_1": 0.002, "C_2": 0.01, "M": 100}),
    ],
)
@pytest.mark.parametrize("network", ["SongUNet", "DhariwalUNet"])
@pytest.mark.parametrize("given_as", ["arguments", "attributes"])
def test_the_options_of_an_edm_file_are_its_denoiser_s(
    class_name, precond, options, network, given_as
):
    made = tiny_denoiser(network, precond=precond, label_dim=3, augment_dim=9)
    config = made.describe()["config"] | {"model_type": network}
    values = {"attributes": options} if given_as == "attributes" else options
    loaded = denoiser_from_edm(foreign_of(made, class_name, **config, **values))
    assert loaded.precond.options() == options
    assert loaded.model.describe() == made.model.describe()


def test_the_levels_in_an_iddpm_file_are_compared_and_left():
    made = tiny_denoiser(precond="iddpm")
    arguments = made.describe()["config"] | {"model_type": "SongUNet"}
    u = torch.tensor(IDDPM().levels())
    good = foreign_of(made, "iDDPMPrecond", buffers={"u": u}, **arguments)
    assert same_weights(denoiser_from_edm(good), made)
    for other in (u * 1.1, u[1:]):
        bad = foreign_of(made, "iDDPMPrecond", buffers={"u": other}, **arguments)
        with pytest.raises(CheckpointError, match=r"noise levels u .* are not those of C_1"):
            denoiser_from_edm(bad)


def test_a_foreign_class_or_option_that_is_not_built_is_named():
    made = tiny_denoiser()
    config = made.describe()["config"] | {"model_type": "SongUNet"}
    with pytest.raises(CheckpointError, match=r"CTPrecond is not supported; .* VEPrec"):
        denoiser_from_edm(foreign_of(made, "CTPrecond", **config))
    with pytest.raises(CheckpointError, match="network='UViT'"):
        denoiser_from_edm(foreign_of(made, "EDMPrecond", **config | {"model_type": "UViT"}))
    with pytest.raises(CheckpointError, match=r"do not fit a SongUNet: .*'depth'"):
        denoiser_from_edm(foreign_of(made, "EDMPrecond", **config, depth=3))
    with pytest.raises(CheckpointError, match=r"EDMPrecond do not fit .* missing \['model.dec"):
        denoiser_from_edm(foreign_of(tiny_denoiser(channel_mult=(1,)), "EDMPrecond", **config))


@pytest.mark.golden
@pytest.mark.parametrize("file", discover("sfd-ckpt-*.pkl"))
def test_an_sfd_checkpoint_is_a_student_with_its_sampler(file):
    """The tiny one is its teacher, untrained; it samples at 4 time stamps with AFS."""
    student, metadata = load_denoiser(file)
    assert (metadata["source"], metadata["kind"]) == (file.name, "student")
    assert metadata["sampler"] == {
        "num_intervals": 3,
        "afs": True,
        "schedule": {"kind": "polynomial", "rho": 7.0, "sigma_min": 0.006, "sigma_max": 80.0},
        "solver": "euler",
    }
    assert metadata["training"]["sampler_tea"] == "dpmpp"
    teacher = load_denoiser(file.with_name("edm-song-tiny.nosrc.pkl"))[0]
    assert student.describe() == teacher.describe()
    assert same_weights(student, teacher)
    assert not student.step_condition
    data = tensors(file.with_name("sampling.safetensors"))
    images = sampler_from(metadata["sampler"])(student, data["uncond.latents"])
    close(images, data["uncond.images_f32"], atol=1e-5)


@pytest.mark.golden
@pytest.mark.parametrize("file", discover("sfd-ckpt-*.pkl"))
def test_an_sfd_student_of_several_step_numbers_keeps_its_layers(file):
    """The file's step layers are those of the SFD-v trace before training."""
    foreign = read_edm_pickle(file)
    training = foreign.training_kwargs | {"use_step_condition": True}
    student = denoiser_from_edm(dataclasses.replace(foreign, training_kwargs=training))
    assert student.step_condition
    data = tensors(file.with_name("sfd-trace-sfdv-m3-afs-dpmpp3-nothresh.safetensors"))
    with torch.no_grad():
        for num_points in (4, 7):
            for i, sigma in enumerate(data["probe_sigma"]):
                out = student(data["probe_x"][i], sigma, num_points=num_points)
                close(out, data[f"probe_out_init.step{num_points}"][i], atol=1e-5)


@pytest.mark.parametrize(
    ("network", "options"),
    [
        ("SongUNet", {"augment_dim": 9, "attn_resolutions": (4,), "dropout": 0.13}),
        ("SongUNet", {"label_dim": 3, "num_blocks": 2, "channel_mult": (2, 1, 3)}),
        ("DhariwalUNet", {"label_dim": 3, "num_blocks": 2, "label_dropout": 0.1}),
        (
            "DhariwalUNet",
            {"model_channels": 16, "channel_mult": (1, 4, 8), "attn_resolutions": (4, 2)},
        ),
    ],
)
@pytest.mark.parametrize("step_condition", [False, True])
def test_the_architecture_of_an_sfd_student_is_read_off_its_modules(
    network, options, step_condition
):
    """Every network in such a file has step layers; those of a student without them go."""
    made = with_step_condition(tiny_denoiser(network, **options), start="random", seed=0)
    loaded = denoiser_from_edm(sfd_file_of(made, use_step_condition=step_condition))
    expected = made if step_condition else tiny_denoiser(network, **options)
    assert loaded.describe() == expected.describe()
    assert same_weights(loaded, expected)


def test_the_samplers_of_an_sfd_student():
    schedule = Schedule(kind="logsnr", rho=7.0, sigma_min=0.01, sigma_max=40.0)

    def expected(*num_intervals: int) -> list[Sampler]:
        return [Sampler(num_intervals=n, afs=False, schedule=schedule) for n in num_intervals]

    assert student_samplers(sfd_file_of(tiny_denoiser())) == expected(4)
    # SFD-v's, despite the single number in its options; its second stage is for that number only.
    variable = {"use_step_condition": True}
    assert student_samplers(sfd_file_of(tiny_denoiser(), **variable)) == expected(3, 4, 5, 6)
    second = variable | {"is_second_stage": True, "num_steps": 3}
    assert student_samplers(sfd_file_of(tiny_denoiser(), **second)) == expected(2)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"schedule_type": "discrete"}, "no sampler of this version: schedule kind 'discrete'"),
        ({"num_steps": 1}, "no sampler of this version: "),
        ({"num_steps": None}, "no sampler of this version: "),
    ],
)
def test_sfd_options_without_a_sampler_are_named(training, message):
    foreign = sfd_file_of(tiny_denoiser(), **training)
    with pytest.raises(CheckpointError, match=message):
        student_samplers(foreign)
    del foreign.training_kwargs["afs"]
    with pytest.raises(CheckpointError, match=r"lack 'afs'|name no sampler"):
        student_samplers(foreign)


def test_modules_of_another_network_are_named():
    foreign = sfd_file_of(tiny_denoiser())
    for missing in ("model", "model.map_noise", "model.map_layer1"):
        modules = {name: module for name, module in foreign.modules.items() if name != missing}
        with pytest.raises(CheckpointError, match="are not those of an SFD network"):
            denoiser_from_edm(dataclasses.replace(foreign, modules=modules))
