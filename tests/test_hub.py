"""Students on the Hugging Face Hub: pushed, shown with their FID, loaded again."""

import socket

import pytest

import bdense
from bdense.errors import InputError
from bdense.files import sha256_file
from bdense.metrics.classifiers import classifier_path
from bdense.models.folder import export_folder
from bdense.models.store import denoiser_sha256, load_model, save_denoiser
from tests.commands import bdense as command
from tests.commands import done, refused
from tests.hub import TOKEN, Hub
from tests.measured import command as search_command
from tests.measured import refused as search_refused
from tests.small import same_weights, small_teacher
from tests.students import digest, keep
from tests.test_folder import STUDENT

pytest.importorskip("huggingface_hub", reason="needs the hub extra")

PNG = b"\x89PNG"
FID = {
    "value": 2.5,
    "nfe": 4,
    "images": 4096,
    "extractor": "inception",
    "extractor_sha256": "ab" * 32,
    "reference": "cifar10",
    "reference_images": 50_000,
    "seeds": {"evaluation": 0},
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    from huggingface_hub import constants, hf_api

    with Hub() as server:
        usual = constants.ENDPOINT
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(usual, server.url)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server
        server.shutdown()


@pytest.fixture
def folder(tmp_path):
    metadata = STUDENT | {
        "teacher": "google/ddpm-cifar10-32",
        "data": "cifar10",
        "fid": FID,
        "fid_setup": {},
    }
    pictures = {"samples.png": lambda path: path.write_bytes(b"samples")}
    export_folder(tmp_path / "model", small_teacher(), metadata, pictures=pictures)
    return tmp_path / "model"


def test_a_pushed_student_comes_back_also_offline(hub, folder, monkeypatch, tmp_path):
    from huggingface_hub import constants

    assert bdense.push_model(folder, "me/model") == f"{hub.url}/me/model"
    here = {path.name for path in folder.iterdir()}
    assert set(hub.files["me/model"]) == here | {".gitattributes"}
    student, metadata = load_model("me/model")
    assert same_weights(student, small_teacher())
    assert metadata == load_model(folder)[1]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.files.clear()
    assert same_weights(load_model("me/model")[0], student)
    done("sample", "me/model", "--images", 4, "--out", tmp_path / "s.png")
    line = refused(command("sample", "me/other", "--out", tmp_path / "x.png"))
    assert "me/other" in line
    assert "HF_HUB_OFFLINE" in line


def test_the_page_shows_the_fid_with_its_conditions(hub, folder):
    from huggingface_hub import ModelCard

    bdense.push_model(folder, "me/model")
    card = ModelCard(hub.files["me/model"]["README.md"].decode())
    data, (result,) = card.data, card.data.eval_results
    assert (data.base_model, data.datasets) == ("google/ddpm-cifar10-32", ["uoft-cs/cifar10"])
    assert (data.license, data.library_name) == ("cc-by-4.0", "bdense")
    assert (data.pipeline_tag, data.metrics) == ("unconditional-image-generation", ["fid"])
    assert (result.metric_type, result.metric_value) == ("fid", 2.5)
    assert result.dataset_type == "uoft-cs/cifar10"
    assert (result.metric_args["images"], result.metric_args["nfe"]) == (4096, 4)
    local = (folder / "README.md").read_text()
    here, there = '"model"', '"me/model"'
    assert (here in local, there in card.text, here in card.text) == (True, True, False)
    assert "\nbdense sample me/model --images 64" in card.text
    assert "`bdense verify me/model`" in card.text
    assert len(card.text.split()) == len(local.split("\n---\n", 1)[1].split())


def test_a_diffusers_student_opens_as_a_pipeline(hub, tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="needs the diffusers extra")
    from bdense.models.diffusers_export import export_pipeline
    from tests.test_diffusers_export import metadata_of, own, student_of

    student = student_of(tmp_path / "teacher", prediction_type="v_prediction")
    metadata = metadata_of(own(student))
    export_folder(
        tmp_path / "model",
        student,
        metadata,
        pictures={"samples.png": lambda path: path.touch()},
        finish=lambda place: export_pipeline(place / "diffusers", student, metadata),
    )
    bdense.push_model(tmp_path / "model", "me/model")
    pipeline = diffusers.DiffusionPipeline.from_pretrained("me/model", cache_dir=tmp_path / "c")
    expected = student.model.unet.state_dict()
    found = pipeline.unet.state_dict()
    assert all(value.equal(found[name]) for name, value in expected.items())
    assert same_weights(load_model("me/model")[0], student)


def test_a_student_of_latents_opens_as_a_pipeline(hub, tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers", reason="needs the diffusers extra")
    pytest.importorskip("transformers", reason="needs the diffusers extra")
    from tests.latent_folders import new_stable_diffusion
    from tests.test_latent_export import sampler_on, served_metadata, student_of

    cache = str(tmp_path / "modules")
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", cache)
    teacher = new_stable_diffusion(tmp_path / "teacher")
    student, metadata = student_of(teacher)
    metadata |= served_metadata([sampler_on(student)])
    save_denoiser(tmp_path / "student.safetensors", student, metadata)
    place = ("--pipeline", teacher, "--out", tmp_path / "model", "--push", "me/latents")
    done("export", tmp_path / "student.safetensors", *place)
    assert hub.files["me/latents"]["samples.png"].startswith(PNG)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        "me/latents", trust_remote_code=True, cache_dir=tmp_path / "c"
    )
    assert type(pipeline.scheduler).__name__ == "StudentScheduler"
    found = pipeline.unet.state_dict()
    assert all(value.equal(found[name]) for name, value in student.model.unet.state_dict().items())
    page = hub.files["me/latents"]["README.md"].decode()
    assert "pipeline_tag: text-to-image" in page
    section = page.split("## With diffusers")[1]
    assert 'from_pretrained("me/latents", trust_remote_code=True)' in section
    assert "read it first" in section
    # Autoencoder and text encoder are there too, and in the folder's own pipeline here.
    asked = ("--prompt", "a three", "--images", 2, "--out")
    done("sample", "me/latents", *asked, tmp_path / "there.png")
    done("sample", tmp_path / "model", *asked, tmp_path / "here.png")
    assert (tmp_path / "there.png").read_bytes() == (tmp_path / "here.png").read_bytes()


def test_a_student_s_file_is_exported_and_pushed(hub, tmp_path):
    known = FID | {"extractor": "digits-classifier", "reference": "digits"}
    classifier = classifier_path("digits-classifier", tmp_path)
    classifier.write_bytes(b"weights")
    known["extractor_sha256"] = sha256_file(classifier)
    file, model = tmp_path / "student.safetensors", tmp_path / "here"
    save_denoiser(file, small_teacher(), STUDENT | {"data": "digits", "fid": known})
    asked = ("export", file, "--push", "me/model", "--cache", tmp_path, "--out")
    assert done(*asked, model).split() == [str(model), f"{hub.url}/me/model"]
    student, metadata = load_model("me/model")
    assert same_weights(student, small_teacher())
    assert metadata["fid"] == known
    assert hub.files["me/model"]["extractor.safetensors"] == b"weights"
    assert b"\n# model\n" in hub.files["me/model"]["README.md"]
    assert hub.files["me/model"]["samples.png"].startswith(PNG)
    assert "me/model has files already" in refused(command(*asked, tmp_path / "again"))
    assert not (tmp_path / "again").exists()
    assert "push_model(FOLDER, 'me/new')" in refused(
        command("export", file, "--push", "me/new", "--out", model)
    )
    lora = refused(command("export", file, "--push", "me/new", "--lora", "--out", tmp_path / "l"))
    assert lora.startswith("--push ")


def test_an_export_is_pushed_as_a_new_model(hub, searched, tmp_path):
    keep(searched, 3)
    place = ("export", "digits", tmp_path / "model", "--push", "me/digits")
    answer = search_command(*place)
    assert (answer.status, answer.out.split()[-1]) == (0, f"{hub.url}/me/digits")
    assert denoiser_sha256(load_model("me/digits")[0]) == digest(3)
    line = search_refused(search_command(*place))  # before anything else
    assert "me/digits has files already" in line


@pytest.mark.parametrize("kind", ["folder", "URL"])
def test_an_export_that_could_not_be_pushed_is_kept_and_named(hub, searched, tmp_path, kind):
    keep(searched, 3)
    model = tmp_path / "model"
    place = str(model) if kind == "folder" else model.as_uri()
    hub.full = True
    asked = ("export", "digits", place, "--push", "me/digits")
    lines = [search_command(*asked).err.splitlines()[-1] for _ in range(2)]  # now it exists
    assert denoiser_sha256(load_model(model)[0]) == digest(3)
    for line in lines:
        assert f"the model in {place}" in line
        assert "bdense.push_model(FOLDER, 'me/digits')" in line


def test_what_is_there_is_not_replaced(hub, folder):
    bdense.push_model(folder, "me/model")
    before = dict(hub.files["me/model"])
    with pytest.raises(InputError, match=r"me/model has files already"):
        bdense.push_model(folder, "me/model")
    assert hub.files["me/model"] == before


@pytest.mark.parametrize(
    ("repo", "token", "names"),
    [
        ("me/model", None, "HF_TOKEN"),
        ("me/model", "hf_wrong", "refused"),
        ("model", TOKEN, "OWNER/NAME"),
    ],
)
def test_a_push_that_cannot_be_is_refused_without_the_token(
    hub, folder, monkeypatch, repo, token, names
):
    monkeypatch.delenv("HF_TOKEN")
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(InputError, match=names) as caught:
        bdense.push_model(folder, repo)
    assert "\n" not in str(caught.value)
    assert "hf_" not in str(caught.value)
    assert hub.files == {}


def test_a_push_without_a_network_does_not_speak_of_a_cache(hub, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"cannot push me/model: HF_HUB_OFFLINE is set$"):
        bdense.push_model(folder, "me/model")


def test_what_cannot_be_loaded_is_one_line(hub, tmp_path, monkeypatch):
    def line() -> str:
        answer = command("sample", "me/model", "--out", tmp_path / "x.png")
        assert (answer.status, answer.out) == (2, "")
        return answer.err.splitlines()[-1]  # after the bars of the downloads

    assert "no model of this name" in line()
    hub.files["me/model"] = {"config.json": b'{"model_type": "bert"}', "model.safetensors": b""}
    assert line().startswith("bdense: me/model/config.json describes a bert; this version reads")
    with socket.create_server(("127.0.0.1", 0)) as unused:
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", nobody)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    assert "cannot be reached" in line()


def test_no_file_of_a_model_holds_the_token(hub, folder):
    bdense.push_model(folder, "me/model")
    load_model("me/model")
    for content in hub.files["me/model"].values():
        assert TOKEN.encode() not in content
