"""Tiny models of random weights, saved as the real ones are, for the conditions that need weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


def save(folder: Path, model: Any, **preprocessing: Any) -> Path:
    """`model` and the settings of its images in `folder`."""
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return folder


def seeded(build: Callable[[], Any]) -> Any:
    """What `build` makes, with weights large enough that answers differ from place to place."""
    torch.manual_seed(0)
    model = build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.normal_(0, 1.5 / parameter[0].numel() ** 0.5)
    return model


def dpt(folder: Path) -> Path:
    from transformers import DPTConfig, DPTForDepthEstimation

    config = DPTConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16,
        image_size=64,
        patch_size=16,
        is_hybrid=False,
        use_auxiliary_head=False,
    )
    model = seeded(lambda: DPTForDepthEstimation(config))
    model.head.head[4].bias.data.fill_(20.0)
    return save(folder, model, size={"height": 64, "width": 64}, resample=3, **HALF)


def depth_anything(folder: Path, **more: Any) -> Path:
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    backbone = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
        apply_layernorm=True,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=16,
        neck_hidden_sizes=[4, 8, 16, 16],
        fusion_hidden_size=8,
        head_hidden_size=8,
        **more,
    )
    model = seeded(lambda: DepthAnythingForDepthEstimation(config))
    model.head.conv3.bias.data.fill_(20.0)
    return save(
        folder,
        model,
        size={"height": 56, "width": 56},
        keep_aspect_ratio=True,
        ensure_multiple_of=14,
        resample=3,
        **IMAGENET,
    )


def zoe(folder: Path) -> Path:
    from transformers import BeitConfig, ZoeDepthConfig, ZoeDepthForDepthEstimation

    backbone = BeitConfig(
        image_size=32,
        patch_size=16,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        out_features=["stage1", "stage2", "stage3", "stage4"],
        reshape_hidden_states=False,
        use_relative_position_bias=True,
    )
    config = ZoeDepthConfig(
        backbone_config=backbone,
        neck_hidden_sizes=[4, 8, 16, 16],
        fusion_hidden_size=16,
        bottleneck_features=16,
        num_relative_features=8,
        bin_embedding_dim=8,
        num_attractors=[4, 2, 1, 1],
        bin_configurations=[{"n_bins": 8, "min_depth": 0.001, "max_depth": 10.0, "name": "nyu"}],
    )
    return save(
        folder,
        seeded(lambda: ZoeDepthForDepthEstimation(config)),
        size={"height": 64, "width": 96},
        keep_aspect_ratio=True,
        ensure_multiple_of=32,
        do_pad=True,
        **HALF,
    )


def segformer(folder: Path, classes: int = 150) -> Path:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 8, 16, 16],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
        num_labels=classes,
    )
    model = seeded(lambda: SegformerForSemanticSegmentation(config))
    return save(folder, model, size={"height": 64, "width": 64}, **IMAGENET)


def upernet(folder: Path) -> Path:
    from transformers import ConvNextConfig, UperNetConfig, UperNetForSemanticSegmentation

    backbone = ConvNextConfig(
        hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    config = UperNetConfig(
        backbone_config=backbone, hidden_size=16, auxiliary_in_channels=16, auxiliary_channels=8, num_labels=150
    )
    model = seeded(lambda: UperNetForSemanticSegmentation(config))
    return save(folder, model, size={"height": 64, "width": 64}, **IMAGENET)


def oneformer(folder: Path, classes: int = 133) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import OneFormerConfig, OneFormerForUniversalSegmentation, PreTrainedTokenizerFast, SwinConfig

    backbone = SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        image_size=64,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = OneFormerConfig(
        backbone_config=backbone,
        num_labels=classes,
        num_queries=12,
        hidden_dim=32,
        conv_dim=32,
        mask_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        query_dec_layers=1,
        num_attention_heads=2,
        text_encoder_width=32,
        text_encoder_num_layers=1,
        text_encoder_vocab_size=16,
        text_encoder_context_length=12,
        text_encoder_n_ctx=2,
        task_seq_len=12,
        is_training=False,
    )
    words = {word: index for index, word in enumerate(["<pad>", "the", "task", "is", "semantic", "<unk>"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    model = OneFormerForUniversalSegmentation(config)
    return save(folder, model, size={"shortest_edge": 64, "longest_edge": 128}, **IMAGENET)


def yolos(folder: Path, classes: int = 91) -> Path:
    from transformers import YolosConfig, YolosForObjectDetection

    config = YolosConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=[64, 64],
        patch_size=16,
        num_detection_tokens=6,
        num_labels=classes,
        use_mid_position_embeddings=False,
    )
    model = seeded(lambda: YolosForObjectDetection(config))
    return save(folder, model, size={"shortest_edge": 64, "longest_edge": 128}, **IMAGENET)


def vitpose(folder: Path) -> Path:
    from transformers import VitPoseBackboneConfig, VitPoseConfig, VitPoseForPoseEstimation

    backbone = VitPoseBackboneConfig(
        image_size=[64, 48], hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=1, out_indices=[2]
    )
    config = VitPoseConfig(backbone_config=backbone, num_labels=17, scale_factor=4)
    model = seeded(lambda: VitPoseForPoseEstimation(config))
    return save(folder, model, size={"height": 64, "width": 48}, **IMAGENET)


def hed(folder: Path) -> Path:
    from controlkit.conditions.learned.networks import HED

    folder.mkdir()
    torch.save(seeded(HED).state_dict(), folder / "ControlNetHED.pth")
    return folder


def lineart(folder: Path) -> Path:
    from controlkit.conditions.learned.networks import LineDrawing

    folder.mkdir()
    for seed, name in enumerate(("sk_model.pth", "sk_model2.pth")):
        torch.manual_seed(seed)
        torch.save(LineDrawing().state_dict(), folder / name)
    return folder


def densepose(folder: Path) -> Path:
    folder.mkdir()
    torch.jit.script(_OnePerson()).save(folder / "densepose_r50_fpn_dl.torchscript")
    return folder


class _OnePerson(torch.nn.Module):
    """Finds one person in the right half of any image, whose upper half is part 2 and whose lower half is part 24."""

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        height, width = pixels.shape[1], pixels.shape[2]
        box = torch.tensor([[width // 2, 0, width + 8, height]], dtype=torch.float32)
        coarse = torch.zeros(1, 2, 8, 8)
        coarse[:, 1] = 1.0
        fine = torch.zeros(1, 25, 8, 8)
        fine[:, 2, :4] = 1.0
        fine[:, 24, 4:] = 1.0
        return box, coarse, fine
