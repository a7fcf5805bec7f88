"""Names in the documents exist: modules, functions, fields, files, options."""

import importlib
import json
import os
import re
import runpy
import subprocess
import sys
import tomllib
from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image

from bdense.cli import main
from search.analysis.stop_rule import LargestGain
from search.spec.file import read_spec
from search.study.results import Curve, CurvePoint
from tests.measured import command as search_command
from tests.plugins import install
from tests.studies import resolve_here
from tests.test_help import all_help

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)

DOTTED = re.compile(r"(?<![\w/.-])bdense(?:\.[A-Za-z]\w*)+")
FOLDERS = "bdense|search|tests|docs|studies|benchmarks"
FILE = re.compile(rf"(?<![\w/.-])(?:{FOLDERS})/(?:[\w-]+/)*(?:[\w-]+\.[a-z]+)?(?![\w*])")
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
ANCHOR = re.compile(r"\]\(([^):#\s]*)#([^)\s]+)\)")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z]")
# Commands of others, at the start of a line or of a piece in backticks, with their options.
FOREIGN = re.compile(
    r"(?:^|`)(?:docker|ray|sbatch|scancel|gunicorn|pg_dump|pg_restore|sqlite3|torchrun)\b[^`\n]*",
    re.MULTILINE,
)


def names(text: str) -> set[str]:
    """Dotted names of Python things, such as ``bdense.methods.sfd.distill``."""
    return set(DOTTED.findall(text))


def exists(dotted: str) -> bool:
    """Whether it is a module, or an attribute or field of what its front part names."""
    parts = dotted.split(".")
    thing = importlib.import_module(parts[0])
    for depth, part in enumerate(parts[1:], 2):
        if part in getattr(thing, "__annotations__", {}) and not hasattr(thing, part):
            return depth == len(parts)
        if not hasattr(thing, part):
            try:
                importlib.import_module(".".join(parts[:depth]))
            except ModuleNotFoundError:
                return False
        thing = getattr(thing, part)
    return True


@each_document
def test_names_exist(document):
    assert [name for name in sorted(names(document.read_text())) if not exists(name)] == []


@each_document
def test_files_exist(document):
    text = document.read_text()
    missing = [path for path in FILE.findall(text) if not (ROOT / path).exists()]
    missing += [path for path in LINK.findall(text) if not (document.parent / path).exists()]
    assert missing == []


def anchors(document: Path) -> set[str]:
    """Anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@each_document
def test_anchors_exist(document):
    links = ANCHOR.findall(document.read_text())
    missing = [
        f"{path}#{anchor}"
        for path, anchor in links
        if anchor not in anchors((document.parent / path) if path else document)
    ]
    assert missing == []


@pytest.mark.parametrize(
    "document", [d for d in DOCUMENTS if d.name != "CHANGELOG.md"], ids=lambda path: path.name
)
def test_options_exist(document):
    """The changelog names options that are gone."""
    scripts = "".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))
    known = set(OPTION.findall(all_help() + scripts))
    ours = FOREIGN.sub("", document.read_text())
    assert sorted(set(OPTION.findall(ours)) - known) == []


RECIPE = re.compile(r"^```(python|toml|yaml)\n# ([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


# What the commands of docs/your-own-model.md take too long with, and what the test runs them with.
SMALLER = {
    r"--kimg \d+": "--kimg 0.016 --batch 16",
    r"--images \d+": "--images 16",
    r"--nfe 32": "--nfe 2",
    r"(STEPS = .*) 2000": r"\1 2",
}


def test_the_site_is_whole(tmp_path):
    """Every link of every page leads somewhere, and no page asks another server for its parts."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    done = subprocess.run(
        [*command, "--site-dir", tmp_path], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    pages = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.html")}
    assert {
        "index.html",
        "cli.html",
        *(f"{d.stem}.html" for d in DOCUMENTS if d.parent.name == "docs"),
    } <= pages
    parts = re.compile(r"<(?:script|img|link)\b[^>]*(?:src|href)=\"?https?:")
    assert [page for page in pages if parts.search((tmp_path / page).read_text())] == []


def test_the_way_from_ones_own_model_to_a_student(tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers", reason="needs the diffusers extra")
    monkeypatch.chdir(tmp_path)
    resolve_here(monkeypatch)
    network = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    diffusers.DDPMPipeline(network, diffusers.DDPMScheduler()).save_pretrained("my-model")
    Path("photos").mkdir()
    for index in range(3):
        Image.effect_noise((24, 20 + index), 50).convert("RGB").save(f"photos/{index}.png")
    text = (ROOT / "docs/your-own-model.md").read_text()
    for long, short in SMALLER.items():
        text = re.sub(long, short, text)
    for _, name, block in RECIPE.findall(text):
        Path(name).write_text(block)
    made = {"teacher", "plain", "student"}
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if kind == "python":
            runpy.run_path("extractor.py", run_name="__main__")
        for line in [] if kind else block.splitlines():
            command, *arguments = line.split()
            if command == "bdense-search":  # starts processes; the file is what could be wrong
                assert read_spec(Path(arguments[1])).method.options["sigma_max"] == 80
            else:
                assert main(arguments) == 0, line
    assert made == {path.stem for path in tmp_path.glob("*.safetensors")}


# Contract tests of a method that train for a minute.
LONG = "every_knob or two_devices or stopped_and_resumed"


@pytest.mark.parametrize("chosen", [f"not ({LONG})", pytest.param(LONG, marks=pytest.mark.slow)])
def test_the_recipes_run(tmp_path, chosen):
    """Each block is a file; their entry points are installed as pip would."""
    blocks = RECIPE.findall((ROOT / "docs/extending.md").read_text())
    (metadata,) = [text for kind, _, text in blocks if kind == "toml"]
    files = {name: text for kind, name, text in blocks if kind == "python"}
    assert sum("/test_" in name for name in files) == 5
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    groups = tomllib.loads(metadata)["project"]["entry-points"]
    lines = [
        line
        for group, named in groups.items()
        for line in (f"[{group}]", *(f"{name} = {at}" for name, at in named.items()))
    ]
    install(tmp_path, "mine", "\n".join(lines))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *("-k", chosen, str(tmp_path / "mine")),
        ],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",  # networks this small are slower on more
            "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]


# What stands below these is a mapping of the study's own names, or a record of its own.
WHOLE = {
    *("params", "fids", "values", "conditions", "seeds", "others", "prompts", "method"),
    *("kid", "prc", "clip_score"),
}


def keys(told: object, place: str = "") -> set[str]:
    """Where the values of a JSON object stand: ``best.number``, ``confirmed.arms[].mean``."""
    if isinstance(told, list) and told and isinstance(told[0], dict):
        return {key for each in told for key in keys(each, f"{place}[]")}
    if not isinstance(told, dict) or place.rpartition(".")[2] in WHOLE:
        return {place}
    return {key for name, each in told.items() for key in keys(each, f"{place}.{name}".strip("."))}


def _first_cells(rows: str) -> str:
    return "\n".join(re.findall(r"^\| (.*?) \| ", rows, re.MULTILINE))


def test_the_json_of_status_and_best_is_documented_key_by_key(request):
    """A search of branch weights with a confirmation, and one of a program's weights."""
    text = (ROOT / "docs/running.md").read_text().partition("## Results for scripts")[2]
    tables = re.findall(r"^\| key of .*\n\|---\|---\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    status, best = (set(re.findall(r"`([\w.[\]]+)`", _first_cells(rows))) for rows in tables)
    found = set()
    for study, parameters in {"confirmed": ("a", "b"), "losses": ("x", "y")}.items():
        name = request.getfixturevalue(study).name
        told = json.loads(search_command("status", name, "--json").out)
        assert keys(told) == status - {"one_shot"}
        told = json.loads(search_command("best", name, "--json").out)
        for parameter in parameters:
            del told["best"][parameter]
        told["best"]["NAME"] = None
        (baseline, *_) = told["baselines"].values()
        assert baseline.keys() - {"number", "weights"} <= told["best"].keys()
        told["baselines"] = {"NAME": None}
        found |= {re.sub(r"\.vs_\w+", ".vs_NAME", key) for key in keys(told)}
    # What these two studies do not have.
    gain = LargestGain(arm="plain", gain=0.1, least_difference=0.2, trials=16)
    point = CurvePoint(params={"a": 0.0}, coordinates=[0.0], fid=3.0)
    more = {"ended_early": asdict(gain), "confirmed": {"method": {}, "arms": [{"values": {}}]}}
    more["one_shot"] = Curve(axes=["a"], points=[point], conditions={}).as_dict()
    of_some = ("prompts", "guidance", "decoded", "weights_plot", "kid", "prc", "clip_score")
    more["best"] = dict.fromkeys(of_some)
    found |= keys(more)
    parts = {key.rpartition(".")[0] for key in found} | {"confirmed", "one_shot"}
    assert found <= best
    assert best <= found | parts
