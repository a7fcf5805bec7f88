"""A tiny CLIP of random weights."""

import json
import shutil
from pathlib import Path

import torch


def tiny_clip(folder: Path, tokenizer: Path) -> None:
    """Save it with that tokenizer, which it reads 12 tokens of."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    shutil.copytree(tokenizer, folder, copy_function=shutil.copyfile)
    vocabulary = json.loads((folder / "vocab.json").read_text())
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "initializer_range": 0.5}
    text = sizes | {"vocab_size": len(vocabulary), "max_position_embeddings": 12}
    last = max(vocabulary.values())
    text |= {"eos_token_id": last, "bos_token_id": last - 1, "pad_token_id": last}
    config = CLIPConfig(
        text_config=text,
        vision_config=sizes | {"image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)
