"""One student for several numbers of steps: its new layers, its start, what it must be told."""

from pathlib import Path

import pytest
import torch

from bdense.diffusion.branches import export_branch, widen_head
from bdense.diffusion.denoiser import build_denoiser
from bdense.diffusion.step_condition import with_step_condition
from bdense.errors import InputError, ShapeError
from tests.goldens import close, discover, golden_network, settings, tensors
from tests.networks import image, tiny_denoiser
from tests.small import same_weights

BOTH = pytest.mark.parametrize("network", ["SongUNet", "DhariwalUNet"])
X, SIGMA = image(), torch.tensor([0.1, 1.0, 20.0])


def is_step_conditional(path: Path) -> bool:
    """Whatever it is called, and whether it has classes too."""
    return bool(settings(path)["config"]["step_cond"])


@pytest.mark.golden
@pytest.mark.parametrize("path", discover("*trace*.safetensors", where=is_step_conditional))
def test_the_reference_s_students_answer_as_theirs_do(path):
    """The random layers of a golden file are entries of our state dict; outputs at each N + 1."""
    info, data = settings(path), tensors(path)
    prefix = "probe_out_init.step"
    asked = [int(name.removeprefix(prefix)) for name in data if name.startswith(prefix)]
    assert asked
    student = with_step_condition(golden_network(info["config"]["net"]), seed=0)
    layers = {
        name.removeprefix("init."): value
        for name, value in data.items()
        if name.startswith("init.model.")
    }
    assert layers.keys() == {name for name in student.state_dict() if "step" in name}
    student.load_state_dict(student.state_dict() | layers)
    student = widen_head(student, info["K"])
    with torch.no_grad():
        for num_points in asked:
            golden = data[f"{prefix}{num_points}"]
            for i, sigma in enumerate(data["probe_sigma"]):
                x, labels = data["probe_x"][i], data.get("probe_labels")
                out = student.branches(x, sigma, labels, num_points=num_points)
                close(out if info["K"] > 1 else out[:, 0], golden[i], atol=1e-5)


def test_the_random_start_is_the_reference_s():
    """Xavier without biases for DDPM++ (in the traces: at most 1/4); ADM's have biases."""
    student = with_step_condition(
        tiny_denoiser(model_channels=16, channel_mult=(2, 2)), start="random", seed=0
    ).model
    blocks = [student.enc["8x8_block0"], student.dec["8x8_up"], student.dec["4x4_in0"]]
    for block in blocks:
        assert block.affine_step.weight.shape == (32, 64)
        assert 0.245 < block.affine_step.weight.abs().max() <= 0.25
        assert not block.affine_step.bias.any()
    assert student.map_step_layer0.weight.abs().max() <= (6 / 80) ** 0.5
    adm = with_step_condition(tiny_denoiser("DhariwalUNet"), start="random", seed=0).model
    layer = adm.enc["8x8_block0"].affine_step
    for values in (layer.weight, layer.bias):
        assert 0.5 / 32**0.5 < values.abs().max() <= 1 / 32**0.5


@BOTH
@pytest.mark.parametrize("start", ["teacher", "random"])
def test_the_seed_alone_decides_the_new_layers(network, start):
    teacher = tiny_denoiser(network)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one = with_step_condition(teacher, start=start, seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert same_weights(one, with_step_condition(teacher, start=start, seed=1))
    other = with_step_condition(teacher, start=start, seed=2)
    assert not torch.equal(one.model.map_step_layer0.weight, other.model.map_step_layer0.weight)
    kept = {name: one.state_dict()[name] for name in teacher.state_dict()}
    assert all(torch.equal(kept[name], value) for name, value in teacher.state_dict().items())


def test_new_layers_are_no_copies_of_each_other():
    """Each from draws of its own, also where sizes agree."""
    student = with_step_condition(tiny_denoiser(), start="random", seed=3)
    flat = torch.cat(
        [
            value.flatten()
            for name, value in student.state_dict().items()
            if "step" in name and name.endswith("weight")
        ]
    )
    scaled = flat[flat != 0]
    assert len(scaled.unique()) > 0.99 * len(scaled)


def test_branches_dtype_and_mode_are_kept():
    teacher = widen_head(tiny_denoiser(dropout=0.1), 4).double().train()
    student = with_step_condition(teacher, seed=0)
    assert (student.num_branches, student.training) == (4, True)
    assert {p.dtype for p in student.parameters()} == {torch.float64}
    assert all(p.requires_grad for p in student.parameters())
    exported = export_branch(student)
    assert (exported.num_branches, exported.step_condition) == (1, True)
    again = build_denoiser(student.describe()).double()
    again.load_state_dict(student.state_dict())
    assert again.describe() == student.describe()


@BOTH
def test_the_number_is_given_exactly_where_it_is_taken(network):
    teacher = tiny_denoiser(network)
    with pytest.raises(InputError, match=r"num_points=4 is given to .*, or add the layers with"):
        teacher(X, SIGMA, num_points=4)
    student = with_step_condition(teacher, seed=0)
    with pytest.raises(InputError, match=r"num_points is missing; .*given\(num_points=4\)"):
        student(X, SIGMA)
    with pytest.raises(InputError, match="at least 2; got 1"):
        student(X, SIGMA, num_points=1)
    with pytest.raises(ShapeError, match=r"one number or \[3\], got \[2\]"):
        student(X, SIGMA, num_points=torch.tensor([4, 5]))


def test_a_condition_is_added_once():
    student = with_step_condition(tiny_denoiser(), seed=0)
    with pytest.raises(InputError, match="has a step condition already"):
        with_step_condition(student, seed=0)
