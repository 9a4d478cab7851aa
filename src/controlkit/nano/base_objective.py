"""The objective of nano's text encoder and UNet, trained together."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from controlkit.bases.base import Base
from controlkit.bases.defaults import DEFAULTS_KEY, NANO_DEFAULTS
from controlkit.bases.identity import network_key
from controlkit.bases.load import load_base
from controlkit.bases.schedules import VariancePreserving
from controlkit.bases.stable_diffusion import StableDiffusion
from controlkit.bases.text import token_ids
from controlkit.errors import UserError
from controlkit.files import write_json
from controlkit.images import contact_sheet, to_images, write_png
from controlkit.nano.drawings import Drawings
from controlkit.nano.icons import COLOURS, STYLES, TRAINED_STYLES, IconSets, caption_of, read_concepts, unused_concepts
from controlkit.nano.recipes import BaseRecipe
from controlkit.sampling.sampler import sample_prompts
from controlkit.training.diffusion import Draw
from controlkit.training.graphs import Graphs
from controlkit.training.objective import Objective
from controlkit.training.precision import uses_bf16
from controlkit.training.processes import print_notes

MAX_TOKENS = 24
_PREVIEW_SEEDS = 3
VOCABULARY = 1200

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "squaredcos_cap_v2",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    # The cosine schedule ends in pure noise, so sampling must start at its last step (Lin et al. 2024, section 3.3).
    "timestep_spacing": "trailing",
    "set_alpha_to_one": True,
    "steps_offset": 1,
}

PREVIEW_PROMPTS = (
    "red apple, noto style, on a blue background",
    "cat face, fluent style, on a white background",
    "sailboat, twemoji style, on a teal background",
    "mushroom, emojione style, on a yellow background",
    "rocket, noto style, on a black background",
    "owl, fluent style, on a green background",
    "hamburger, twemoji style, on a pink background",
    "house, emojione style, on a gray background",
)


class BaseObjective(Objective):
    """v-prediction (Salimans and Ho 2022) on the cached latents of drawings."""

    recipe: BaseRecipe
    not_ahead = ""

    def __init__(self, recipe: BaseRecipe, device: torch.device) -> None:
        self.recipe = recipe
        self.device = device
        sets = IconSets(recipe.icons)
        start = self._start(sets)
        self.vae = start.vae.to(device)
        self.frozen = network_key(self.vae)
        self.tokenizer = start.tokenizer
        self.scheduler_config, self.defaults = start.scheduler_config, start.defaults
        self.trained = nn.ModuleDict({"text_encoder": start.text_encoder, "unet": start.unet}).to(device)
        for network in (start.text_encoder, start.unet):
            network.requires_grad_(True).train()
        self.schedule = VariancePreserving(self.scheduler_config)
        known = None if recipe.concepts is None else read_concepts(recipe.concepts)
        icons = sets.select(styles=TRAINED_STYLES, held_out=False, drawable=True, sets=3, concepts=known)
        if not icons:
            raise UserError(
                f"none of the concepts in {recipe.concepts} is in three sets of {recipe.icons}", "empty-data"
            )
        if known is not None and recipe.concepts is not None:
            reasons = "unknown, held out, in fewer than three icon sets, or in an excluded group"
            print_notes(unused_concepts(recipe.concepts, known, {icon.concept for icon in icons}, reasons))
        self.drawings = Drawings(
            [icon for icon in icons if icon.style in (recipe.styles or TRAINED_STYLES)],
            recipe.variants,
            recipe.seed,
            encode=lambda x: self.vae.encode(x.to(device)).latent_dist.mode() * self.vae.config.scaling_factor,
            key=self.frozen,
            least_scale=recipe.least_scale,
        )
        self.graphs = Graphs(recipe.graphs, device, bf16=uses_bf16(recipe, device), unsuitable=_no_graph(recipe))
        self._predict = self.graphs.function(_Prediction(start.unet))

    @property
    def base_runs(self) -> str:
        return self.graphs.words

    def prepare(self, step: int) -> tuple[Tensor, Tensor, Draw]:
        """Latents in float16, token ids, and noise with times."""
        chosen, prompts = self._sample(step)
        z = self.drawings.latents[torch.from_numpy(chosen[self.local_slice])]
        ids = token_ids(self.tokenizer, prompts[self.local_slice], MAX_TOKENS)
        return z, ids, self.draw(self.schedule, z.shape[1:], self.torch_generator(step))

    def loss(self, step: int) -> Tensor:
        z, ids, drawn = self.prepared(step, self.device)
        text = self.trained["text_encoder"](ids)[0]
        noisy = self.noised(self.schedule, z.float(), drawn)
        return self.diffusion_loss(noisy, self._predict(noisy.x_t, noisy.t, text))

    def samples(self, step: int) -> list[str]:
        return [f"drawing {index}: {prompt!r}" for index, prompt in zip(*self._sample(step), strict=True)]

    def _sample(self, step: int) -> tuple[np.ndarray, list[str]]:
        """Indices and prompts of the drawings of a step, over all processes."""
        rng = self.numpy_generator(step)
        chosen = rng.integers(len(self.drawings), size=self.global_batch)
        return chosen, [self.drawings.prompt(int(index), rng, self.recipe.prompt_drop) for index in chosen]

    def preview(self, step: int, folder: Path) -> dict[str, float]:
        try:
            self._preview(self._base(), folder / f"{step:07d}.png")
        finally:  # building a base freezes its networks
            for network in (self.trained["text_encoder"], self.trained["unet"]):
                network.requires_grad_(True).train()
        return {}

    def _preview(self, base: Base, path: Path) -> None:
        seeds = range(_PREVIEW_SEEDS)
        batches = sample_prompts(
            base,
            prompts=[prompt for prompt in PREVIEW_PROMPTS for _ in seeds],
            seeds=[*seeds] * len(PREVIEW_PROMPTS),
        )
        images = [image for batch in batches for image in to_images(batch)]
        rows = [images[seed::_PREVIEW_SEEDS] for seed in seeds]
        write_png(path, contact_sheet(rows, cell=96))

    def save(self, folder: Path, step: int) -> list[Path]:
        """Write a diffusers folder into `folder/base`."""
        base = self._base()
        out = folder / "base"
        save_base(base, out)
        return [out]

    def _start(self, sets: IconSets) -> Base:
        """The base from which training starts: the recipe's, or new networks with the trained autoencoder."""
        if self.recipe.start is not None:
            self._note_unused_settings()
            return load_base(self.recipe.start)
        assert self.recipe.autoencoder is not None  # the recipe checks that one is set
        vae = _trained_autoencoder(self.recipe.autoencoder)
        tokenizer = train_tokenizer([caption_of(icon.concept) for icon in sets.icons if not icon.held_out])
        torch.manual_seed(self.recipe.seed)
        text_encoder, unet = build_networks(self.recipe, len(tokenizer), vae)
        return StableDiffusion(
            name="nano",
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            unet=unet,
            scheduler_config=SCHEDULER,
            defaults=NANO_DEFAULTS,
        )

    def _note_unused_settings(self) -> None:
        """Note settings of the recipe that the base from which it starts overrides."""
        defaults = {field.name: field.default for field in dataclasses.fields(self.recipe)}
        settings = ("channels", "attention", "text_width", "text_layers")
        unused = [name for name in settings if getattr(self.recipe, name) != defaults[name]]
        if unused:
            print_notes([f"{', '.join(unused)} of the recipe are not used: those of {self.recipe.start} are"])

    def _base(self) -> Base:
        return StableDiffusion(
            name="nano",
            tokenizer=self.tokenizer,
            text_encoder=self.trained["text_encoder"],
            vae=self.vae,
            unet=self.trained["unet"],
            scheduler_config=self.scheduler_config,
            defaults=self.defaults,
        )


class _Prediction(nn.Module):
    """A UNet's prediction, as a function of tensors only."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return self.unet(x_t, t, encoder_hidden_states=text, return_dict=False)[0]


def _no_graph(recipe: BaseRecipe) -> str:
    """Why the trained UNet cannot run as a CUDA graph; empty if it can."""
    if (recipe.gradient_accumulation_steps or 1) > 1:
        return "gradient_accumulation_steps adds to gradients that the next replay overwrites"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return "several processes average the gradients of the UNet"
    return ""


def train_tokenizer(captions: Sequence[str]) -> CLIPTokenizer:
    """A CLIP tokenizer (lower case, byte pairs, `</w>`) whose merges are learned from `captions`."""
    from tokenizers import Tokenizer, models, trainers

    empty = CLIPTokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        end_of_word_suffix="</w>",
        initial_alphabet=[chr(code) for code in range(ord("!"), ord("~") + 1)],
        show_progress=False,
    )
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = empty.backend_tokenizer.normalizer
    learner.pre_tokenizer = empty.backend_tokenizer.pre_tokenizer
    words = [f"{style} style, on a {colour} background" for style in STYLES for colour in COLOURS]
    learner.train_from_iterator([*captions, *words], trainer)
    learned = json.loads(learner.to_str())["model"]
    vocabulary = dict(learned["vocab"])
    for letter in [chr(code) for code in range(ord("!"), ord("~") + 1)]:
        vocabulary.setdefault(f"{letter}</w>", len(vocabulary))
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in learned["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def build_networks(
    recipe: BaseRecipe, vocabulary: int, vae: AutoencoderKL
) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    """A new text encoder and UNet that match the autoencoder."""
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=recipe.text_width,
            intermediate_size=4 * recipe.text_width,
            num_hidden_layers=recipe.text_layers,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            hidden_act="quick_gelu",
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
            projection_dim=recipe.text_width,
        )
    )
    down = tuple("CrossAttnDownBlock2D" if has else "DownBlock2D" for has in recipe.attention)
    up = tuple("CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(recipe.attention))
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    unet = UNet2DConditionModel(
        sample_size=64 // factor,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        block_out_channels=recipe.channels,
        layers_per_block=1,
        down_block_types=down,
        up_block_types=up,
        cross_attention_dim=recipe.text_width,
        attention_head_dim=8,
        norm_num_groups=16,
    )
    return text_encoder, unet


def save_base(base: Base, out: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write `base` as a diffusers folder for `StableDiffusionPipeline.from_pretrained`."""
    for name, network in (("vae", base.vae), ("unet", base.unet), ("text_encoder", base.text_encoder)):
        plain = nn.Module.to(copy.deepcopy(network), "cpu", dtype)
        plain.save_pretrained(out / name, safe_serialization=True)
        path = out / name / "config.json"
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)  # where the base was loaded from on this machine
        if name == "text_encoder":
            # transformers loads in the dtype of this file, diffusers in float32; in one pipeline they must agree.
            config["dtype"] = "float32"
        write_json(path, config)
    base.tokenizer.save_pretrained(out / "tokenizer")
    write_json(out / "scheduler" / "scheduler_config.json", base.scheduler_config)
    write_json(
        out / "model_index.json",
        {
            "_class_name": "StableDiffusionPipeline",
            **({DEFAULTS_KEY: base.defaults} if base.defaults else {}),
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )


def _trained_autoencoder(run: str) -> AutoencoderKL:
    folder = Path(run) / "vae"
    if not folder.is_dir():
        raise UserError(
            f"no autoencoder in {folder}; train one first: controlkit train recipes/nano/autoencoder.yaml",
            "missing-file",
        )
    return AutoencoderKL.from_pretrained(folder).eval().requires_grad_(False)
