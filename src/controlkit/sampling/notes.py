"""Notes on a request: cut prompts, unusual sizes, negative weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from controlkit.bases.base import Base
from controlkit.bases.prompt_encoding import Embedding, cut_from_plain
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.seeds import same_noise


def prompt_notes(prompts: Iterable[str], base: Base, embeddings: Sequence[Embedding] = ()) -> list[str]:
    """Notes on prompts that are cut, where `embeddings` stand for words."""

    def cut(prompt: str) -> str:
        return cut_from_plain(base.tokenizer, prompt, embeddings) if embeddings else base.cut_from(prompt)

    cuts = [cut(prompt) for prompt in dict.fromkeys(prompts) if prompt]
    return [f"the base reads {base.prompt_tokens} tokens of a prompt; it does not see {cut!r}" for cut in cuts if cut]


def request_notes(
    request: GenerateRequest, base: Base, width: int, height: int, embeddings: Sequence[Embedding] = ()
) -> list[str]:
    """Notes on the prompts, the size in pixels and the weights of a request."""
    # Weighted prompts are read in chunks and never cut.
    prompts = (request.prompt, request.negative_prompt) if request.prompt_syntax == "plain" else ()
    notes = prompt_notes(prompts, base, embeddings)
    guidance = base.default_guidance if request.guidance is None else request.guidance
    if base.reads_guidance and request.negative_prompt.strip():
        notes.append(
            f"the network of {base.name} reads the guidance scale and has no branch for a negative prompt, which"
            " changes nothing"
        )
    elif guidance <= 1 and request.negative_prompt.strip():
        notes.append(f"guidance {guidance:g} switches guidance off, so the negative prompt changes nothing")
    sides, area = (width / base.size, height / base.size), width * height / base.size**2
    if not (0.5 < area < 2 and all(0.5 < side < 2 for side in sides)):
        notes.append(
            f"{base.name} was trained at {base.size} x {base.size}; at {width} x {height} expect repeated, stretched or"
            " blurred shapes"
        )
    notes += [
        f"seeds {', '.join(map(str, group))} differ by multiples of 2^32 and give the same image: torch reads the"
        " lowest 32 bits on the CPU"
        for group in same_noise(request.seeds)
    ]
    notes += [
        f"the weight of {use.control} is {use.weight:g}: a negative weight pushes away from the condition image and"
        " usually breaks the result; for a weaker control use a weight from 0 to 1"
        for use in request.controls
        if use.weight < 0
    ]
    return notes
