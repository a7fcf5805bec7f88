"""Another package's members are found by their entry points and run like built-in ones."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bdense.diffusion import STOCHASTIC_SOLVERS
from bdense.methods import METHODS
from bdense.networks import NETWORKS
from bdense.weights import WEIGHT_SPACES
from tests.contracts.weight_spaces import WeightSpaceContract
from tests.example_weights import EndPoint
from tests.plugins import example_package, write_metadata

ROOT = Path(__file__).parents[1]
__all__ = ["example_package"]

# A teacher of the package's network, kept and read back; distilled by its method with its
# weights; drawn from with its solver.
PROGRAM = """
import json, sys, torch
from pathlib import Path
from bdense.diffusion.denoiser import NetworkDenoiser
from bdense.diffusion.sampling import Sampler, draw_images, sampler_from
from bdense.diffusion.solvers import make_solver
from bdense.methods import METHODS
from bdense.methods.distill import distill
from bdense.methods.method import Inputs
from bdense.models.store import load_denoiser, save_denoiser
from bdense.networks import NETWORKS
from bdense.weights import WEIGHT_SPACES

torch.set_num_threads(1)
torch.manual_seed(0)
folder = Path(sys.argv[1])
options = {"img_channels": 1, "img_resolution": 8}
network = NETWORKS["PatchNetwork"].build(options, num_branches=1, outputs=1)
save_denoiser(folder / "teacher.safetensors", NetworkDenoiser(network).eval(), {})
teacher, _ = load_denoiser(folder / "teacher.safetensors")
method = METHODS["long-sfd"]()
config = method.Config.read({"nfe": 2, "batch": 8})
space = WEIGHT_SPACES["end-point"].read({"end": {"low": 2, "high": 4}}, "weights")
point = {"end": 3.0}
(done,) = distill(
    method, teacher, config, lambda: space.weighting(point, method.num_branches(config)),
    Inputs(), folder=folder,
)
student, metadata = load_denoiser(done.path)
sampler = Sampler(num_intervals=3, afs=False, solver=make_solver("renoise", strength=0.5))
images = draw_images(student, sampler_from(sampler.describe()), 2, seed=0)
print(json.dumps({
    "network": type(student.model).__module__,
    "weights": metadata["weights"],
    "images": list(images.shape),
}))
"""


def test_a_package_adds_a_network_a_weight_space_a_solver_and_a_method(tmp_path):
    site, work = tmp_path / "site", tmp_path / "work"
    write_metadata(site, "bdense_example")
    for folder in (work, site / "bdense_example"):
        folder.mkdir()
    for module in ("example_package.py", "example_weights.py"):
        shutil.copy(ROOT / "tests" / module, site / "bdense_example")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(work)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "network": "bdense_example.example_package",
        "weights": [1.0, 1.0, 1.0, 3.0],
        "images": [2, 1, 8, 8],
    }


@pytest.mark.usefixtures("example_package")
def test_its_members_stand_beside_those_built_in():
    for registry, name in (
        (NETWORKS, "PatchNetwork"),
        (STOCHASTIC_SOLVERS, "renoise"),
        (WEIGHT_SPACES, "end-point"),
        (METHODS, "long-sfd"),
    ):
        assert list(registry)[-1] == name
        assert len(registry) > 1


@pytest.mark.usefixtures("example_package")
class TestWeightSpaceOfAPackage(WeightSpaceContract):
    @pytest.fixture
    def space(self):
        return EndPoint()

    @pytest.fixture
    def point(self):
        return {"end": 2.0}

    @pytest.fixture
    def another(self):
        return {"end": 4.0}
