"""Denoise small digits by three losses: a trainer of your own, without a line of bdense.

Of a study it takes what the environment names: a seed, a folder for its checkpoint, a file for its
metric and one for values on the way. Without a study it runs by itself:

    BDENSE_FOLDER=. BDENSE_RESULT=metric.json BDENSE_VALUES=values.jsonl python train.py
"""

import argparse
import json
import os
import signal
import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, l1_loss, mse_loss

NOISE, BATCH, SAVED_EVERY, MEASURED_EVERY = 0.8, 64, 20, 50


def main():
    parser = argparse.ArgumentParser()
    for name, default in (("pixels", 1.0), ("edges", 1.0), ("classes", 0.01)):
        parser.add_argument(f"--{name}", type=float, default=default)
    parser.add_argument("--steps", type=int, default=200)
    asked = parser.parse_args()
    seed = int(os.environ.get("BDENSE_SEED", "0"))
    checkpoint = Path(os.environ["BDENSE_FOLDER"]) / "checkpoint.pt"
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    images, labels = digits()
    train, held_out = slice(None, 1400), slice(1400, None)
    judge = classifier(images[train], labels[train])
    network = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.SiLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.SiLU(),
        nn.Conv2d(16, 1, 3, padding=1),
    )  # fmt: skip
    optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)
    first = restore(checkpoint, network, optimiser)
    # The study asks for an end by SIGTERM: it is noted here, and obeyed between two steps.
    ends = []
    signal.signal(signal.SIGTERM, lambda *_: ends.append(True))
    for step in range(first, asked.steps):
        # Of (seed, step) alone, so that a training that goes on is the one that was not ended.
        draw = torch.Generator().manual_seed(1000 * seed + step)
        chosen = torch.randint(1400, (BATCH,), generator=draw)
        clean, kinds = images[train][chosen], labels[train][chosen]
        output = network(clean + NOISE * torch.randn(clean.shape, generator=draw))
        loss = (
            asked.pixels * mse_loss(output, clean)
            + asked.edges * l1_loss(edges(output), edges(clean))
            + asked.classes * cross_entropy(judge(output.flatten(1)), kinds)
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        done = step + 1
        if done % MEASURED_EVERY == 0 and done < asked.steps:
            rate, _ = measure(network, images, labels, held_out)
            with Path(os.environ["BDENSE_VALUES"]).open("a") as file:
                file.write(json.dumps({"step": done, "value": rate}) + "\n")
        if ends or done % SAVED_EVERY == 0:
            save(checkpoint, network, optimiser, done)
        if ends:
            sys.exit(0)
    rate, error = measure(network, images, labels, held_out)
    result = Path(os.environ["BDENSE_RESULT"])
    scratch = result.with_suffix(".partial")
    scratch.write_text(json.dumps({"error_rate": rate, "mse": error}))
    scratch.replace(result)


def digits():
    """[1797, 1, 8, 8] from -1 to 1, and their classes."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    return images, torch.tensor(found.target)


def classifier(images, labels):
    """A linear one of clean digits, the same for every trial."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        judge = nn.Linear(64, 10)
    optimiser = torch.optim.Adam(judge.parameters(), lr=0.05)
    for _ in range(100):
        optimiser.zero_grad()
        cross_entropy(judge(images.flatten(1)), labels).backward()
        optimiser.step()
    return judge.requires_grad_(False)


def edges(images):
    """Differences of neighbours, [B, 1, 8, 14]."""
    across, down = images.diff(dim=3), images.diff(dim=2)
    return torch.cat([across, down.transpose(2, 3)], dim=3)


@torch.no_grad()
def measure(network, images, labels, held_out):
    """Share of denoised digits whose nearest clean digit is another, and the mean square error."""
    clean = images[held_out]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    output = network(clean + NOISE * noise)
    others = slice(None, held_out.start)
    nearest = torch.cdist(output.flatten(1), images[others].flatten(1)).argmin(1)
    wrong = labels[others][nearest] != labels[held_out]
    return wrong.float().mean().item(), mse_loss(output, clean).item()


def save(path, network, optimiser, done):
    """Atomically: the study may kill this process at any moment."""
    scratch = path.with_suffix(".partial")
    state = {"network": network.state_dict(), "optimiser": optimiser.state_dict(), "done": done}
    torch.save(state, scratch)
    scratch.replace(path)


def restore(path, network, optimiser):
    """The step to go on from: 0 without a checkpoint."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    network.load_state_dict(state["network"])
    optimiser.load_state_dict(state["optimiser"])
    return state["done"]


if __name__ == "__main__":
    main()
