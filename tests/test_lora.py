"""Students that train low-rank adapters, and their export as such, against diffusers' own."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import bdense
from bdense.diffusion.sampling import SETUP
from bdense.errors import CheckpointError, InputError, StoppedError
from bdense.knobs import KnobError
from bdense.methods import METHODS
from bdense.methods.distill import branches_path
from bdense.methods.epd import EPDConfig
from bdense.methods.method import Inputs
from bdense.methods.sfd import SFD, SFDConfig
from bdense.models.diffusers_files import LORA_WEIGHTS
from bdense.models.diffusers_teacher import read_diffusers
from bdense.models.lora_export import export_lora, low_rank
from bdense.models.store import load_model
from bdense.training.loop import Evaluations
from bdense.weights.weighting import FixedWeights
from search.errors import SpecError
from tests import commands
from tests.small import same_weights, small_teacher

pytest.importorskip("diffusers", reason="needs the diffusers extra")
pytest.importorskip("peft", reason="needs the lora extra")

from tests.latent_folders import new_dit, new_stable_diffusion
from tests.studies import spec
from tests.test_diffusers_teacher import new_scheduler, new_unet, save
from tests.test_latent_export import TEXTS, assert_same, drawn_here, opened

RANK, K = 2, 2
HEAD = "model.unet.conv_out.weight"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A network of pixels with attention in its lower level."""
    unet = new_unet(attention_head_dim=8)
    return read_diffusers(save(tmp_path_factory.mktemp("unet"), unet, new_scheduler()))[0]


def config(teacher, **options: object) -> SFDConfig:
    levels = {"sigma_min": teacher.precond.sigma_min, "sigma_max": teacher.precond.sigma_max}
    short = {"nfe": 2, "substeps": K, "batch": 4, "kimg": 0.024, "lr": 2e-3}
    return SFDConfig(**{**short, **levels, "lora_rank": RANK} | options)


def trained(teacher, chosen: SFDConfig, branches: int = K, **options: object):
    weights = lambda: FixedWeights(torch.ones(branches))  # noqa: E731
    (done,) = bdense.distill(SFD(), teacher, chosen, weights, Inputs(), **options)
    return done


def changes(teacher, student) -> dict[str, torch.Tensor]:
    """[m, n] differences of the weights that differ."""
    before, after = teacher.state_dict(), student.state_dict()
    assert before.keys() == after.keys()
    return {
        name: (after[name].double() - value.double()).flatten(1)
        for name, value in before.items()
        if not torch.equal(value, after[name])
    }


def rank_of(change: torch.Tensor) -> int:
    return int(torch.linalg.matrix_rank(change, rtol=1e-4))


# ---- training ----


def test_attention_changes_by_the_rank_and_the_head_in_full(teacher):
    found = changes(teacher, trained(teacher, config(teacher)).student)
    layers = {name.removesuffix(".weight").replace(".0", "").split(".")[-1] for name in found}
    assert layers == {"to_q", "to_k", "to_v", "to_out", "conv_out"}
    assert found.pop(HEAD).norm() > 1e-3
    assert {rank_of(change) for change in found.values()} == {RANK}


def test_the_first_step_is_the_teachers_and_draws_do_not_depend_on_the_global_seed(teacher):
    """B is zero at first: one iteration moves it, and A's gradient is still zero."""
    one = config(teacher, kimg=0.004, lr=1e-12)
    student = trained(teacher, one).student
    assert all(change.abs().max() < 1e-6 for change in changes(teacher, student).values())
    torch.manual_seed(1)
    first = trained(teacher, config(teacher)).student
    torch.manual_seed(2)
    assert same_weights(first, trained(teacher, config(teacher)).student)


@pytest.mark.parametrize("average", [{}, {"tail": 0.5}])
def test_a_resumed_run_ends_as_one_that_was_not(teacher, tmp_path, average):
    chosen = config(teacher, **average)
    whole = trained(teacher, chosen, folder=tmp_path / "whole")

    def stop(plan, report):
        if report.iteration == 2:
            raise StoppedError("stopped")

    with pytest.raises(StoppedError):
        trained(teacher, chosen, folder=tmp_path / "parts", on_iteration=stop)
    saved = tmp_path / "parts/student.training.safetensors"
    with safe_open(saved, framework="pt") as file:
        names = [name for name in file.keys() if not name.startswith("adam.")]  # noqa: SIM118
    assert all("lora_" in name or name.endswith("conv_out.weight") for name in names)
    assert same_weights(whole.student, trained(teacher, chosen, folder=tmp_path / "parts").student)
    with pytest.raises(CheckpointError, match="lora_rank"):
        trained(teacher, config(teacher, lora_rank=3, **average), folder=tmp_path / "parts")


def test_evaluations_on_the_way_see_a_student_without_adapters(teacher):
    seen = []

    def evaluations(stage):
        return Evaluations((3,), lambda after, student: seen.append(student))

    trained(teacher, config(teacher), evaluations=evaluations)
    (student,) = seen
    found = changes(teacher, student)
    del found[HEAD]
    assert {rank_of(change) for change in found.values()} == {RANK}


@pytest.mark.parametrize(
    "method",
    [
        {"name": "progressive", "steps": 2, "until": 1, "updates": 3},
        {"name": "consistency", "steps": 4, "kimg": 0.012},
    ],
    ids=lambda method: method["name"],
)
def test_other_methods_train_adapters_too(teacher, tmp_path, method):
    kind = METHODS[method.pop("name")]()
    known = kind.Config.usual({}, teacher)
    chosen = kind.Config.read({"batch": 4, "lora_rank": RANK, "lr": 1e-3, **known, **method})
    digits = bdense.load_dataset("digits")
    one = lambda: FixedWeights(torch.ones(1))  # noqa: E731
    stages = list(
        bdense.distill(kind, teacher, chosen, one, Inputs(dataset=digits), folder=tmp_path)
    )
    found = changes(teacher, stages[0].student)
    del found[HEAD]
    assert {rank_of(change) for change in found.values()} == {RANK}


def test_other_layers_by_name(teacher):
    student = trained(teacher, config(teacher, lora_targets=("to_v",))).student
    assert {name.split(".")[-2] for name in changes(teacher, student)} == {"to_v", "conv_out"}


# ---- the knobs ----


def test_knobs_at_their_defaults_are_not_part_of_an_identity(teacher, tmp_path):
    """Kept students and stored studies from before the knobs stay theirs."""
    plain = trained(teacher, config(teacher, lora_rank=0, kimg=0.004), folder=tmp_path)
    assert not any("lora" in key for key in plain.metadata["identity"])
    for name in ("consistency", "epd"):
        assert not any("lora" in key for key in METHODS[name].Config().identity())
    assert METHODS["consistency"].Config(lora_rank=3).identity()["lora_rank"] == 3
    study = spec()
    assert not any("lora" in key for key in study.conditions())
    given = spec(method={**study.method.options, "name": "sfd", "lora_rank": 0})
    assert given.fingerprint() == study.fingerprint()


def test_what_cannot_have_adapters_is_named(teacher, tmp_path):
    with pytest.raises(KnobError, match=r"lora_rank 2 is for networks of diffusers.*SongUNet"):
        trained(small_teacher(), SFDConfig(nfe=1, lora_rank=2, substeps=K), K)
    with pytest.raises(KnobError, match=r"names proj, .*it has to_q, to_k, to_v, to_out\.0"):
        trained(teacher, config(teacher, lora_targets=("proj",)))
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    flat = new_unet(**blocks, add_attention=False)
    without = read_diffusers(save(tmp_path / "flat", flat, new_scheduler()))[0]
    with pytest.raises(KnobError, match=r"names to_q, .*it has none"):
        trained(without, config(without))
    with pytest.raises(KnobError, match="to_v need `lora_rank` above 0"):
        config(teacher, lora_rank=0, lora_targets=("to_v",))
    with pytest.raises(KnobError, match="epd, which trains no network"):
        EPDConfig(lora_rank=2)
    with pytest.raises(KnobError, match="lora_rank"):
        config(teacher, lora_rank=-1)


def test_a_study_refuses_them_when_it_is_read():
    with pytest.raises(SpecError, match="lora_rank"):
        spec(method={"name": "sfd", "nfe": 2, "lora_rank": 4})


# ---- export ----


@pytest.mark.parametrize(("rank", "shape"), [(3, (12, 8)), (1, (4, 90)), (0, (5, 5))])
def test_a_product_is_found_again(rank, shape):
    draw = torch.Generator().manual_seed(0)
    b = torch.randn(shape[0], rank, generator=draw, dtype=torch.float64)
    a = torch.randn(rank, shape[1], generator=draw, dtype=torch.float64)
    found = low_rank(b @ a, 1e-9)
    assert found[0].shape == b.shape
    torch.testing.assert_close(found[0] @ found[1], b @ a)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return new_stable_diffusion(tmp_path_factory.mktemp("teachers") / "base")


@pytest.fixture(scope="module")
def student(folder, tmp_path_factory) -> Path:
    """By the command, with its branches."""
    place = tmp_path_factory.mktemp("students")
    (place / "prompts.txt").write_text("\n".join(TEXTS))
    commands.done(
        "distill", folder, "--prompts", place / "prompts.txt", "--keep-branches", "--nfe", 2,
        "--substeps", 2, "--a", 1, "--batch", 4, "--kimg", 0.024, "--lr", 2e-3,
        "--lora-rank", RANK, "--out", place / "s.safetensors",
    )  # fmt: skip
    return place / "s.safetensors"


@pytest.fixture(autouse=True)
def _modules_elsewhere(monkeypatch, tmp_path):
    cache = str(tmp_path / "modules")
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", cache)


def test_diffusers_loads_the_adapters_and_draws_our_images(folder, student, tmp_path, monkeypatch):
    """By the card's own lines, at two guidances."""
    out = tmp_path / "adapters"
    asked = ("export", student, "--pipeline", folder, "--lora", "--out", out)
    assert commands.done(*asked) == f"{out}\n"
    files = sorted(path for path in out.rglob("*") if path.is_file())
    assert [path.relative_to(out).as_posix() for path in files] == [
        "README.md",
        "bdense.json",
        LORA_WEIGHTS,
        "scheduler/scheduler_config.json",
        "scheduler/student_scheduler.py",
    ]
    weights = load_file(out / LORA_WEIGHTS)
    assert {len(value) for name, value in weights.items() if "lora_A" in name} == {4}
    assert "unet.conv_out.lora_B.weight" in weights

    with pytest.raises(CheckpointError, match="only adapters"):
        load_model(out)
    card = (out / "README.md").read_text()
    assert "base_model_relation: adapter" in card
    assert f"| adapters of rank {RANK} " in card
    lines = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "base").symlink_to(folder)
    scope: dict = {}
    exec(lines, scope)
    assert len(scope["images"]) == 2
    pipeline = scope["pipeline"]
    pipeline.set_progress_bar_config(disable=True)

    own, metadata = load_model(student)
    assert metadata["training"]["lora_rank"] == RANK
    prompts = bdense.load_text_encoder(folder).prompts(TEXTS)
    for guidance in (1.0, 3.0):
        call = {"num_inference_steps": 2, "guidance_scale": guidance, "output_type": "latent"}
        found = pipeline(TEXTS, **call, generator=torch.manual_seed(4)).images
        sampler = replace(bdense.samplers_from(metadata)[0], guidance=guidance)
        expected = drawn_here(own, sampler, prompts, 2, 4)
        assert_same(found, expected)
        pipeline.disable_lora()
        plain = pipeline(TEXTS, **call, generator=torch.manual_seed(4)).images
        assert (plain - expected).abs().max() > 1e-3 * expected.abs().max()
        pipeline.enable_lora()


def test_adapters_are_called_at_the_guidance_of_the_fid(folder, student, tmp_path):
    own, metadata = load_model(student)
    export_lora(tmp_path / "out", own, metadata | {SETUP: {"guidance": 3.0}}, teacher=folder)
    call = json.loads((tmp_path / "out/bdense.json").read_text())["pipeline_call"]
    assert call == {"num_inference_steps": 2, "guidance_scale": 3.0}
    card = (tmp_path / "out/README.md").read_text()
    assert card.count("guidance_scale=3.0") == card.count("guidance_scale=") == 2


def test_a_whole_pipeline_has_them_merged(folder, student, tmp_path):
    out = tmp_path / "whole"
    commands.done("export", student, "--pipeline", folder, "--out", out)
    own, metadata = load_model(student)
    call = json.loads((out / "bdense.json").read_text())["pipeline_call"]
    draw = {"generator": torch.manual_seed(4), "output_type": "latent"}
    found = opened(out)(TEXTS, **call, **draw).images
    prompts = bdense.load_text_encoder(folder).prompts(TEXTS)
    assert_same(found, drawn_here(own, bdense.samplers_from(metadata)[0], prompts, 2, 4))


def test_students_that_are_no_adapters_are_refused(folder, student, tmp_path):
    out = tmp_path / "out"

    def refused(*arguments: object) -> str:
        line = commands.refused(commands.bdense("export", *arguments, "--lora", "--out", out))
        assert not out.exists()
        return line

    (tmp_path / "p.txt").write_text("a three")
    short = ("--nfe", 1, "--substeps", 2, "--plain", "--batch", 2, "--kimg", 0.002)
    full = tmp_path / "full.safetensors"
    commands.done("distill", folder, "--prompts", tmp_path / "p.txt", *short, "--out", full)
    line = refused(full, "--pipeline", folder)
    assert "have changed and are in no adapter: model.unet." in line
    assert "lora_rank" in line
    assert "2 branches" in refused(branches_path(student), "--pipeline", folder)

    dit = new_dit(tmp_path / "dit")
    file = tmp_path / "dit.safetensors"
    commands.done("distill", dit, *short, "--lora-rank", 1, "--out", file)
    assert "DiTPipeline loads no adapters" in refused(file, "--pipeline", dit)
    with pytest.raises(InputError, match="exists already"):
        export_lora(tmp_path, *load_model(student), teacher=folder)
