"""A base's weights under the names of the original code (CompVis/latent-diffusion), as single files hold them."""

from __future__ import annotations

import re

import torch

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def _inside(rest: str) -> str:
    """A name inside a ResNet block or a transformer."""
    head, _, tail = rest.partition(".")
    return f"{_RESNET[head]}.{tail}" if head in _RESNET else rest


def unet_names(config: dict) -> dict[str, str]:
    """Path of a block in diffusers' names => in the original's."""
    paths = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    layers, levels = config["layers_per_block"], len(config["block_out_channels"])
    place = 1
    for level in range(levels):
        for layer in range(layers):
            paths[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{place}.0"
            paths[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{place}.1"
            place += 1
        if level < levels - 1:
            paths[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{place}.0.op"
            place += 1
    place = 0
    for level in range(levels):
        attends = config["up_block_types"][level].startswith("CrossAttn")
        for layer in range(layers + 1):
            paths[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{place}.0"
            paths[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{place}.1"
            if layer == layers and level < levels - 1:
                paths[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{place}.{2 if attends else 1}.conv"
            place += 1
    return paths


def original_unet(unet) -> dict:
    """The UNet's weights under `model.diffusion_model.`."""
    paths = sorted(unet_names(dict(unet.config)).items(), key=lambda item: -len(item[0]))
    made = {}
    for name, value in unet.state_dict().items():
        mine, theirs = next((mine, theirs) for mine, theirs in paths if name.startswith(f"{mine}."))
        made[f"model.diffusion_model.{theirs}.{_inside(name.removeprefix(f'{mine}.'))}"] = value
    return made


def original_vae(vae) -> dict:
    """The autoencoder's weights under `first_stage_model.`."""
    levels = len(vae.config.block_out_channels)
    made = {}
    for name, value in vae.state_dict().items():
        theirs = re.sub(r"(\w+)\.down_blocks\.(\d+)\.resnets\.", r"\1.down.\2.block.", name)
        theirs = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", theirs)
        theirs = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{levels - 1 - int(m[1])}.block.", theirs)
        theirs = re.sub(
            r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"up.{levels - 1 - int(m[1])}.upsample.", theirs
        )
        theirs = re.sub(r"mid_block\.resnets\.(\d)\.", lambda m: f"mid.block_{int(m[1]) + 1}.", theirs)
        theirs = theirs.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if "mid_block.attentions.0." in theirs:
            head, inner = theirs.split("mid_block.attentions.0.")
            part = next(part for part in _VAE_ATTENTION if inner.startswith(f"{part}."))
            theirs = f"{head}mid.attn_1.{_VAE_ATTENTION[part]}.{inner.removeprefix(f'{part}.')}"
            value = value[:, :, None, None] if value.ndim == 2 else value
        made[f"first_stage_model.{theirs}"] = value
    return made


def original_text(text_encoder) -> dict:
    """CLIP's weights under `cond_stage_model.transformer.`."""
    state = text_encoder.state_dict()
    prefix = "" if any(name.startswith("text_model.") for name in state) else "text_model."
    return {f"cond_stage_model.transformer.{prefix}{name}": value for name, value in state.items()}


_SD3 = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj.": "x_embedder.proj.",
    "time_text_embed.timestep_embedder.linear_1.": "t_embedder.mlp.0.",
    "time_text_embed.timestep_embedder.linear_2.": "t_embedder.mlp.2.",
    "time_text_embed.text_embedder.linear_1.": "y_embedder.mlp.0.",
    "time_text_embed.text_embedder.linear_2.": "y_embedder.mlp.2.",
    "context_embedder.": "context_embedder.",
    "norm_out.linear.": "final_layer.adaLN_modulation.1.",
    "proj_out.": "final_layer.linear.",
}
_SD3_BLOCK = {
    "norm1.linear.": "x_block.adaLN_modulation.1.",
    "norm1_context.linear.": "context_block.adaLN_modulation.1.",
    "attn.to_out.0.": "x_block.attn.proj.",
    "attn.to_add_out.": "context_block.attn.proj.",
    "attn.norm_q.": "x_block.attn.ln_q.",
    "attn.norm_k.": "x_block.attn.ln_k.",
    "attn.norm_added_q.": "context_block.attn.ln_q.",
    "attn.norm_added_k.": "context_block.attn.ln_k.",
    "attn2.to_out.0.": "x_block.attn2.proj.",
    "attn2.norm_q.": "x_block.attn2.ln_q.",
    "attn2.norm_k.": "x_block.attn2.ln_k.",
    "ff.net.0.proj.": "x_block.mlp.fc1.",
    "ff.net.2.": "x_block.mlp.fc2.",
    "ff_context.net.0.proj.": "context_block.mlp.fc1.",
    "ff_context.net.2.": "context_block.mlp.fc2.",
}
_SD3_QKV = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
}


def original_sd3(transformer) -> dict:
    """The transformer's weights under `model.diffusion_model.` (Stability-AI/sd3-ref, mmditx.py)."""
    prefix, state = "model.diffusion_model.", transformer.state_dict()
    made, last = {}, len(transformer.transformer_blocks) - 1

    def renamed(name, names):
        mine = next(mine for mine in names if name.startswith(mine))
        return names[mine] + name.removeprefix(mine)

    for name, value in state.items():
        if not name.startswith("transformer_blocks."):
            # diffusers has scale and shift of the last layer in the other order.
            value = torch.cat(value.chunk(2)[::-1]) if name.startswith("norm_out.") else value
            made[prefix + renamed(name, _SD3)] = value
            continue
        _, number, inner = name.split(".", 2)
        if any(inner.startswith(f"{part}.") for parts in _SD3_QKV.values() for part in parts):
            continue
        if int(number) == last and inner.startswith("norm1_context."):
            value = torch.cat(value.chunk(2)[::-1])
        made[f"{prefix}joint_blocks.{number}.{renamed(inner, _SD3_BLOCK)}"] = value
    for number in range(last + 1):
        for theirs, parts in _SD3_QKV.items():
            for kind in ("weight", "bias"):
                names = [f"transformer_blocks.{number}.{part}.{kind}" for part in parts]
                if names[0] in state:
                    made[f"{prefix}joint_blocks.{number}.{theirs}.{kind}"] = torch.cat([state[name] for name in names])
    return made


def original_clip_of_sd3(first, second) -> dict:
    """Both CLIP encoders' weights under `text_encoders.`; the first has no projection there."""
    made = {f"text_encoders.clip_l.transformer.{name}": value for name, value in first.state_dict().items()}
    made.pop("text_encoders.clip_l.transformer.text_projection.weight")
    return made | {f"text_encoders.clip_g.transformer.{name}": value for name, value in second.state_dict().items()}


def original_z_image(transformer) -> dict:
    """Z-Image's transformer, as ComfyUI's files hold it: query, key and value in one layer."""
    state, made = transformer.state_dict(), {}
    renamed = {
        "all_final_layer.2-1.": "final_layer.",
        "all_x_embedder.2-1.": "x_embedder.",
        ".attention.to_out.0.": ".attention.out.",
        ".attention.norm_q.": ".attention.q_norm.",
        ".attention.norm_k.": ".attention.k_norm.",
    }
    for name, value in state.items():
        if ".attention.to_q." in name:
            parts = [state[name.replace("to_q", f"to_{part}")] for part in "qkv"]
            made[name.replace("to_q", "qkv")] = torch.cat(parts)
        elif ".attention.to_k." not in name and ".attention.to_v." not in name:
            for own, original in renamed.items():
                name = name.replace(own, original)
            made[name] = value
    return made


_FLUX = {
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "context_embedder": "txt_in",
    "x_embedder": "img_in",
    "proj_out": "final_layer.linear",
}
_FLUX_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_FLUX_NORMS = {
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
}
_FLUX_SINGLE = {"norm.linear": "modulation.lin", "proj_out": "linear2"}


def original_flux(transformer) -> dict:
    """FLUX.1's transformer under the names of Black Forest Labs."""
    state, made = transformer.state_dict(), {}
    parts = ("weight", "bias")
    for own, original in _FLUX.items():
        made |= {f"{original}.{part}": state[f"{own}.{part}"] for part in parts if f"{own}.{part}" in state}
    for part in parts:  # scale and shift change places
        made[f"final_layer.adaLN_modulation.1.{part}"] = torch.cat(
            list(reversed(state[f"norm_out.linear.{part}"].chunk(2)))
        )
    for place in range(len(transformer.transformer_blocks)):
        own, original = f"transformer_blocks.{place}", f"double_blocks.{place}"
        for part in parts:
            for mine, theirs in _FLUX_DOUBLE.items():
                made[f"{original}.{theirs}.{part}"] = state[f"{own}.{mine}.{part}"]
            for stream, names in (
                ("img", ("to_q", "to_k", "to_v")),
                ("txt", ("add_q_proj", "add_k_proj", "add_v_proj")),
            ):
                together = [state[f"{own}.attn.{name}.{part}"] for name in names]
                made[f"{original}.{stream}_attn.qkv.{part}"] = torch.cat(together)
        made |= {f"{original}.{theirs}": state[f"{own}.{mine}"] for mine, theirs in _FLUX_NORMS.items()}
    for place in range(len(transformer.single_transformer_blocks)):
        own, original = f"single_transformer_blocks.{place}", f"single_blocks.{place}"
        for part in parts:
            for mine, theirs in _FLUX_SINGLE.items():
                made[f"{original}.{theirs}.{part}"] = state[f"{own}.{mine}.{part}"]
            together = [state[f"{own}.{name}.{part}"] for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
            made[f"{original}.linear1.{part}"] = torch.cat(together)
        for mine, theirs in (("attn.norm_q", "query_norm"), ("attn.norm_k", "key_norm")):
            made[f"{original}.norm.{theirs}.scale"] = state[f"{own}.{mine}.weight"]
    return made


def original_flux2(transformer):
    """The tensors of a transformer under the names of Black Forest Labs' files."""
    tensors, made = dict(transformer.state_dict()), {}
    whole = {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
        "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
        "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
        "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
        "single_stream_modulation.lin": "single_stream_modulation.linear",
        "final_layer.linear": "proj_out",
    }
    for original, name in whole.items():
        if f"{name}.weight" in tensors:
            made[f"{original}.weight"] = tensors[f"{name}.weight"]
    shift, scale = tensors["norm_out.linear.weight"].chunk(2)
    made["final_layer.adaLN_modulation.1.weight"] = torch.cat([scale, shift])
    for place in range(len(transformer.transformer_blocks)):
        own, block = f"transformer_blocks.{place}", f"double_blocks.{place}"
        for stream, names in (("img", ("to_q", "to_k", "to_v")), ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"))):
            made[f"{block}.{stream}_attn.qkv.weight"] = torch.cat(
                [tensors[f"{own}.attn.{name}.weight"] for name in names]
            )
        others = {
            "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
            "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
            "img_attn.proj.weight": "attn.to_out.0.weight",
            "img_mlp.0.weight": "ff.linear_in.weight",
            "img_mlp.2.weight": "ff.linear_out.weight",
            "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
            "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
            "txt_attn.proj.weight": "attn.to_add_out.weight",
            "txt_mlp.0.weight": "ff_context.linear_in.weight",
            "txt_mlp.2.weight": "ff_context.linear_out.weight",
        }
        made |= {f"{block}.{original}": tensors[f"{own}.{name}"] for original, name in others.items()}
    for place in range(len(transformer.single_transformer_blocks)):
        others = {
            "linear1.weight": "attn.to_qkv_mlp_proj.weight",
            "linear2.weight": "attn.to_out.weight",
            "norm.query_norm.scale": "attn.norm_q.weight",
            "norm.key_norm.scale": "attn.norm_k.weight",
        }
        own = f"single_transformer_blocks.{place}"
        made |= {f"single_blocks.{place}.{original}": tensors[f"{own}.{name}"] for original, name in others.items()}
    return {name: value.clone().contiguous() for name, value in made.items()}
