"""From noise to images: exact on Gaussian data, counted, and the same in every batch."""

import math

import pytest
import torch
from PIL import Image

from bdense.diffusion.pictures import image_grid, save_grid, to_uint8
from bdense.diffusion.sampling import (
    Sampler,
    draw_images,
    sampler_from,
)
from bdense.diffusion.schedules import Schedule
from bdense.diffusion.solvers import DDIM, DPMSolverPP, Euler
from bdense.errors import InputError
from bdense.models.store import load_denoiser, save_denoiser
from bdense.randomness import Stream, derive_seed, generator, image_noise, seeded
from tests.small import GaussianDenoiser, small_teacher

LOGSNR = Schedule(kind="logsnr")


def noise(batch: int = 3) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(batch, 1, 4, 4, generator=draw, dtype=torch.float64)


def numbered(count: int, channels: int = 1) -> torch.Tensor:
    """[count, channels, 2, 3] uint8: image i holds 10 i + channel everywhere."""
    values = 10 * torch.arange(count)[:, None] + torch.arange(channels)
    return values.to(torch.uint8)[:, :, None, None].expand(-1, -1, 2, 3)


# ---- walking ----


def test_gaussian_noise_becomes_gaussian_data():
    """D = x / (1 + t^2) leads from T z to T z sqrt((1 + s^2) / (1 + T^2))."""
    sampler = Sampler(num_intervals=200, afs=False, schedule=LOGSNR, solver=DPMSolverPP())
    images = sampler(GaussianDenoiser(), noise())
    expected = 80 * noise() * math.sqrt((1 + 0.006**2) / (1 + 80**2))
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=0)


def test_two_steps_of_a_student_by_hand():
    """Euler multiplies x by 1 - (t - t') t / (1 + t^2) on N(0, 1)."""
    schedule = Schedule(kind="polynomial", rho=1.0, sigma_min=1.0, sigma_max=5.0)
    images = Sampler(num_intervals=2, afs=False, schedule=schedule)(GaussianDenoiser(), noise())
    expected = 5 * noise() * (1 - 2 * 5 / 26) * (1 - 2 * 3 / 10)
    torch.testing.assert_close(images, expected, rtol=1e-12, atol=1e-12)
    # With the analytical first step, of the slope x / sqrt(1 + t^2).
    images = Sampler(num_intervals=2, afs=True, schedule=schedule)(GaussianDenoiser(), noise())
    expected = 5 * noise() * (1 - 2 / math.sqrt(26)) * (1 - 2 * 3 / 10)
    torch.testing.assert_close(images, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", [Euler(), DPMSolverPP(max_order=2)])
@pytest.mark.parametrize(("num_intervals", "afs", "nfe"), [(3, True, 2), (3, False, 3), (1, 0, 1)])
def test_evaluations_are_counted_and_the_first_may_be_free(num_intervals, afs, nfe, solver):
    sampler = Sampler(num_intervals=num_intervals, afs=bool(afs), schedule=LOGSNR, solver=solver)
    denoise = GaussianDenoiser()
    sampler(denoise, noise())
    assert sampler.nfe == nfe
    levels = LOGSNR.grid(num_intervals).tolist()
    assert denoise.asked == levels[num_intervals - nfe : -1]


@pytest.mark.parametrize(("num_intervals", "afs"), [(1, True), (0, False)])
def test_a_sampler_asks_the_network_at_least_once(num_intervals, afs):
    message = f"num_intervals={num_intervals} with afs={afs} leaves no network evaluation"
    with pytest.raises(InputError, match=message):
        Sampler(num_intervals=num_intervals, afs=afs)


def test_samplers_come_back_from_their_descriptions():
    grid = {"num_intervals": 3, "afs": True, "schedule": Schedule().describe()}
    assert sampler_from({**grid, "solver": "euler"}) == Sampler(num_intervals=3, afs=True)
    clipped = Sampler(num_intervals=3, afs=True, solver=DDIM(clip=True))
    assert clipped.describe() == {**grid, "solver": "ddim", "clip": True}
    assert sampler_from({**grid, "solver": "ddim"}).solver == DDIM()
    with pytest.raises(InputError, match="no solver is called 'later'"):
        sampler_from({**grid, "solver": "later"})


# ---- images ----


def test_drawn_images_are_those_of_the_sampler():
    teacher, sampler = small_teacher(), Sampler(num_intervals=3, afs=True)
    latents = image_noise(3, Stream.EVALUATION, range(4), (1, 8, 8))
    expected = to_uint8(sampler(teacher, latents))
    assert torch.equal(draw_images(teacher, sampler, 4, seed=3), expected)


def test_progress_counts_images():
    seen = []
    sampler = Sampler(num_intervals=1, afs=False)
    draw_images(small_teacher(), sampler, 5, seed=0, batch=2, on_image=seen.append)
    assert seen == [2, 4, 5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "number of images must be at least 1, got 0"),
        ({"count": 1, "batch": 0}, "batch must be at least 1, got 0"),
        ({"count": 1, "seed": -1}, "seed must not be negative, got -1"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options, message):
    sampler = Sampler(num_intervals=1, afs=False)
    with pytest.raises(InputError, match=message):
        draw_images(small_teacher(), sampler, **{"seed": 0, **options})


# ---- grids ----


def test_a_grid_is_filled_row_by_row():
    picture = image_grid(numbered(5, channels=3), columns=2)
    assert picture.shape == (6, 6, 3)
    corners = picture[::2, ::3]
    assert corners[:, :, 0].tolist() == [[0, 10], [20, 30], [40, 0]]
    assert corners[:, :, 2].tolist() == [[2, 12], [22, 32], [42, 0]]
    # Each image is one block of 2 x 3.
    assert bool((picture[2:4, 3:6, 1] == 31).all())
    image = torch.arange(6, dtype=torch.uint8).view(1, 1, 2, 3)
    for columns in (1, 10**9):  # no more than there are images
        assert image_grid(image, columns).squeeze(-1).tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(InputError, match="columns must be at least 1, got 0"):
        image_grid(image, columns=0)
    with pytest.raises(InputError, match="one image or more"):
        image_grid(image[:0], columns=1)
    with pytest.raises(InputError, match=r"\[n, C, H, W\], got \[2, 3\]"):
        image_grid(image[0, 0], columns=1)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_a_picture_is_written_with_small_images_enlarged(tmp_path, channels, mode):
    """Three pixels wide: ten times larger, every pixel a square; a grey gap between two."""
    save_grid(numbered(3, channels), tmp_path / "grid.png", columns=2)
    with Image.open(tmp_path / "grid.png") as picture:
        assert (picture.mode, picture.size) == (mode, (62, 42))
        places = ((0, 0), (61, 19), (29, 41), (32, 22), (30, 0), (31, 41), (0, 21))
        colours = [picture.getpixel(place) for place in places]
    first = [(v, v + 1, v + 2) if channels == 3 else v for v in (0, 10, 20)]
    others = [(v, v, v) if channels == 3 else v for v in (0, 96, 96, 96)]  # no image, and gaps
    assert colours == first + others
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


# ---- random numbers ----


def test_noise_of_an_image_is_its_own():
    shape = (1, 2, 2)
    five = image_noise(7, Stream.EVALUATION, range(5), shape)
    assert torch.equal(image_noise(7, Stream.EVALUATION, range(3, 5), shape), five[3:])
    assert len({tuple(image.flatten().tolist()) for image in five}) == 5
    many = image_noise(7, Stream.EVALUATION, range(1000), (16,))
    assert many.mean().item() == pytest.approx(0, abs=0.03)
    assert many.std().item() == pytest.approx(1, abs=0.03)


def test_streams_and_indices_never_share_numbers():
    seeds = {
        derive_seed(seed, stream, *index)
        for seed in (0, 1)
        for stream in Stream
        for index in ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0))
    }
    assert len(seeds) == 2 * len(Stream) * 6
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_seeded_block_leaves_the_callers_state_alone():
    torch.manual_seed(11)
    expected = torch.rand(2)
    torch.manual_seed(11)
    with seeded(torch.device("cpu"), 5, Stream.DROPOUT, 2):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(inside, torch.rand(3, generator=generator(5, Stream.DROPOUT, 2)))


# ---- models that draw ----


OWN = Sampler(num_intervals=3, afs=True)


@pytest.fixture
def student(tmp_path):
    path = tmp_path / "student.safetensors"
    save_denoiser(path, small_teacher(), {"kind": "student", "sampler": OWN.describe()})
    return load_denoiser(path)[0]


def test_a_student_draws_with_its_own_sampler_unless_told(student):
    assert torch.equal(draw_images(student, count=3, seed=1), draw_images(student, OWN, 3, seed=1))


@pytest.mark.parametrize(
    "other",
    [
        Sampler(num_intervals=2, afs=True),
        Sampler(num_intervals=3, afs=False),
        Sampler(num_intervals=3, afs=True, schedule=Schedule(sigma_max=10.0)),
    ],
)
def test_a_student_refuses_levels_it_was_not_distilled_for(student, other):
    with pytest.raises(InputError, match="the student was distilled for NFE 2 with euler"):
        draw_images(student, other, 3, seed=1)


def test_a_teacher_draws_as_it_is_told():
    teacher = small_teacher()
    with pytest.raises(InputError, match="a teacher has no sampler of its own"):
        draw_images(teacher, count=2, seed=0)
    assert draw_images(teacher, OWN, 2, seed=0).shape == (2, 1, 8, 8)
