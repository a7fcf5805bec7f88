"""The CLIP score against transformers' own logits, and files of captions."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from bdense.data.prompts import read_prompts
from bdense.errors import CheckpointError, InputError
from bdense.metrics.clip_score import load_clip_scorer
from bdense.metrics.records import Metrics
from tests import commands
from tests.clip import tiny_clip
from tests.features import ColourMeans, random_images, scripted, write_images
from tests.latent_goldens import LATENT

pytest.importorskip("transformers", reason="needs the diffusers extra")
# Deprecated, but users have such files.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.:FutureWarning")
CPU = torch.device("cpu")
PROMPTS = ("a red cat", "the dog", "a dog " * 30)
needs_pipeline = pytest.mark.skipif(
    not LATENT.is_dir(), reason=f"no folder {LATENT} (BDENSE_GOLDENS)"
)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A tiny CLIP of random weights, with the tokenizer of a golden file's pipeline."""
    if not LATENT.is_dir():
        pytest.skip(f"no folder {LATENT} (BDENSE_GOLDENS)")
    folder = tmp_path_factory.mktemp("models") / "tiny-clip"
    tiny_clip(folder, LATENT / "pipeline-a/tokenizer")
    return folder


@pytest.mark.parametrize("channels", [1, 3])
def test_it_is_the_cosine_of_transformers_own_logits(clip, channels):
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    scorer, seen = load_clip_scorer(clip, PROMPTS, CPU), random_images(5, channels, side=16)
    model = CLIPModel.from_pretrained(clip).eval()
    tokens = CLIPTokenizer.from_pretrained(clip)(
        list(PROMPTS), padding=True, truncation=True, max_length=12, return_tensors="pt"
    )
    pixels = CLIPImageProcessor.from_pretrained(clip)(
        images=list(seen.expand(-1, 3, -1, -1)), return_tensors="pt"
    )
    with torch.no_grad():
        out = model(**tokens, **pixels)
    cosines = out.logits_per_image / model.logit_scale.exp()
    expected = 100 * torch.stack([cosines[i, i % 3] for i in range(5)]).clamp(min=0)
    assert (expected > 0).any()
    found = scorer.scores(seen, batch=2)
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-4)
    measured = scorer.measure(seen, nfe=2, seeds={"evaluation": 0})
    assert measured.value == pytest.approx(expected.mean().item(), rel=1e-4)
    assert (measured.images, measured.prompts, measured.extractor) == (5, 3, "tiny-clip")


def test_what_is_no_clip_is_refused(clip, tmp_path):
    with pytest.raises(InputError, match="there are none"):
        load_clip_scorer(clip, [], CPU)
    with pytest.raises(CheckpointError, match=r"CLIPTextModel.*needs a CLIPModel"):
        load_clip_scorer(LATENT / "pipeline-a/text_encoder", PROMPTS, CPU)
    with pytest.raises(CheckpointError, match="neither a diffusers folder nor a hub id"):
        load_clip_scorer(tmp_path / "missing", PROMPTS, CPU)
    bare = tmp_path / "bare"
    shutil.copytree(clip, bare)
    torch.save({}, bare / "pytorch_model.bin")
    (bare / "model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"only safetensors are read, not pytorch_model\.bin"
    ):
        load_clip_scorer(bare, PROMPTS, CPU)


@needs_pipeline
def test_the_command_prints_it_beside_the_fid(clip, tmp_path):
    pytest.importorskip("diffusers", reason="needs the diffusers extra")
    table, means = tmp_path / "captions.csv", tmp_path / "features.pt"
    scripted(ColourMeans(), tmp_path)
    table.write_text("id,text\n7,a red cat\n8,the dog\n")
    photos = write_images(tmp_path / "photos", random_images(5, side=16))
    common = (
        "fid",
        LATENT / "pipeline-a",
        "--data",
        f"folder:{photos}",
        "--images",
        4,
        "--nfe",
        2,
    )
    common += ("--extractor", f"torchscript:{means}", "--cache", tmp_path / "cache")
    done = commands.bdense(*common, "--prompts", f"{table}:text", "--clip-score", clip)
    assert done.status == 0, done.err
    found = json.loads(done.out)["clip_score"]
    assert found["images"] == 4
    assert found["prompts"] == 2
    refused = commands.bdense(*common, "--clip-score", clip, "--prompts", f"{table}:caption")
    assert "column caption" in commands.refused(refused)


def test_a_record_is_read_back(clip):
    scorer = load_clip_scorer(clip, PROMPTS, CPU)
    score = scorer.measure(random_images(5), nfe=2, seeds={"evaluation": 0})
    fid = {"value": 1.0, "reference": "digits"} | {
        name: value
        for name, value in score.as_dict().items()
        if name not in ("value", "reference", "prompts")
    }
    stored = json.loads(json.dumps({"fid": fid, "clip_score": score.as_dict()}))
    assert Metrics.read(stored).clip_score == score


# ---- captions ----


@pytest.mark.parametrize(
    ("name", "text", "column"),
    [
        ("a.txt", "one\n\n two \n", None),
        ("a.csv", "text\none\ntwo\n", None),
        ("a.csv", 'id,caption\n1,one\n2,"two"\n', "caption"),
        ("a.csv", "\ufeffid,text\n1,one\n2,two\n", None),
        ("a.tsv", "id\ttext\n1\tone\n2\ttwo\n", "text"),
        ("a.json", '["one", "two"]', None),
        ("a.json", '[{"id": 1, "said": "one"}, {"id": 2, "said": "two"}]', "said"),
        ("a.json", '{"id": [1, 2], "text": ["one", "two"]}', None),
        ("a.jsonl", '{"text": "one"}\n{"text": "two"}\n', None),
    ],
)
def test_prompts_of_lines_and_columns(tmp_path, name, text, column):
    file = tmp_path / name
    file.write_text(text)
    assert read_prompts(f"{file}:{column}" if column else file) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "text", "column", "message"),
    [
        ("a.txt", "\n \n", None, "is empty"),
        ("a.csv", "", None, "is empty"),
        ("a.csv", "id,text\n", None, "is empty"),
        (
            "a.csv",
            "id,caption\n1,one\n",
            None,
            r"text in column text .*columns are id, caption; .*a\.csv:COLUMN",
        ),
        (
            "a.csv",
            "id,caption\n1,one\n",
            "captions",
            "text in column captions .*columns are id, caption",
        ),
        ("a.json", "{", None, "cannot be read"),
        ("a.json", "[1, 2]", None, "a.json is not a table"),
        ("a.json", '{"a": [1], "b": []}', None, "cannot be read"),
        ("missing.csv", None, "text", "cannot be read"),
    ],
)
def test_files_without_prompts_are_refused_in_one_line(tmp_path, name, text, column, message):
    file = tmp_path / name
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError, match=message) as refused:
        read_prompts(f"{file}:{column}" if column else file)
    assert "\n" not in str(refused.value)
