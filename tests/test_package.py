"""What importing costs, and that the public names are there."""

import ast
import importlib
import importlib.metadata
import pickle
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import bdense
from bdense.errors import InputError
from tests.small import same_weights, small_teacher


def modules_after(statement: str) -> set[str]:
    """Modules that a fresh interpreter has loaded after ``statement``."""
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_engine_knows_no_service():
    """So that it runs on a machine that has none of them."""
    loaded = modules_after("from bdense import *; import bdense.cli")
    assert "torch" in loaded
    service = {"ray", "optuna", "sqlalchemy", "yaml", "search", "sklearn"}
    assert not loaded & (service | {"torch_fidelity", "torchvision"})


def test_looking_at_a_study_and_listing_knobs_needs_no_torch():
    looking = (
        "search.verbs.show",
        "search.study.summary",
        "search.study.catalogue",
        "search.storage.ledger",
        "search.analysis.surrogate",
        "search.analysis.paired",
        "bdense.diffusion.solvers",
    )
    knobs = "bdense.knobs.knobs_of(bdense.diffusion.solvers.DPMSolverPP)"
    loaded = modules_after(f"import bdense.knobs, {', '.join(looking)}; {knobs}")
    assert not loaded & {"torch", "ray", "sklearn", "scipy"}


def modules_of(command: str, *arguments: str) -> set[str]:
    """Modules that a command has loaded by its end."""
    at_exit = "import atexit; atexit.register(lambda: print(*sys.modules))"
    return modules_after(f"{at_exit}; from {command}.cli import main; main({list(arguments)})")


@pytest.mark.parametrize("command", ["bdense", "search"])
def test_version_of_both_commands(command, capsys):
    """It is asked in scripts, so it must not import torch."""
    main = importlib.import_module(f"{command}.cli").main
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    prog = {"bdense": "bdense", "search": "bdense-search"}[command]
    version = importlib.metadata.version("bdense")
    assert capsys.readouterr().out == f"{prog} {version}\n"
    loaded = modules_of(command, "--version")
    assert f"{command}.cli" in loaded
    assert "torch" not in loaded


def test_help_needs_no_torch():
    asked = "[[], ['sample'], ['fid'], ['reference'], ['convert']]"
    loaded = modules_after(
        "from contextlib import suppress\nfrom bdense.cli import main\n"
        f"for verb in {asked}:\n    with suppress(SystemExit): main([*verb, '--help'])\n"
    )
    assert "bdense.verbs.options" in loaded
    assert not loaded & {"torch", "numpy", "PIL"}


@pytest.mark.parametrize("name", bdense.__all__)
def test_public_names(name):
    thing = getattr(bdense, name)
    assert name.isupper() or thing.__name__ == name
    if callable(thing):
        assert pickle.loads(pickle.dumps(thing)) is thing  # noqa: S301  its own


def test_the_public_names_are_listed_and_known_to_type_checkers():
    assert dir(bdense) == sorted(bdense.__all__)
    tree = ast.parse(Path(bdense.__file__).read_text())
    (guarded,) = (node for node in tree.body if isinstance(node, ast.If))
    imported = {
        alias.asname: node.module
        for node in guarded.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == {name: f"bdense.{home}" for name, home in bdense._HOME.items()}


def test_no_other_names():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = bdense.nothing


SAMPLER = {"num_intervals": 3, "afs": True}


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: bdense.load_model(3), "load_model: source must be str | Path"),
        (lambda: bdense.load_dataset(Path("digits")), "load_dataset: spec"),
        (lambda: bdense.draw_images("student.safetensors", count=4, seed=0), "draw_images: den"),
        (lambda: bdense.Sampler(**SAMPLER | {"num_intervals": 2.5}), "Sampler: num_intervals"),
        (lambda: bdense.Sampler(**SAMPLER, solver="euler"), "Sampler: solver"),
        (lambda: bdense.Schedule(rho="7"), "Schedule: rho must be float, got str"),
        (lambda: bdense.Inputs(dataset="digits"), "Inputs: dataset must be Dataset | None"),
        (lambda: bdense.FixedWeights([1, 1]), "FixedWeights: values"),
        (lambda: bdense.LogLinearWeights(a=True), "LogLinearWeights: a"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_argument_of_a_wrong_type_is_named(call, argument):
    with pytest.raises(InputError, match=re.escape(argument)):
        call()


def test_a_text_stands_for_a_path(tmp_path):
    path = str(tmp_path / "a.safetensors")
    bdense.save_denoiser(path, teacher := small_teacher(), {})
    assert same_weights(bdense.load_denoiser(path)[0], teacher)


def pins(file: Path) -> dict[str, str]:
    """Versions by name; of a lock, whose pins go on in lines of hashes, those with a hash."""
    hashed = r" \\\n    --hash=sha256:[0-9a-f]{64}" if file.suffix == ".lock" else r""
    found = re.findall(rf"^([\w.-]+)==([^ \n]+){hashed}", file.read_text(), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


def test_the_images_locks_hold_what_is_wanted_at_the_versions_of_the_constraints():
    """By `make lock`, which takes the constraints from there; pip itself checks the hashes."""
    root = Path(__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    service = (root / "docker" / "service-requirements.txt").read_text()
    wanted = {
        "service": re.findall(r"^[\w-]+", service, re.MULTILINE),
        "engine": [
            *project["dependencies"],
            *(each for extra in ("search", "diffusers", "lora") for each in extras[extra]),
        ],
        "kuberay": ["ray"],
    }
    constraints = pins(root / "constraints.txt").items()
    for image, requirements in wanted.items():
        file = root / "docker" / f"{image}.lock"
        locked = pins(file)
        assert len(locked) == file.read_text().count("==")
        assert locked.items() <= constraints
        for each in map(Requirement, requirements):
            assert each.specifier.contains(locked[canonicalize_name(each.name)])
        assert "://" not in file.read_text()


def test_the_example_settings_pin_each_base_image_of_its_default_tag():
    root = Path(__file__).parents[1]
    example = (root / ".env.example").read_text()
    found = re.findall(r"^(\w+_IMAGE)=(\S+)@sha256:[0-9a-f]{64}$", example, re.MULTILINE)
    compose = (root / "docker-compose.yml").read_text()
    assert set(found) == set(re.findall(r"\$\{(\w+_IMAGE):-([^}]+)\}", compose))
    assert len(found) == 3
