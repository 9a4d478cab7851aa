"""generate images from a prompt and condition images

    controlkit generate "red apple, noto style, on a blue background" \\
        --control canny=drawing.png@0.9:0-0.8 --seeds 4 --out images
    controlkit generate "red apple" --control canny=drawing.png@0.8,mode=guess,mask=left.png,low=50
    controlkit generate "red apple" --control canny=drawing.png --xy weight=0.5,1 --xy guidance=1,3,5
    controlkit generate "a red house" --base sd15.safetensors --control control_v11p_sd15_canny.pth=edges.png --prepared
    controlkit generate --from images/settings.json --steps 50

The image of a control may have any size: it is scaled to cover the result and center-cropped. Options of a control:

    mode=MODE          balanced: acts on both branches of CFG; control: on the conditional one only, which is stronger;
                       soft: both, weaker at fine resolutions ("My prompt is more important"); guess: conditional,
                       weaker at fine resolutions (guess_mode); cfg-rw, cfg-rw-literal: conditional, weighted by the
                       resolution of each site, normalised or as in the paper
    mask=FILE          acts where this image is white, partly where it is grey
    layers=A:B:...     one more weight per residual, from the outermost in, then the middle
    weight=W, span=START-END
                       as after @
    prepared           IMAGE is a condition image already
    KEY=VALUE          any other key: a plain input of the control, such as task=canny, or a parameter of its condition,
                       such as low=50 of canny; INPUT.KEY=VALUE for one image among several

IMAGE may be a folder or a glob: each of its images is combined with each prompt (--prompt, --prompts) and seed, or with
--pair with the prompt of the same place. --xy SETTING=VALUE,VALUE,... varies any setting: guidance, steps, seed=1,4-6,
prompt=ONE|TWO, options of all controls (weight, span, mode, low, ...) or of one (1.weight, canny.weight), and of LoRAs
(lora.weight, lora.1.weight).

Names of files that exist may contain @ = : and commas.

--from repeats the settings of a settings.json, its folder or a PNG; other options override them, and --control
replaces all controls. Paths are tried as they are and from the folder of the settings. If an image is missing or has
changed, its saved condition image is used, with a note; changed controls and bases are noted, too. On the CPU of the
same machine the images are identical, bit for bit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from controlkit.apps.show import add_json, print_json, print_notes, print_seconds
from controlkit.progress import Progress, end_line, is_verbose

if TYPE_CHECKING:
    from controlkit.sampling.request import GenerateRequest
    from controlkit.sampling.saved_settings import SavedSettings
    from controlkit.sampling.step import Step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb. Defaults are those of `GenerateRequest`."""
    parser.add_argument("prompt", nargs="?", help="text prompt")
    parser.add_argument(
        "--prompt", action="append", default=[], dest="more_prompts", metavar="TEXT", help="one more prompt; repeat"
    )
    parser.add_argument("--prompts", metavar="FILE", help="a text file of prompts, one on each line")
    parser.add_argument(
        "--pair",
        action="store_true",
        default=False,
        help="pair prompts and images of --control in their order (default: every prompt with every image)",
    )
    parser.add_argument(
        "--xy",
        action="append",
        default=[],
        metavar="SETTING=VALUE,VALUE,...",
        help="vary a setting along the columns of a sheet, and with a second --xy along its rows (above)",
    )
    parser.add_argument(
        "--from",
        dest="saved",
        metavar="FILE",
        help="repeat the settings of a settings.json, its folder, or a PNG of generate",
    )
    parser.add_argument(
        "--lora",
        dest="loras",
        action="append",
        metavar="FILE[@weight]",
        help="a LoRA of the base, of kohya, diffusers or peft (default weight: 1); repeat for several",
    )
    parser.add_argument("--base", help="nano, a diffusers folder, a single file, or a hub id (default: nano)")
    parser.add_argument(
        "--control",
        action="append",
        default=[],
        metavar="NAME_OR_FILE=IMAGE[@weight[:start-end]][,KEY=VALUE...]",
        help="a control, its image, and optionally its conditioning scale, range of steps and options (above); repeat"
        " for several. For a control that takes several images, or values such as boxes, IMAGE is a .json file",
    )
    parser.add_argument(
        "--prepared", action="store_true", default=False, help="all images of --control are condition images already"
    )
    parser.add_argument(
        "--mode",
        default=None,
        help="how controls that name no mode act under CFG: balanced, control, soft, guess, cfg-rw or cfg-rw-literal"
        " (default: control for nano, else balanced)",
    )
    parser.add_argument(
        "--prompt-mode",
        help="none, default (that of the base: a professional, detailed, high-quality image; nano has none), automatic"
        " (a caption of a first image, for each seed) or given (default: given)",
    )
    parser.add_argument(
        "--captioner",
        help="of --prompt-mode automatic: concepts (nano's), or a folder or hub id of a BLIP model (default: concepts"
        " for nano, else Salesforce/blip-image-captioning-base)",
    )
    parser.add_argument("--negative-prompt", help="prompt of the unconditional branch")
    parser.add_argument(
        "--prompt-syntax",
        help="plain: prompts as they stand, cut at the base's length; weighted: A1111's (word:1.2), [word], BREAK and"
        r" any length, with a backslash before brackets that are meant (default: plain; bases with a transformer"
        " have plain only)",
    )
    parser.add_argument(
        "--clip-skip",
        type=int,
        help="layer of the CLIP text encoders, 1 for the last, 2 for the one before, as in A1111 (default: that of the"
        " base: 1, or 2 for SDXL and SD3; not for FLUX, Z-Image, Qwen-Image, Sana)",
    )
    parser.add_argument(
        "--embedding",
        dest="embeddings",
        action="append",
        metavar="[WORD=]FILE",
        help="a textual inversion, used where its word (default: the file's name) stands in a prompt; repeat for"
        " several (not for bases with a transformer)",
    )
    parser.add_argument(
        "--seeds", metavar="N", help="number of images of consecutive seeds (default: 1), or a list such as 3,5,9-12"
    )
    parser.add_argument(
        "--seed", help="seed of the first image, up to 2^64 - 1; -1 is a random one (default: 0); or a list"
    )
    parser.add_argument("--steps", type=int, help="denoising steps (default: 20)")
    parser.add_argument(
        "--guidance",
        type=float,
        help="guidance scale; 1 is off; FLUX.1 dev reads it (default: nano 3, SD1 and SD2 7.5, SDXL 5, SD3 7, FLUX.1"
        " dev 3.5, schnell 1, FLUX.2 4, distilled klein 1, Z-Image 5, Turbo 1, Qwen-Image 4,"
        " Sana 4.5)",
    )
    parser.add_argument("--width", type=int, help="in pixels (default: the size of the base)")
    parser.add_argument("--height", type=int, help="in pixels (default: the size of the base)")
    parser.add_argument("--image", metavar="FILE", help="start from this image (img2img)")
    parser.add_argument(
        "--strength",
        type=float,
        help="fraction of the steps that run on --image, above 0 and at most 1: the higher, the less of it remains"
        " (default: 0.8; with --mask 1)",
    )
    parser.add_argument(
        "--mask", metavar="FILE", help="inpaint --image where this image of the same size is white; keep the rest"
    )
    parser.add_argument("--mask-blur", type=float, metavar="PIXELS", help="blur of the mask's edge (default: 0)")
    parser.add_argument(
        "--only-masked",
        type=int,
        metavar="PADDING",
        help="inpaint the part around the mask, with this padding in pixels, at full size, and put it back",
    )
    parser.add_argument(
        "--hires",
        type=float,
        metavar="FACTOR",
        help="a second pass: enlarge the images by this factor, above 1 and at most 8, and run img2img on them (A1111:"
        " Hires. fix)",
    )
    parser.add_argument(
        "--hires-strength", type=float, help="--strength of the second pass (default: 0.7, as in A1111)"
    )
    parser.add_argument(
        "--sampler",
        help="ddim, dpm++, dpm++-2m-sde, unipc, ddpm or lcm; not for nano: plms, euler, euler-a, heun, dpm2,"
        " dpm2-a; and -karras after dpm++, dpm++-2m-sde, euler, heun, dpm2, dpm2-a. Bases with a transformer: euler,"
        ' dpm++ or unipc. Names of A1111, ComfyUI and diffusers are understood, such as "DPM++ 2M Karras" (default:'
        " ddim, of Sana dpm++, of other transformers euler)",
    )
    parser.add_argument("--batch-size", type=int, help="images per batch (default: 16 small ones, 4 of 512 x 512)")
    parser.add_argument(
        "--tiled",
        action=argparse.BooleanOptionalAction,
        help="decode large images in tiles, in less memory (default: no)",
    )
    parser.add_argument(
        "--vae",
        metavar="FILE",
        help="an autoencoder in place of the base's own: a file, a diffusers folder, or a hub id",
    )
    parser.add_argument("--device", help="cpu, cuda, mps or auto (default: auto, the best available)")
    parser.add_argument("--text-device", help="device of the text encoders, such as cpu (default: --device)")
    parser.add_argument(
        "--low-memory",
        action=argparse.BooleanOptionalAction,
        help="move text encoders off the device once prompts are encoded, and decode images one by one: the same images"
        " in less memory (default: no)",
    )
    parser.add_argument(
        "--graphs",
        help="CUDA graphs, which speed up small batches: auto, on or off (default: auto, which uses them on CUDA if"
        " there are enough steps)",
    )
    parser.add_argument("--precision", help="fp32, fp16, bf16 or auto (default: auto, fp16 on CUDA, else fp32)")
    parser.add_argument(
        "--preview-every",
        type=int,
        metavar="N",
        help="every N steps, replace preview.png in the output folder by a small preview of the images in progress",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder for the images; files of the same names are replaced"
        " (default: a new one each time, images/001, images/002, ...)",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the verb."""
    from controlkit.errors import UserError
    from controlkit.files import output_folder

    every = getattr(args, "preview_every", None)
    if every is not None and every < 1:
        raise UserError(f"--preview-every {every}: expected a number of steps of at least 1", "out-of-range")
    request, saved = _request(args)
    with output_folder(getattr(args, "out", None), numbered_in="images") as out:
        from controlkit.sampling.generate import generate
        from controlkit.sampling.image_folder import ImageFolder, refuse_overwriting
        from controlkit.sampling.inputs import with_named_inputs

        request = with_named_inputs(request)
        refuse_overwriting(request, out)
        folder = ImageFolder(out)
        try:
            generation = generate(request, on_step=_watch(every, out), on_images=folder.add)
            paths = folder.finish(generation)
        except BaseException:
            if folder.images:
                end_line()
                print(f"{folder.images} finished images are in {out}", file=sys.stderr)
            raise
        if saved is not None:
            generation.notes += saved.differences(generation)
    print_notes(generation.notes)
    if args.json:
        print_json(
            {
                "images": paths,
                "seconds": generation.seconds,
                "request": request.to_json(),
                "used": generation.used,
                "graphs": generation.graphs.to_json(),
                "notes": generation.notes,
            }
        )
        return
    for path in paths:
        print(path)
    print_seconds(generation.seconds)
    if is_verbose():
        print(generation.graphs, file=sys.stderr)


def _watch(every: int | None, out: Path) -> Callable[[Step], object]:
    """Report every step, and write a preview of the latents every so many steps."""
    progress = Progress("denoising steps")

    def watch(step: Step) -> None:
        progress(step.done, step.total)
        if every is not None and (step.step % every == 0 or step.step == step.steps):
            from controlkit.sampling.step import write_preview

            write_preview(step, out / "preview.png")

    return watch


_OPTIONS = (
    *("prompt", "prompt_mode", "captioner", "base", "negative_prompt", "steps", "guidance", "width", "height"),
    *("image", "strength", "mask", "mask_blur", "only_masked", "hires", "hires_strength", "tiled", "vae"),
    *("prompt_syntax", "clip_skip"),
    *("sampler", "batch_size", "device", "text_device", "precision", "low_memory", "graphs"),
)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Settings of the request that are options as they are, and lists of files."""
    from controlkit.sampling.uses import LoraUse

    settings: dict[str, Any] = {name: getattr(args, name) for name in _OPTIONS if hasattr(args, name)}
    if hasattr(args, "embeddings"):
        settings["embeddings"] = tuple(args.embeddings)
    if hasattr(args, "loras"):
        settings["loras"] = tuple(map(LoraUse.parse, args.loras))
    return settings


def _request(args: argparse.Namespace) -> tuple[GenerateRequest, SavedSettings | None]:
    """The request, and the settings that it was restored from."""
    from dataclasses import replace

    from controlkit.errors import UserError
    from controlkit.sampling.axes import expand_folders, parse_axis
    from controlkit.sampling.inputs import parse_control_use
    from controlkit.sampling.request import GenerateRequest
    from controlkit.sampling.saved_settings import read_settings
    from controlkit.sampling.seeds import seeds_of_options

    if args.prepared and not args.control:
        raise UserError("--prepared applies to the images of --control, and there is none", "contradiction")
    settings = _settings(args)
    uses = tuple(parse_control_use(text, prepared=args.prepared, mode=args.mode) for text in args.control)
    saved = read_settings(args.saved) if hasattr(args, "saved") else None
    prompts = _prompts(args)
    if prompts:
        settings["prompt"] = prompts[0]
    _settle_prompt(settings)
    varies = any(text.partition("=")[0].strip() == "prompt" for text in args.xy)
    if saved is None and settings.get("prompt") is None and not varies:
        raise UserError(
            "no prompt; give one, --prompt-mode none, default or automatic, or --from FILE to repeat saved settings",
            "missing-setting",
        )
    if saved is not None and args.mode:
        saved = saved.in_mode(args.mode)
    if args.mode and not uses and not (saved is not None and saved.request.controls):
        raise UserError("--mode applies to controls, and there is none", "contradiction")
    before = (0,) if saved is None else saved.request.seeds
    seeds = seeds_of_options(getattr(args, "seed", None), getattr(args, "seeds", None), before)
    if seeds is not None:
        settings["seeds"] = seeds
    if saved is None:
        request = GenerateRequest(controls=uses, **{"prompt": "", **settings})
    else:
        for name, of_kind in (("controls", uses), ("loras", settings.get("loras", ()))):
            if of_kind:
                settings[name] = [vars(use) for use in of_kind]
        print_notes(saved.replaced(settings))
        request = saved.to_request(**settings)
    if len(prompts) > 1:
        request = replace(request, vary=({"prompt": prompts}, *request.vary))
    request = expand_folders(request, pair=args.pair)
    if args.xy:
        request = replace(request, xy=tuple(parse_axis(text, request, "--xy") for text in args.xy))
        _check_axes(request, settings)
    return request, saved


def _check_axes(request: GenerateRequest, settings: Mapping[str, Any]) -> None:
    """Check that no axis replaces a value that options give, unless it is one of the axis's own."""
    from controlkit.errors import UserError

    given = {name: [value] for name, value in settings.items() if name != "seeds"}
    if "seeds" in settings:
        given["seed"] = list(settings["seeds"])
    for name, values in (item for axis in request.xy for item in axis.items()):
        if any(value not in values for value in given.get(name, ())):
            option = name.replace("_", "-")
            raise UserError(f"--xy {name}=... sets it for every image; leave out --{option}", "contradiction")


def _prompts(args: argparse.Namespace) -> list[str]:
    """All prompts of the command line: the argument, `--prompt` and the lines of `--prompts`."""
    from controlkit.errors import UserError
    from controlkit.files import decode_text

    prompts = [*([args.prompt] if getattr(args, "prompt", None) is not None else []), *args.more_prompts]
    if hasattr(args, "prompts"):
        try:
            lines = decode_text(Path(args.prompts).read_bytes()).splitlines()
        except OSError as error:
            raise UserError(f"--prompts {args.prompts}: {error.strerror}", "missing-file") from error
        except UnicodeDecodeError as error:
            raise UserError(f"--prompts {args.prompts} is not a text file in UTF-8", "damaged-file") from error
        lines = [line.strip() for line in lines if line.strip()]
        if not lines:
            raise UserError(f"--prompts {args.prompts} has no prompts", "empty-data")
        prompts += lines
    return prompts


def _settle_prompt(settings: dict[str, Any]) -> None:
    """Complete the prompt and its mode, where one follows from the other, so that they replace both of saved ones."""
    if settings.get("prompt") is not None:
        settings.setdefault("prompt_mode", "given")
    else:
        settings.pop("prompt", None)
        if settings.get("prompt_mode", "given") != "given":
            settings["prompt"] = ""
    if settings.get("prompt_mode", "automatic") != "automatic":
        settings.setdefault("captioner", None)
