"""Weighted prompts, long prompts, learned words and clip skip: A1111's reading of a prompt, diffusers' images."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from parity import NEGATIVE, PROMPT, SEEDS, assert_same, ours, parts
from safetensors.torch import save_file

from controlkit.bases.clip_tokenizer import clip_tokenizer
from controlkit.bases.prompt_encoding import Embedding, TextOptions, same_length
from controlkit.bases.prompt_syntax import STRONGER, WEAKER, Span, parse_weighted
from controlkit.bases.stable_diffusion import StableDiffusion
from controlkit.images import to_tensor
from controlkit.sampling.embeddings import read_embeddings
from controlkit.sampling.generate import generate
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.sampler import sample_prompts
from controlkit.sampling.saved_settings import read_settings
from controlkit.sampling.uses import ControlUse
from refusals import refused
from tiny import SD1_SCHEDULE, build_tiny_base, build_tiny_sd3, build_tiny_sdxl

WEIGHTED = TextOptions(syntax="weighted")
LONG = "red apple, " * 12 + "noto style"
"""More tokens than the tiny base's 24."""


@pytest.fixture(scope="module")
def deep_base():
    """A base with CLIP's tokenizer and a text encoder of three layers."""
    from transformers import CLIPTextConfig, CLIPTextModel

    base = build_tiny_base()
    torch.manual_seed(4)
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=49406,
            eos_token_id=49407,
        )
    )
    with torch.no_grad():
        encoder.final_layer_norm.bias += 0.3  # trained encoders' states have a mean that is not zero
    others = {"vae": base.vae, "unet": base.unet, "scheduler_config": dict(SD1_SCHEDULE)}
    return StableDiffusion(name="deep", tokenizer=clip_tokenizer(), text_encoder=encoder, **others)


def ours_xl(base, **settings):
    given = {"prompts": [PROMPT], "negative_prompt": NEGATIVE, "seeds": SEEDS, "steps": 5, "guidance": 4.0}
    return torch.cat(list(sample_prompts(base, **{**given, **settings})))


def pipeline_xl(base):
    components = {component.name: getattr(base, component.name) for component in base.components[:-1]}
    from diffusers import DDIMScheduler

    return StableDiffusionXLPipeline(**components, scheduler=DDIMScheduler.from_config(base.scheduler_config))


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("normal text", [("normal text", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("less [important]", [("less ", 1), ("important", 1 / 1.1)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("closed) by [none:1.2)", [("closed) by ", 1), ("none:1.2)", 1 / 1.1)]),
        (r"\(literal\] and \\", [("(literal] and \\", 1)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("(word : -.5 )", [("word ", -0.5)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1),
                ("house", 1.573),
                (" ", 1.1),
                ("on", 1),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641),
                (".", 1.1),
            ],
        ),
    ],
)
def test_weights_are_read_as_in_a1111(prompt, expected):
    (spans,) = parse_weighted(prompt)
    assert [span.text for span in spans] == [text for text, _ in expected]
    assert [span.weight for span in spans] == pytest.approx([weight for _, weight in expected])


def test_a_break_ends_a_part_also_within_brackets_but_not_within_a_word():
    parts = parse_weighted("red (apple BREAK blue) BREAKFAST")
    assert [[(span.text, round(span.weight, 3)) for span in part] for part in parts] == [
        [("red ", 1), ("apple", 1.1)],
        [("blue", 1.1), (" BREAKFAST", 1)],
    ]


def test_long_prompts_of_brackets_and_white_space_are_parsed():
    space = " " * 9_000
    assert parse_weighted(f"{space}a{space}BREAK{space}BREAK b") == [[Span(f"{space}a", 1)], [], [Span("b", 1)]]
    assert parse_weighted("(" * 5_000 + "a" + ")" * 4_999) == [[Span("a", pytest.approx(STRONGER**5_000))]]
    assert parse_weighted("[" + ":1" * 4_000) == [[Span(":1" * 4_000, WEAKER)]]
    with refused("unsupported", "alternating"):
        parse_weighted("[" + "|" * 9_000 + "]")


@pytest.mark.parametrize(
    ("prompt", "fact"),
    [
        ("[cat:dog:0.5] face", "[cat:dog:0.5]"),
        ("[cat|dog]", "[cat|dog]"),
        ("cat AND dog", "AND"),
        ("cat <lora:x:1>", "--lora"),
        ("<hypernet:x:1>", "hypernet"),
    ],
)
def test_other_syntax_of_a1111_is_refused_not_read_as_something_else(prompt, fact):
    with refused("unsupported", fact, "plain"):
        GenerateRequest(prompt=prompt, prompt_syntax="weighted")
    GenerateRequest(prompt=prompt)
    GenerateRequest(prompt=r"\[cat\|dog\] and", prompt_syntax="weighted")


def test_plain_words_are_the_same_in_both_syntaxes(deep_base, tiny_base):
    for base in (deep_base, tiny_base, build_tiny_sdxl()):
        prompts = ["red apple, cat face", ""]
        plain, weighted = base.encode_text(prompts), base.encode_text(prompts, options=WEIGHTED)
        for a, b in zip(plain.tensors(), weighted.tensors(), strict=True):
            assert torch.allclose(a, b, atol=1e-6)


def test_brackets_are_letters_in_plain_prompts_and_where_they_are_escaped(deep_base):
    plain = deep_base.encode_text(["a (red) apple"]).tokens
    assert torch.allclose(deep_base.encode_text([r"a \(red\) apple"], options=WEIGHTED).tokens, plain, atol=1e-6)
    assert (deep_base.encode_text(["a (red) apple"], options=WEIGHTED).tokens - plain).abs().max() > 0.01


def test_a_weight_scales_the_states_of_its_words_and_keeps_the_mean(deep_base):
    plain = deep_base.encode_text(["a red apple"]).tokens
    tokens = deep_base.encode_text(["a (red:1.5) apple"], options=WEIGHTED).tokens
    expected = plain.clone()
    expected[:, 2] *= 1.5  # after the begin token and "a"
    expected *= plain.mean() / expected.mean()
    assert torch.allclose(tokens, expected, atol=1e-5)


def test_a_mean_of_zero_is_not_restored(tiny_base):
    """As the tiny base's, whose states have passed an untrained norm: a quotient of such means would be arbitrary."""
    plain = tiny_base.encode_text(["red apple"]).tokens
    tokens = tiny_base.encode_text(["(red apple:1.5)"], options=WEIGHTED).tokens
    assert plain.mean().abs() < 1e-6
    assert (tokens / plain).min() > 0.5 and (tokens / plain).max() < 3


def test_long_prompts_are_encoded_in_chunks_which_end_at_a_comma_near_their_end(deep_base):
    words = ["apple"] * 60 + [","] + ["cat"] * 30
    chunks = deep_base.encode_text([" ".join(words)], options=WEIGHTED).tokens
    expected = [" ".join(words[:61]), " ".join(words[61:])]
    assert torch.allclose(chunks, deep_base.encode_text(expected).tokens.flatten(0, 1)[None], atol=1e-6)
    far = ["apple"] * 50 + [","] + ["cat"] * 40  # more than 20 tokens before the end
    expected = [" ".join(far[:75]), " ".join(far[75:])]
    chunks = deep_base.encode_text([" ".join(far)], options=WEIGHTED).tokens
    assert torch.allclose(chunks, deep_base.encode_text(expected).tokens.flatten(0, 1)[None], atol=1e-6)


@pytest.mark.parametrize("prompt", ["red apple BREAK cat face", "red apple\nBREAK\ncat face BREAK"])
def test_break_begins_a_chunk(deep_base, prompt):
    tokens = deep_base.encode_text([prompt], options=WEIGHTED).tokens
    expected = deep_base.encode_text(["red apple", "cat face"]).tokens.flatten(0, 1)[None]
    assert torch.allclose(tokens, expected, atol=1e-6)


def test_xl_encodes_chunks_by_both_encoders_and_pools_the_first():
    base = build_tiny_sdxl()
    text = base.encode_text(["red (apple:1.3) BREAK cat face"], options=WEIGHTED)
    both = base.encode_text(["red apple", "cat face"])
    assert torch.allclose(text["pooled"], both["pooled"][:1], atol=1e-6)
    assert torch.allclose(text.tokens[:, 77:], both.tokens[1:], atol=1e-6)
    for part in (slice(0, 16), slice(16, None)):  # each encoder restores its own mean
        assert both.tokens[:1, :, part].mean().abs() > 1e-3
        assert torch.allclose(text.tokens[:, :77, part].mean(), both.tokens[:1, :, part].mean(), atol=1e-6)
    assert not torch.allclose(text.tokens[:, :77], both.tokens[:1], atol=1e-3)


@pytest.mark.parametrize("base", ["sd1", "sdxl"])
def test_a_long_prompt_beside_a_short_one_draws_as_diffusers_with_each_by_itself(base, deep_base):
    base = deep_base if base == "sd1" else build_tiny_sdxl()
    prompts = "red apple BREAK cat face BREAK sailboat", "cat BREAK red"  # three chunks and two
    texts = [base.encode_text([prompt], options=WEIGHTED) for prompt in prompts]
    assert [text.tokens.shape[1] for text in texts] == [231, 154]
    assert {text.tokens.shape[1] for text in same_length(texts)} == {462}
    x_t, t = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([500])
    for alone, repeated in zip(texts, same_length(texts), strict=True):
        assert torch.allclose(base.predict(x_t, t, alone), base.predict(x_t, t, repeated), atol=1e-5)
    settings = {"prompts": prompts[:1], "negative_prompt": prompts[1], "text": WEIGHTED, "seeds": SEEDS, "steps": 5}
    made = torch.cat(list(sample_prompts(base, guidance=4.0, **settings)))
    expected_texts = dict(zip(("prompt_embeds", "negative_prompt_embeds"), same_length(texts), strict=True))
    embeds = {name: text.tokens.expand(2, -1, -1) for name, text in expected_texts.items()}
    if "pooled" in texts[0]:
        pooled = {
            name.replace("prompt", "pooled_prompt"): text["pooled"].expand(2, -1)
            for name, text in expected_texts.items()
        }
        expected = theirs_with(pipeline_xl(base), {**embeds, **pooled})
    else:
        expected = theirs_with(StableDiffusionPipeline(**parts(base)), embeds)
    assert_same(made, expected, 1e-3)


def theirs_with(pipeline, embeds):
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    settings = {"num_inference_steps": 5, "guidance_scale": 4.0, "output_type": "pt", "eta": 0.0}
    return pipeline(**embeds, generator=generators, height=64, width=64, **settings).images


def test_an_image_does_not_depend_on_longer_prompts_in_its_batch(tiny_base, tiny_control, condition_image):
    hint = tiny_control.encode(to_tensor([condition_image]), tiny_base)
    use = ActiveControl(tiny_control, hint, weight=0.8)
    prompts, seeds = ["red apple", LONG, "(cat:1.4) BREAK face"], [3, 4, 5]
    settings = {"uses": [use], "text": WEIGHTED, "steps": 4, "negative_prompt": NEGATIVE}
    together = torch.cat(list(sample_prompts(tiny_base, prompts=prompts, seeds=seeds, **settings)))
    for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        (alone,) = sample_prompts(tiny_base, prompts=[prompt], seeds=[seed], **settings)
        assert_same(together[row : row + 1], alone, 1e-4)
    (plain,) = sample_prompts(tiny_base, prompts=[LONG], seeds=[4], **{**settings, "text": TextOptions()})
    assert (together[1:2] - plain).abs().max() > 1e-3


@pytest.mark.parametrize("skip", [1, 2])
def test_clip_skip_draws_as_diffusers(deep_base, skip, monkeypatch):
    # diffusers 0.42 looks for the norm where transformers had it before version 5.
    monkeypatch.setattr(type(deep_base.text_encoder), "text_model", property(lambda self: self), raising=False)
    pipeline = StableDiffusionPipeline(**parts(deep_base))
    # diffusers skips layers for the prompt only; here, as in A1111, for both, so each is encoded as a prompt.
    embeds = {
        name: pipeline.encode_prompt([text] * 2, "cpu", 1, False, clip_skip=skip - 1 or None)[0]
        for name, text in (("prompt_embeds", PROMPT), ("negative_prompt_embeds", NEGATIVE))
    }
    expected = theirs_with(pipeline, embeds)
    made = ours(deep_base, text=TextOptions(clip_skip=skip))
    assert_same(made, expected, 1e-3)
    assert torch.equal(made, ours(deep_base)) == (skip == 1)


def test_clip_skip_of_xl_is_counted_from_the_last_layer():
    base = build_tiny_sdxl()
    assert torch.equal(ours_xl(base, text=TextOptions(clip_skip=2)), ours_xl(base))  # its own
    skipped = base.encode_text([PROMPT], options=TextOptions(clip_skip=1)).tokens
    assert (skipped - base.encode_text([PROMPT]).tokens).abs().max() > 1e-2
    with refused("out-of-range", "clip_skip", 3, "2 layers"):
        base.encode_text([PROMPT], options=TextOptions(clip_skip=3))
    with refused("out-of-range", "clip_skip", 0):
        GenerateRequest(prompt="", clip_skip=0)


def vectors(count, width, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * 0.3


def test_a_textual_inversion_draws_as_diffusers(deep_base, tmp_path):
    save_file({"<toy>": vectors(3, 16)}, tmp_path / "toy.safetensors")
    embeddings = read_embeddings([f"<toy>={tmp_path}/toy.safetensors"], deep_base)
    made = ours(deep_base, prompt="red <toy>, cat", text=TextOptions(embeddings=embeddings))
    pipeline = StableDiffusionPipeline(**parts(build_copy(deep_base)))
    pipeline.load_textual_inversion(str(tmp_path / "toy.safetensors"), token="<toy>")
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 5, "guidance_scale": 4.0, "output_type": "pt", "eta": 0.0}
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    negative = [NEGATIVE] * 2
    expected = pipeline(["red <toy>, cat"] * 2, negative_prompt=negative, generator=generators, **settings).images
    assert_same(made, expected, 1e-3)
    assert (made - ours(deep_base, prompt="red toy, cat")).abs().max() > 5e-3
    assert len(deep_base.tokenizer) == 49408  # the base itself is as it was


def build_copy(base):
    import copy

    return copy.deepcopy(base)


def test_a_textual_inversion_for_two_encoders_leaves_the_end_of_the_prompt_where_it_is(tmp_path):
    base = build_tiny_sdxl()
    file = tmp_path / "toy.safetensors"
    save_file({"clip_l": vectors(2, 16), "clip_g": vectors(2, 12)}, file)
    (embedding,) = read_embeddings([str(file)], base)
    assert embedding.name == "toy"
    # Vectors that are those of ordinary words are these words.
    ids = base.tokenizer("sailboat cat", add_special_tokens=False).input_ids
    known = {name: getattr(base, name).get_input_embeddings().weight[ids] for name in embedding.vectors}
    options = TextOptions(embeddings=[Embedding("Toy", known)])
    a, b = base.encode_text(["red toy, apple"], options=options), base.encode_text(["red sailboat cat, apple"])
    for mine, other in zip(a.tensors(), b.tensors(), strict=True):
        assert torch.allclose(mine, other, atol=1e-6)


def test_files_of_a1111_are_read_as_data(deep_base, tmp_path):
    torch.save({"string_to_param": {"*": vectors(2, 16)}, "name": "toy", "step": 5}, tmp_path / "toy.pt")
    torch.save(vectors(1, 16)[0], tmp_path / "one.bin")
    first, second = read_embeddings([str(tmp_path / "toy.pt"), str(tmp_path / "one.bin")], deep_base)
    assert torch.equal(first.vectors["text_encoder"], vectors(2, 16)) and second.vectors["text_encoder"].shape == (
        1,
        16,
    )
    torch.save({"string_to_param": print}, tmp_path / "code.pt")
    with refused("unsafe-pickle", "code.pt"):
        read_embeddings([str(tmp_path / "code.pt")], deep_base)


def test_files_that_do_not_fit_are_refused(deep_base, tmp_path):
    file = tmp_path / "toy.safetensors"
    save_file({"emb_params": vectors(1, 24)}, file)
    with refused("incompatible", "toy.safetensors", 24, 16):
        read_embeddings([str(file)], deep_base)
    save_file({"a": vectors(1, 16), "b": vectors(1, 16)}, file)
    with refused("wrong-kind", "toy.safetensors"):
        read_embeddings([str(file)], deep_base)
    with refused("missing-file", "none.pt"):
        read_embeddings([str(tmp_path / "none.pt")], deep_base)
    save_file({"a": vectors(1, 16)}, file)
    with refused("contradiction", "Toy", "WORD=FILE"):
        read_embeddings([str(file), f"Toy={file}"], deep_base)


def test_a_base_of_sd3_reads_plain_prompts_only():
    base = build_tiny_sd3()
    for options in (WEIGHTED, TextOptions(embeddings=[Embedding("toy", {})])):
        with refused("unsupported", "weighted", "plain"):
            base.encode_text(["red apple"], options=options)
    own, other = (base.encode_text(["apple"], options=TextOptions(clip_skip=skip)).tokens for skip in (2, 1))
    assert torch.equal(own, base.encode_text(["apple"]).tokens) and not torch.equal(own, other)


def test_settings_are_saved_with_the_image_and_repeat_it(tiny_base, tmp_path):
    file = tmp_path / "toy.safetensors"
    save_file({"emb_params": vectors(2, 16)}, file)
    request = GenerateRequest(
        prompt=f"(red:1.3) toy {LONG}", prompt_syntax="weighted", clip_skip=1, embeddings=(str(file),), steps=3
    )
    assert GenerateRequest.from_json(json.loads(json.dumps(request.to_json()))) == request
    made = generate(request, base=tiny_base)
    assert not any("tokens of a prompt" in note for note in made.notes)
    (path,) = made.save(tmp_path / "out")
    saved = read_settings(path)
    again = generate(saved.to_request(), base=tiny_base)
    assert again.images[0].image.tobytes() == made.images[0].image.tobytes()
    assert not saved.differences(again)
    save_file({"emb_params": vectors(2, 16, seed=1)}, file)
    changed = generate(saved.to_request(), base=tiny_base)
    assert changed.images[0].image.tobytes() != made.images[0].image.tobytes()
    assert [str(file) in note and "SHA-256" in note for note in saved.differences(changed)] == [True]
    unused = generate(GenerateRequest(prompt="cat", embeddings=(str(file),), steps=1), base=tiny_base)
    assert any("embedding toy" in note for note in unused.notes)


def test_the_command_line_builds_the_same_request():
    import argparse

    from controlkit.apps import generate as verb

    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    verb.add_arguments(parser)
    words = [
        "(a:1.2)",
        "--prompt-syntax",
        "weighted",
        "--clip-skip",
        "2",
        "--embedding",
        "a.pt",
        "--embedding",
        "b=c.pt",
    ]
    request, _ = verb._request(parser.parse_args(words))
    assert request == GenerateRequest(
        prompt="(a:1.2)", prompt_syntax="weighted", clip_skip=2, embeddings=("a.pt", "b=c.pt")
    )


def test_nano_reads_prompts_longer_than_its_24_tokens(tmp_path):
    request = GenerateRequest(
        prompt=f"(red apple:1.2), {LONG}, on a blue background",
        prompt_syntax="weighted",
        steps=2,
        controls=(ControlUse(control="canny", image="src/controlkit/assets/demo/sailboat.png"),),
    )
    weighted = generate(request)
    assert not any("tokens of a prompt" in note for note in weighted.notes)
    plain = GenerateRequest(prompt=LONG, steps=2)
    assert any("tokens of a prompt" in note for note in generate(plain).notes)
