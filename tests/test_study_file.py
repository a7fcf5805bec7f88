"""Study files: read whole or refused, changed by options, their files found from any folder."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bdense.errors import InputError
from search.errors import SpecError
from search.spec.file import as_yaml, read_spec, read_stored
from tests.studies import PROMOTION, REMOVED, changed, promotion, resolve_here, spec, write

NAMED = {
    "teacher": {"checkpoint": "edm-cifar10-32x32-uncond-vp"},
    "evaluation__reference": "cifar10-32x32",
    "evaluation__extractor": "inception",
    "data": "cifar10",
}


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    resolve_here(monkeypatch)


def refusal(path: Path) -> str:
    with pytest.raises(SpecError) as error:
        read_spec(path)
    return str(error.value)


def test_a_launcher_reads_a_study_without_torch(tmp_path):
    """A child process has it, and hands back what it says or what is wrong."""
    program = (
        "import sys; from pathlib import Path; from search.spec.file import read_spec\n"
        "if __name__ == '__main__':\n"
        "    print(read_spec(Path(sys.argv[1])).resolved.num_branches, 'torch' in sys.modules)\n"
    )
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, tmp_path / "program.py", write(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (found.stdout, found.stderr) == ("4 False\n", "")


DOUBLING = b"a0: &a0 [x]\n" + b"".join(
    b"a%d: &a%d [*a%d, *a%d]\n" % (n, n, n - 1, n - 1) for n in range(1, 40)
)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"name: [unclosed", ":1:16: not valid YAML: "),
        (b"name: x\ndata: digits\nname: y", ":3:1: not valid YAML: the key name is given twice"),
        (b"plan: {seeds: [0], seeds: [1]}", ":1:20: not valid YAML: the key seeds is given twice"),
        (b"- a\n- list", " must be a mapping of keys such as name, data"),
        (b"", " must be a mapping of keys"),
        (b"!!python/object/apply:os.system [true]", ":1:1: not valid YAML: could not determine"),
        (b"\xff\xfe\x00", " cannot be read: "),
        # The place where the reader gave up, not the end of the file.
        (b"[" * 10**5, ":1:101: not valid YAML: it is nested more than 100"),
        (b"- " * 10**5, ":1:201: not valid YAML: it is nested more than 100"),
        (DOUBLING, " stands for more than 10000 values"),
        (b"name: x\ndata: 2026-02-30", ":2:7: not valid YAML: '2026-02-30' is not a valid"),
        (b"a: !!bool maybe", ":1:4: not valid YAML: 'maybe' is not a valid"),
        (b"a: 0x" + b"f" * 5000, ":1:4: not valid YAML: '0xfff"),
        (b"a: " + b"9" * 5000, ":1:4: not valid YAML: '999"),
        (b'a: "\\U00110000"', ": not valid YAML: "),
        (b"a: &a [*a]", " stands for more than 10000 values"),
    ],
    ids=lambda given: given[:20],
)
def test_a_file_that_is_no_study_is_named(tmp_path, content, expected):
    path = tmp_path / "study.yaml"
    path.write_bytes(content)
    assert f"{path}{expected}" in refusal(path)
    assert "\n" not in refusal(path)


def test_a_file_beside_it_is_named(tmp_path):
    path = write(tmp_path)
    other = path.with_name(path.name.replace("yaml", "yml"))
    assert f"{other} cannot be read: " in refusal(other)
    assert f"did you mean {path.name}" in refusal(other)


def test_options_replace_keys_of_sections(tmp_path):
    changed = read_spec(write(tmp_path), {"plan": {"trials": 9}, "method": {"kimg": 5.12}})
    assert changed == spec(plan__trials=9, method__kimg=5.12)
    seeds = read_spec(write(tmp_path, PROMOTION), {"plan": {"seeds": [7]}})
    assert seeds == promotion(plan__seeds=[7])


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"teacher": {"checkpoint": "no.pkl"}}, "teacher.checkpoint: there is no file no.pkl"),
        ({"teacher": {"checkpoint": "edm-cifar"}}, ".* edm-cifar, .*edm-ffhq-64x64-uncond-vp"),
        ({"evaluation__extractor": "torchscript:no.pt"}, "evaluation.extractor: .* no.pt"),
        ({"evaluation__reference": "no.npz"}, "evaluation.reference: .* no.npz, .*cifar10-32x32"),
        ({"prompts": "no.txt"}, "prompts: there is no file no.txt"),
        ({"evaluation__prompts": "/"}, "evaluation.prompts: / is a folder"),
        ({"data": "zip:no.zip"}, "data: there is no file no.zip"),
        ({"data": "folder:nowhere@32"}, "data: there is no folder nowhere"),
        ({"evaluation__reference": "/"}, "evaluation.reference: / is a folder"),
    ],
)
def test_a_missing_file_of_a_study_is_named_and_the_names_there_are(tmp_path, keys, expected):
    path = write(tmp_path, **keys)
    with pytest.raises(SpecError, match=rf"^{path}:\d+:\d+: {expected}"):
        read_spec(path)


def test_files_are_found_from_any_folder(tmp_path, monkeypatch):
    """Workers start in folders of their own."""
    for name in ("features.pt", "refs.npz", "set.zip"):
        (tmp_path / name).write_bytes(b"a file")
    (tmp_path / "images").mkdir()
    path = write(
        tmp_path,
        evaluation__extractor="torchscript:features.pt",
        evaluation__reference="refs.npz",
        data="zip:set.zip",
        **{"teacher": NAMED["teacher"]},
    )
    monkeypatch.chdir(tmp_path)
    found = read_spec(path)
    assert found.evaluation.extractor == f"torchscript:{tmp_path / 'features.pt'}"
    assert found.evaluation.reference == str(tmp_path / "refs.npz")
    assert found.data == f"zip:{tmp_path / 'set.zip'}"
    (tmp_path / "again.yaml").write_text(as_yaml(found))
    monkeypatch.chdir("/")
    assert read_spec(path) == found  # relative to the study's file
    (tmp_path / "elsewhere").mkdir()
    lost = write(tmp_path / "elsewhere", data="zip:set.zip", teacher=NAMED["teacher"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError, match=r"set\.zip; paths are relative to the study's file"):
        read_spec(lost)
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", str(tmp_path))
    # Of a data set that is not used, the content is not looked at.
    home = write(tmp_path / "elsewhere", **NAMED | {"data": "zip:~/set.zip"})
    assert read_spec(home).data == f"zip:{tmp_path / 'set.zip'}"
    assert read_spec(tmp_path / "again.yaml") == found
    monkeypatch.chdir(tmp_path)
    folder = read_spec(write(tmp_path, **NAMED | {"data": "folder:images@32"}))
    assert folder.data == f"folder:{tmp_path / 'images'}@32"
    padded = write(tmp_path, data="digits@16", evaluation__extractor="inception")
    assert read_spec(padded).data == "digits@16"


def test_names_are_no_files_and_stand_for_themselves(tmp_path, monkeypatch):
    """Whether they are downloaded yet or not, and wherever to."""
    monkeypatch.setenv("BDENSE_CHECKPOINTS", str(tmp_path / "public"))
    found = read_spec(write(tmp_path, **NAMED))
    names = (NAMED["teacher"]["checkpoint"], NAMED["evaluation__reference"])
    assert (found.teacher.checkpoint, found.evaluation.reference) == names
    conditions = found.conditions()
    assert (conditions["teacher.checkpoint"], conditions["evaluation.reference"]) == names
    assert not (tmp_path / "public").exists()
    other = spec(**NAMED | {"teacher": {"checkpoint": "edm-cifar10-32x32-cond-vp"}})
    assert other.fingerprint() != found.fingerprint()


def test_a_stored_spec_of_another_version_is_named():
    stored = changed(spec().as_dict(), plan__wings=2)
    with pytest.raises(InputError, match=r"\(digits: plan\.wings .*use the version that laun"):
        read_stored("digits", json.dumps(stored))
    del stored["plan"]
    with pytest.raises(InputError, match=r"\(digits: plan is missing.*use the version that laun"):
        read_stored("digits", json.dumps(stored))


def test_a_stored_study_is_read_where_its_tracker_is_not_installed():
    stored = changed(spec().as_dict(), resources__log=["mine:x"])
    assert read_stored("digits", json.dumps(stored)).resources.log == ("mine:x",)


@pytest.mark.parametrize(
    ("line", "place", "said"),
    [
        ("method: {name: sfd, nfee: 2}", "2:21", "method.nfee is unknown; did you mean nfe"),
        ("name: my study", "2:1", "name must be lower-case"),
        ("weights: {name: log-linear, a: {low: 3, high: 1}}", "2:33", "weights.a.low 3 is above"),
        ("dta: digits", "2:1", "dta is unknown; did you mean data"),
        ("teacher: {checkpoint: ''}", "2:11", "teacher.checkpoint: '' names no file"),
        ("plan: {trials: 1000000000000}", "2:8", "plan.trials must be a whole number from 1 to"),
    ],
)
def test_a_mistake_is_named_by_line_and_column(tmp_path, line, place, said):
    key = line.partition(":")[0]
    path = write(tmp_path, **{key: REMOVED} if key != "dta" else {})
    path.write_text(f"# a study\n{line}\n{path.read_text()}")
    assert f"{path}:{place}: {said}" in refusal(path)
