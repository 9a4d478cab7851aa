"""A BLIP of random weights."""

from __future__ import annotations

from pathlib import Path

import torch


def save_tiny_blip(folder: Path) -> str:
    """Write one to `folder`, as transformers does; its captions are words of `word0` to `word25`."""
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *(f"word{n}" for n in range(26))]
    (folder / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "encoder_hidden_size": 16, "vocab_size": len(words), "max_position_embeddings": 64}
    text |= {"bos_token_id": 5, "pad_token_id": 0, "eos_token_id": 3, "sep_token_id": 3, "is_decoder": True}
    config = BlipConfig(
        text_config={**text, "projection_dim": 16},
        vision_config={**small, "image_size": 32, "patch_size": 16, "projection_dim": 16},
        projection_dim=16,
    )
    BlipForConditionalGeneration(config).save_pretrained(folder)
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)
