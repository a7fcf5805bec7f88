"""Image files as data sets: what they give, to the byte, and how bad ones are refused."""

import gzip
import io
import json
import os
import struct
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bdense.data.datasets import image_shape, load_dataset
from bdense.data.names import FORMATS
from bdense.data.readers import read_folder, read_idx, read_idx_images, read_zip
from bdense.errors import InputError
from tests.fuzz import damaged_bytes, damaged_tree, read_or_refused


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(array: np.ndarray, kind: str = "PNG", mode: str | None = None, **options) -> bytes:
    buffer, image = io.BytesIO(), Image.fromarray(array)
    (image.convert(mode) if mode else image).save(buffer, kind, **options)
    return buffer.getvalue()


def folder_of(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def zip_of(path: Path, files: dict[str, bytes]) -> Path:
    """Stored without compression, as EDM's dataset_tool does."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def labels_file(*labels: tuple[str, object]) -> bytes:
    return json.dumps({"labels": [list(pair) for pair in labels]}).encode()


def deep_png(colour_type: int, channels: int) -> bytes:
    """4 x 4 pixels of 16 bits a channel, which Pillow reads but cannot write in colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, colour_type, 0, 0, 0))
    rows = b"".join(b"\0" + noise(8 * channels, seed=y).tobytes() for y in range(4))
    return (
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


RGB, GREY = noise(8, 8, 3), noise(8, 8, seed=1)
PNG = encoded(RGB)


# ---- idx ----


def idx(*shape: int, data: bytes | None = None, kind: int = 8) -> bytes:
    header = bytes((0, 0, kind, len(shape))) + struct.pack(f">{len(shape)}I", *shape)
    return header + (bytes(int(np.prod(shape))) if data is None else data)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_an_idx_file_is_read_row_by_row(tmp_path, pack):
    path = tmp_path / "three"
    path.write_bytes(pack(idx(2, 3, 4, data=bytes(range(24)))))
    array = read_idx(path)
    assert array.dtype == torch.uint8
    assert torch.equal(array, torch.arange(24, dtype=torch.uint8).view(2, 3, 4))
    images, labels = read_idx_images(path)
    assert images.shape == (2, 1, 3, 4)
    assert labels is None


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_memory_is_taken_for_what_a_file_holds_alone(tmp_path, pack):
    """Not for the most that it might unpack to, 64 MiB or 100 times its size."""
    (tmp_path / "one").write_bytes(pack(idx(4)))
    tracemalloc.start()
    read_idx(tmp_path / "one")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24


@pytest.mark.parametrize("name", ["t-images-idx3-ubyte", "t-images.idx3-ubyte"])
def test_mnists_labels_are_found_beside_its_images(tmp_path, name):
    (tmp_path / name).write_bytes(idx(2, 3, 4))
    beside = tmp_path / name.replace("images", "labels").replace("idx3", "idx1")
    beside.write_bytes(idx(2, data=bytes([7, 255])))
    labels = read_idx_images(tmp_path / name)[1]
    assert labels.dtype == torch.int64
    assert labels.tolist() == [7, 255]
    beside.write_bytes(idx(3))
    with pytest.raises(InputError, match=r"labels of shape \[3\] for the 2 images of"):
        read_idx_images(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx(3, 4, 4)[:-1], "holds 47 bytes .* 3 x 4 x 4"),
        (idx(3, 4, 4) + b"x", "holds 49 bytes after its header"),
        (idx(3, 4, 4)[:9], "ends inside its header; fetch it again"),
        (idx(3, 4, 4, kind=13), "is not an idx file of bytes: .* '00 00 0d 03', not '00 00 08'"),
        (b"\x89PNG", "is not an idx file of bytes: its 4 bytes begin with '89 50 4e 47'"),
        (b"", "is not an idx file of bytes: its 0 bytes"),
        (
            b"\0\0\x08\x03" + b"\xff" * 12,
            "holds 0 bytes .* 4294967295 x 4294967295 x 4294967295",
        ),
        (gzip.compress(idx(9, 9, 9, data=noise(729).tobytes()))[:-200], "cannot be read: .*ended"),
        (b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + b"\xff" * 40, "cannot be read: Error -3"),
        (idx(5), r"holds an array of \[5\]; images are \[n, H, W\]"),
        (idx(0, 4, 4), r"holds an array of \[0, 4, 4\]"),
    ],
    ids=range(11),
)
def test_a_bad_idx_file_is_named(tmp_path, content, message):
    path = tmp_path / "bad.idx"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"bad\.idx {message}"):
        read_idx_images(path)
    with pytest.raises(InputError, match=r"the idx file \S+/none cannot be read: No such file"):
        read_idx(tmp_path / "none")


# ---- folders ----


def test_a_folder_gives_its_pixels_in_the_order_of_names(tmp_path):
    arrays = {f"{name}.png": noise(5, 7, 3, seed=seed) for seed, name in enumerate("cab")}
    folder_of(tmp_path, {name: encoded(array) for name, array in arrays.items()})
    (tmp_path / "notes.txt").write_text("no image")
    images, labels = read_folder(tmp_path)
    assert (images.dtype, images.shape) == (torch.uint8, (3, 3, 5, 7))
    assert labels is None
    for image, name in zip(images, ["a.png", "b.png", "c.png"], strict=True):
        assert np.array_equal(image.permute(1, 2, 0), arrays[name])


def test_sub_folders_are_classes(tmp_path):
    folder_of(
        tmp_path, {"cat/1.png": PNG, "cat/deep/2.png": PNG, "ant/3.PNG": PNG, "bee/x.txt": b""}
    )
    images, labels = read_folder(tmp_path)
    assert len(images) == 3
    assert labels.tolist() == [0, 1, 1]  # ant, cat: a folder without images is not a class
    folder_of(tmp_path, {"loose.png": PNG})
    assert read_folder(tmp_path)[1] is None
    hidden = {".a.png": b"", ".ipynb_checkpoints/a.png": b"", "__MACOSX/a.png": b""}
    single = folder_of(tmp_path / "single", {"all/1.png": PNG, "all/2.png": PNG, **hidden})
    assert (len(read_folder(single)[0]), read_folder(single)[1]) == (2, None)


def test_links_are_followed_but_not_in_circles(tmp_path):
    folder_of(tmp_path, {"real/a.png": PNG, "real/b.png": PNG})
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "zero").symlink_to(tmp_path / "real")
    assert len(read_folder(linked)[0]) == 2
    (linked / "again").symlink_to(linked)
    with pytest.raises(InputError, match=r"linked leads to \S+linked twice, once as \S+again"):
        read_folder(linked)


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    folder_of(tmp_path, {"a/1.png": PNG, "b/1.png": PNG})
    listed = os.scandir

    def scandir(path: str):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(InputError, match=r"/b cannot be read: Permission denied"):
        read_folder(tmp_path)


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds no images; .*\.bmp, \.jpeg"):
        read_folder(tmp_path)
    with pytest.raises(InputError, match=r"there is no image folder \S+absent$"):
        read_folder(tmp_path / "absent")
    archive = zip_of(tmp_path / "set.zip", {"a.png": PNG})
    with pytest.raises(InputError, match=r"no image folder \S+; zip:\S+set\.zip reads an archive"):
        read_folder(archive)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (encoded(noise(9, 8, 3)), "it is 8 x 9 pixels, RGB, and a.png is 8 x 8 pixels, RGB"),
        (encoded(GREY), "it is 8 x 8 pixels, grey, and a.png is 8 x 8 pixels, RGB"),
    ],
)
def test_mixed_images_are_refused(tmp_path, other, message):
    folder_of(tmp_path, {"a.png": PNG, "b.png": other})
    with pytest.raises(
        InputError, match=rf"image b\.png cannot be used: {message}; add @cropSIDE"
    ):
        read_folder(tmp_path)


# ---- one image ----


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (encoded(GREY), GREY[None]),
        (encoded(GREY, mode="1"), np.asarray(Image.fromarray(GREY).convert("1"))[None] * 255),
        (encoded(np.dstack([GREY, np.full_like(GREY, 255)])), GREY[None]),
        (PNG, RGB.transpose(2, 0, 1)),
        (encoded(RGB, mode="RGBA"), RGB.transpose(2, 0, 1)),
        (encoded(GREY // 64 * 64, mode="P"), np.stack([GREY // 64 * 64] * 3)),
        (encoded(RGB, "WEBP", lossless=True), RGB.transpose(2, 0, 1)),
        (encoded(RGB, "TIFF"), RGB.transpose(2, 0, 1)),
        (encoded(RGB, "BMP"), RGB.transpose(2, 0, 1)),
        (encoded(255 - np.zeros_like(RGB), "JPEG", mode="CMYK"), np.full((3, 8, 8), 255)),
    ],
    ids=("grey", "bilevel", "grey+a", "RGB", "RGB+a", "palette", "webp", "tiff", "bmp", "cmyk"),
)
def test_colour_modes_become_grey_or_rgb(tmp_path, content, expected):
    """The content decides, not the suffix."""
    images, _ = read_folder(folder_of(tmp_path, {"a.png": content}))
    assert np.array_equal(images[0], expected)


def test_a_cameras_preview_is_not_a_second_frame(tmp_path):
    first, preview = (Image.fromarray(np.full((8, 8, 3), v, np.uint8)) for v in (200, 10))
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[preview])
    assert read_folder(tmp_path)[0].unique().tolist() == [200]


def frames(kind: str) -> bytes:
    second = Image.fromarray(noise(8, 8, 3, seed=2))
    return encoded(RGB, kind, save_all=True, append_images=[second])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello", "not an image"),
        (PNG[:40], "not an image|truncated"),
        (encoded(noise(64, 64, 3))[:3000], "truncated"),
        (encoded(noise(64, 64, 3), "JPEG")[:900], "truncated"),
        (encoded(noise(64, 64, 3), "WEBP")[:900], "could not create decoder"),
        (encoded(noise(64, 64, 3), "TIFF")[:900], "truncated"),
        (encoded(np.full((8, 8), 40_000, np.uint16)), "it has more than 8 bits a channel"),
        (encoded(np.full((8, 8), 0.5, np.float32), "TIFF"), "it has more than 8 bits a channel"),
        (deep_png(0, 1), "it has more than 8 bits a channel; convert it to 8"),
        (deep_png(2, 3), "it has more than 8 bits a channel; convert it to 8"),
        (deep_png(4, 2), "it has more than 8 bits a channel; convert it to 8"),
        (deep_png(6, 4), "it has more than 8 bits a channel; convert it to 8"),
        (frames("PNG"), "2 frames"),
        (frames("WEBP"), "it has 2 frames"),
        (frames("TIFF"), "it has 2 frames"),
        (encoded(noise(8, 8, 4)), "transparent pixels"),
        (encoded(noise(8, 8, 2)), "it has transparent pixels"),
        (encoded(np.zeros_like(GREY), mode="P", transparency=0), "it has transparent pixels"),
        (encoded(np.zeros_like(RGB), transparency=(0, 0, 0)), "it has transparent pixels"),
    ],
)
def test_an_image_that_cannot_be_taken_as_it_is_is_named(tmp_path, content, message):
    folder_of(tmp_path, {"b.png": content})
    with pytest.raises(InputError, match=rf": the image b\.png cannot be used: .*({message})"):
        read_folder(tmp_path)


# ---- EDM's archives ----


def test_an_archive_as_edms_dataset_tool_writes_it(tmp_path):
    arrays = [noise(8, 8, 3, seed=seed) for seed in range(3)]
    names = [f"00000/img{index:08d}.png" for index in range(3)]
    files = {name: encoded(array) for name, array in zip(names, arrays, strict=True)}
    labels = labels_file(*zip(names, [6, 9, 0], strict=True))
    path = zip_of(tmp_path / "set.zip", files | {"dataset.json": labels})
    images, found = read_zip(path)
    assert np.array_equal(images.permute(0, 2, 3, 1), np.stack(arrays))
    assert found.dtype == torch.int64
    assert found.tolist() == [6, 9, 0]
    # Likewise as a folder, whose dataset.json precedes its sub-folders.
    images, found = read_folder(folder_of(tmp_path / "set", files | {"dataset.json": labels}))
    assert np.array_equal(images.permute(0, 2, 3, 1), np.stack(arrays))
    assert found.tolist() == [6, 9, 0]


@pytest.mark.parametrize("labels", [{}, {"dataset.json": b'{"labels": null}'}])
def test_an_archive_without_labels(tmp_path, labels):
    path = zip_of(
        tmp_path / "set.zip", {"0/a.png": PNG, "1/b.png": PNG, "__MACOSX/._a.png": b""} | labels
    )
    images, found = read_zip(path)
    assert len(images) == 2
    assert found is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (labels_file(("a.png", 3)), r"has no label for b\.png \(1 of 2 images are missing\)"),
        (b'{"labels": []}', r"has no label for a\.png \(2 of 2 images"),
        (b"{}", "KeyError: 'labels'"),
        (b"[]", "TypeError"),
        (b'{"lab', "JSONDecodeError"),
        (b"\xff\xfe\xfd", "UnicodeDecodeError"),
        (b'{"labels": [1, 2]}', "TypeError: cannot unpack"),
        (b'{"labels": {"a.png": 1}}', "ValueError: too many values"),
        (labels_file(("a.png", 1.5), ("b.png", 0)), "the class 1.5"),
        (labels_file(("a.png", -1), ("b.png", 0)), "the class -1"),
        (labels_file(("a.png", True), ("b.png", 0)), "the class true"),
        (labels_file(("a.png", 10**30), ("b.png", 0)), "the class 1000000000"),
        (b"[" * 10**5, "RecursionError"),
        (labels_file(("a.png", [0.5, 0.5]), ("b.png", 0)), r"the class \[0\.5, 0\.5\]"),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_labels_that_do_not_fit_are_refused(tmp_path, kind, text, message):
    files = {"a.png": PNG, "b.png": PNG, "dataset.json": text}
    make, read = (folder_of, read_folder) if kind == "folder" else (zip_of, read_zip)
    path = make(tmp_path / "set", files)
    with pytest.raises(InputError, match=rf"dataset\.json .*{message}"):
        read(path)


def test_archives_that_cannot_be_read_are_named(tmp_path):
    whole = zip_of(tmp_path / "set.zip", {"a.png": PNG}).read_bytes()
    at = whole.find(PNG)
    for content, message in (
        (b"no archive", "the image archive .*bad.zip cannot be read: File is not a zip file"),
        (whole[:-30], "the image archive .*bad.zip cannot be read: File is not a zip file"),
        (
            whole[: at + 60] + bytes(20) + whole[at + 80 :],
            r"bad\.zip: the image a\.png cannot be used: ",
        ),
    ):
        (tmp_path / "bad.zip").write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_zip(tmp_path / "bad.zip")
    (tmp_path / "bad.zip").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match=r"bad\.zip is a Git LFS pointer"):
        load_dataset(f"zip:{tmp_path / 'bad.zip'}")
    with pytest.raises(InputError, match=r"absent\.zip cannot be read: No such file"):
        read_zip(tmp_path / "absent.zip")
    with pytest.raises(InputError, match=r"empty\.zip holds no images"):
        read_zip(zip_of(tmp_path / "empty.zip", {"readme.txt": b""}))


# ---- a folder as it comes ----


def photos(folder: Path) -> Path:
    """Images of every trouble."""
    turned = Image.Exif()
    turned[0x0112] = 6
    files = {
        "a.png": PNG,
        "b.png": encoded(noise(9, 8, 3)),
        "c.png": encoded(noise(9, 8, 3, seed=2)),
        "d.png": encoded(noise(8, 8, 4)),
        "e.png": frames("PNG"),
        "f.png": PNG[:40],
        "g.jpg": encoded(RGB, "JPEG", exif=turned),
    }
    made = folder_of(folder, files)
    os.mkfifo(made / "h.png")
    return made


def test_all_problems_of_a_folder_are_one_summary(tmp_path):
    """Also a pipe, which would wait for a writer for ever."""
    with pytest.raises(InputError) as caught:
        read_folder(photos(tmp_path / "set"))
    first, *lines = str(caught.value).splitlines()
    assert first.endswith("6 of 8 images cannot be used:")
    assert len(lines) == 6
    for name, reason in (
        ("a.png", "8 x 8 pixels, RGB, and b.png is 8 x 9"),  # of which there are two
        ("d.png", "transparent"),
        ("e.png", "2 frames"),
        ("f.png", ""),
        ("g.jpg", "EXIF"),
        ("h.png", "not a file"),
    ):
        assert any(line.startswith(f"- {name}: ") and reason in line for line in lines)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_pipe_is_no_set(tmp_path, kind):
    """As above, it would wait."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe is a device or a pipe"):
        load_dataset(f"{kind}:{tmp_path / 'pipe'}")


def test_images_are_cropped_and_resized_as_edms_tool_does(tmp_path):
    """center-crop of NVlabs/edm's dataset_tool.py, written out here."""
    wide, tall, grey = noise(21, 40, 3), noise(33, 20, 3, seed=2), GREY

    def expected(pixels: np.ndarray) -> np.ndarray:
        height, width = pixels.shape[:2]
        side = min(height, width)
        rows = slice((height - side) // 2, (height + side) // 2)
        columns = slice((width - side) // 2, (width + side) // 2)
        square = Image.fromarray(pixels[rows, columns])
        return np.asarray(square.resize((16, 16), Image.Resampling.LANCZOS))

    files = {"a.png": encoded(grey), "b.png": encoded(wide), "c.png": encoded(tall)}
    folder = folder_of(tmp_path / "set", files)
    found = load_dataset(f"folder:{folder}@crop16")
    assert (found.name, image_shape(f"folder:{folder}@crop16")[1:]) == (
        "folder:set@crop16",
        (16, 16),
    )
    small = found.images.permute(0, 2, 3, 1).numpy()
    # Grey images among colour ones become RGB.
    assert np.array_equal(small[0], np.dstack([expected(grey)] * 3))
    assert np.array_equal(small[1], expected(wide))
    assert np.array_equal(small[2], expected(tall))
    archive = load_dataset(f"zip:{zip_of(tmp_path / 'set.zip', files)}@crop16")
    assert archive.sha256 == found.sha256
    assert load_dataset("digits@crop8").images.shape == load_dataset("digits").images.shape


def test_a_turned_photo_is_put_upright_before_it_is_cropped(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    gradient = np.repeat(np.arange(16, dtype=np.uint8)[:, None] * 16, 16, axis=1)
    folder = folder_of(tmp_path / "set", {"a.png": encoded(gradient, exif=exif)})
    upright = load_dataset(f"folder:{folder}@crop16").images[0, 0].numpy()
    assert np.array_equal(upright, np.rot90(gradient, -1))
    with pytest.raises(InputError, match="EXIF data turn it"):
        load_dataset(f"folder:{folder}")


def test_labels_below_a_top_folder_belong_to_its_images(tmp_path):
    labels = labels_file(("0/a.png", 3), ("0/b.png", 1))
    files = {"top/0/a.png": PNG, "top/0/b.png": PNG}
    path = zip_of(tmp_path / "set.zip", files | {"top/dataset.json": labels})
    assert read_zip(path)[1].tolist() == [3, 1]
    path = zip_of(tmp_path / "other.zip", files | {"top/0/dataset.json": labels, "c.png": PNG})
    with pytest.raises(InputError, match=r"top/0/dataset\.json, which is not at the top"):
        read_zip(path)


def test_labels_below_a_folder_are_not_lost(tmp_path):
    labels = labels_file(("0/a.png", 3), ("0/b.png", 1))
    files = {"top/0/a.png": PNG, "top/0/b.png": PNG, "top/dataset.json": labels}
    folder = folder_of(tmp_path / "set", files)
    with pytest.raises(InputError, match=f"give folder:{folder / 'top'}"):
        read_folder(folder)
    assert read_folder(folder / "top")[1].tolist() == [3, 1]
    (folder / "top/dataset.json").unlink()
    os.mkfifo(folder / "top/dataset.json")
    with pytest.raises(InputError, match=r"dataset\.json is a device or a pipe"):
        read_folder(folder / "top")


def test_what_is_there_twice_is_refused(tmp_path):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", PNG)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.png", encoded(noise(8, 8, 3, seed=2)))
    with pytest.raises(InputError, match=r"2 entries a\.png"):
        read_zip(path)
    labels = labels_file(("a.png", 3), ("a.png", 1))
    with pytest.raises(InputError, match=r"two labels for a\.png"):
        read_folder(folder_of(tmp_path / "set", {"a.png": PNG, "dataset.json": labels}))


def test_the_shape_of_a_set_needs_its_first_image_alone(tmp_path):
    files = {"a.png": PNG, "b.png": b"no image", "dataset.json": b"no labels"}
    folder = folder_of(tmp_path / "set", files)
    for spec in (f"folder:{folder}", f"zip:{zip_of(tmp_path / 'set.zip', files)}"):
        assert image_shape(spec) == (3, 8, 8)
        with pytest.raises(InputError, match=r"b\.png"):
            load_dataset(spec)


# ---- files made to hang or swell, and files damaged at random ----


def test_what_unpacks_without_end_is_refused(tmp_path):
    bomb = tmp_path / "bomb-idx3-ubyte.gz"
    bomb.write_bytes(gzip.compress(idx(70, 1024, 1024)))
    with pytest.raises(InputError, match="unpacks to more than"):
        read_idx(bomb)
    text = b'{"labels": null' + b" " * 2**21 + b"}"
    with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", PNG)
        archive.writestr("dataset.json", text)
    folder = folder_of(tmp_path / "set", {"a.png": PNG, "dataset.json": text})
    for read, path in ((read_zip, tmp_path / "set.zip"), (read_folder, folder)):
        with pytest.raises(InputError, match="2097168 bytes, more than 1049600"):
            read(path)


def test_an_image_of_another_size_is_refused_before_it_is_decoded(tmp_path):
    other = bytearray(encoded(noise(8, 8)))
    other[16:24] = struct.pack(">II", 9000, 9000)
    other[29:33] = struct.pack(">I", zlib.crc32(other[12:29]))
    folder = folder_of(tmp_path / "set", {"a.png": encoded(GREY), "b.png": bytes(other)})
    with pytest.raises(InputError, match="9000 x 9000 pixels"):
        read_folder(folder)
    (folder / "a.png").unlink()
    with pytest.raises(InputError, match="9000 x 9000 pixels"):
        read_folder(folder)


SETS = {
    "train-images-idx3-ubyte": ("idx", idx(2, 4, 4)),
    "train-images-idx3-ubyte.gz": ("idx", gzip.compress(idx(2, 4, 4), mtime=0)),
    **{f"a.{kind}": ("folder", encoded(RGB, kind)) for kind in ("png", "bmp", "jpeg", "webp")},
}


@pytest.mark.parametrize("name", SETS)
def test_a_file_damaged_at_random_is_read_or_refused(tmp_path, name):
    kind, content = SETS[name]
    for seed in range(40):
        (tmp_path / name).write_bytes(damaged_bytes(content, seed))
        with read_or_refused(seed):
            load_dataset(f"{kind}:{tmp_path / name if kind == 'idx' else tmp_path}")


def test_an_archive_damaged_at_random_is_read_or_refused(tmp_path):
    labels = json.loads(labels_file(("a.png", 0), ("b.png", 1)))
    for seed in range(40):
        text = json.dumps(damaged_tree(labels, seed)).encode()
        for damage in (bytes, lambda content, seed=seed: damaged_bytes(content, seed)):
            path = zip_of(tmp_path / "set.zip", {"a.png": PNG, "b.png": PNG, "dataset.json": text})
            path.write_bytes(damage(path.read_bytes()))
            with read_or_refused(seed):
                read_zip(path)
