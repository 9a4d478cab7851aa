"""Hashes that identify weights, configurations and tokenizers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from controlkit.files import sha256_of, sha256_of_all


def network_key(network: nn.Module) -> str:
    """Hash of the weights and the configuration of a diffusers or transformers network."""
    config: Any = network.config
    settings = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    # Batch norms normalise by buffers. Others, such as positions, follow from the configuration.
    statistics = (buffer for name, buffer in network.named_buffers() if name.endswith(("running_mean", "running_var")))
    tensors = chain(network.parameters(), statistics)
    weights = (tensor.detach().cpu().float().contiguous().numpy().tobytes() for tensor in tensors)
    return sha256_of_all(chain([canonical_config(settings)], weights))


def tokenizer_key(tokenizer: Any) -> str:
    """Hash of a tokenizer: vocabulary, padding, length, and the chat template of a language model."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    settings = (getattr(tokenizer, "model_max_length", None), str(getattr(tokenizer, "pad_token", None)))
    template = getattr(tokenizer, "chat_template", None)
    return sha256_of(repr(vocabulary), repr(settings), *([] if template is None else [repr(template)]))


def hash_of_halves(weights: Iterable[Tensor]) -> str:
    """Hash of weights as float16: equal for float32 and float16 copies of a network, different in bfloat16."""
    weights_fp16 = (value.detach().to("cpu", torch.float16).contiguous() for value in weights)
    return sha256_of_all(tensor.numpy().tobytes() for tensor in weights_fp16)[:16]


def canonical_config(config: Mapping[str, Any]) -> str:
    """A configuration as JSON, without entries on its origin, library version and dtype."""
    ignored = ("transformers_version", "dtype", "torch_dtype")
    kept = {name: value for name, value in config.items() if not name.startswith("_") and name not in ignored}
    return json.dumps(kept, sort_keys=True, default=str)
