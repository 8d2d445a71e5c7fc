#!/usr/bin/env python
# PYTHON_ARGCOMPLETE_OK
# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The arguments of all commands. What a command does is imported only when it runs, so that `--help` answers at once."""

import argparse
import sys
from importlib import import_module, metadata


DESCRIPTION = "Train, inspect, use and publish pixel-space text-to-image models that are grown with diffusers."
EXAMPLES = """
examples:
  greedy-grow data check my_images
  greedy-grow train --train_data_dir my_images --resolutions 32 128
  greedy-grow sample "a red circle" "a blue star" --model output/grown-128 --out images
  greedy-grow app output/grown-128
  greedy-grow push output/grown-128 user/my-model

Errors that you can mend end in one line and exit code 2. `eval "$(register-python-argcomplete greedy-grow)"` completes arguments
in bash and zsh, if argcomplete is installed: `pip install "diffusers-greedy-grow[cli]"`.
"""


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="A pipeline: its folder, or its repository on the Hub.")
    parser.add_argument("--lora", help="A LoRA adapter to load: its folder, file or repository.")
    add_loading(parser)


def add_loading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", help="The branch, tag or commit of the repository.")
    parser.add_argument("--device", help="Such as cuda, mps or cpu; by default the first of these that there is.")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="By default as the weights are stored."
    )


def add_drawing(parser: argparse.ArgumentParser, guidance_scale: float) -> None:
    parser.add_argument("--out", required=True, help="A new PNG file for one image, or a folder for any number.")
    parser.add_argument("--overwrite", action="store_true", help="Replace files that exist.")
    parser.add_argument("--negative_prompt", help="What to steer away from.")
    parser.add_argument("--seed", type=int, help="The seed of the first image; the next ones have the next seeds.")
    parser.add_argument("--num_inference_steps", type=int, default=28, help="Default: %(default)s.")
    parser.add_argument(
        "--guidance_scale", type=float, default=guidance_scale, help="1 means no guidance. Default: %(default)s."
    )


def add_app(commands) -> None:
    app = commands.add_parser("app", help="Draw with a model in a browser.")
    app.add_argument("model", help="A pipeline: its folder, or its repository on the Hub.")
    add_loading(app)
    app.add_argument(
        "--lora", nargs="+", default=[], help="LoRA adapters to choose from: folders, files, repositories."
    )
    app.add_argument("--host", help="The address to serve at, 0.0.0.0 for all. Default: 127.0.0.1, this machine only.")
    app.add_argument("--port", type=int, help="By default the first free one from 7860 on.")
    app.set_defaults(run="app.serving:run")

    space = commands.add_parser("space", help="Write a Hugging Face Space that serves the app.")
    space.add_argument("folder", help="The folder to write, which must not exist.")
    space.add_argument("--model", required=True, help="The pipeline's repository on the Hub.")
    space.add_argument("--revision", help="The branch, tag or commit of the repository.")
    space.add_argument("--lora", nargs="+", default=[], help="The repositories of LoRA adapters to choose from.")
    space.set_defaults(run="app.space:run")


def add_grow(commands) -> None:
    parser = commands.add_parser("grow", help="Grow a model by one stage, without training it.")
    parser.add_argument(
        "core", help="A pipeline around a core or grown model: its folder, or its repository on the Hub."
    )
    parser.add_argument("--sample_size", type=int, required=True, help="The new resolution in pixels.")
    parser.add_argument("--out", required=True, help="The folder for the grown pipeline, which must not exist.")
    parser.add_argument(
        "--block_out_channels", default="128,256", help="The new stage's channels. Default: %(default)s."
    )
    parser.add_argument("--init", default="preserve", choices=["preserve", "random"], help="Default: %(default)s.")
    parser.add_argument("--revision", help="The branch, tag or commit of the core's repository.")
    parser.set_defaults(run="publishing:grow")


def add_push(commands) -> None:
    parser = commands.add_parser("push", help="Publish a pipeline or model on the Hub, after showing its card.")
    parser.description = (
        "Publish a pipeline or model on the Hub, after showing its card. License, datasets, results and images are those of the "
        "card that training has written beside the model, unless they are given."
    )
    parser.add_argument("folder", help="The folder of the pipeline or model.")
    parser.add_argument("repo_id", help="The repository, such as user/my-model.")
    parser.add_argument("--license", help="The Hub's identifier of a license, such as apache-2.0.")
    parser.add_argument("--datasets", nargs="+", help="The datasets' repositories on the Hub.")
    parser.add_argument("--samples", help="An image to show in the card.")
    parser.add_argument("--private", action="store_true", help="Create the repository as a private one.")
    parser.add_argument("--revision", help="The branch to commit to.")
    parser.add_argument("--create_pr", action="store_true", help="Open a pull request.")
    parser.add_argument(
        "--core", default="copy", choices=["copy", "reference"], help="How to store a grown model's core."
    )
    parser.add_argument("--yes", action="store_true", help="Do not ask.")
    parser.set_defaults(run="publishing:push")


def add_data(commands) -> None:
    data = commands.add_parser("data", help="Look at training data.")
    parser = data.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "check", help="Show what of a folder would be trained on: counts, sizes, captions, broken rows, copies."
    )
    parser.add_argument("folder", help="The folder that --train_data_dir would name.")
    parser.add_argument("--image_column", default="image", help="Default: %(default)s.")
    parser.add_argument("--caption_column", default="text", help="Default: %(default)s.")
    parser.add_argument("--train_split", help="The split to train on.")
    parser.add_argument("--validation_split", help="The split to hold out.")
    parser.add_argument("--contact_sheet", metavar="PNG", help="Write a sheet of images with their captions.")
    parser.add_argument("--num_shown", type=int, default=32, help="How many images it shows. Default: %(default)s.")
    parser.set_defaults(run="data:check")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "greedy-grow",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=metadata.version("diffusers-greedy-grow"))
    parser.add_argument("--debug", action="store_true", help="Show the traceback of every error.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    # Their other arguments are those of the script, which answers to `--help` itself.
    scripts = {
        "train": (
            "grow.py",
            "Train a core, grow it and train what is new: training_examples/grow.py with accelerate.",
        ),
        "lora": ("train_lora.py", "Train a LoRA: training_examples/train_lora.py with accelerate."),
    }
    for command, (script, text) in scripts.items():
        train = commands.add_parser(command, help=text, add_help=False)
        train.add_argument("--launch", default="", help='Arguments of accelerate, such as "--num_processes 4".')
        train.set_defaults(run="training:train", takes_more=True, command=command, script=script)
    plan = commands.add_parser("plan", help="Show what a training would cost, without weights.", add_help=False)
    plan.set_defaults(run="training:plan", takes_more=True)

    sample = commands.add_parser("sample", help="Draw images from prompts.")
    sample.add_argument("prompts", nargs="*", metavar="PROMPT", help="What to draw; none for an unconditional model.")
    add_model(sample)
    add_drawing(sample, guidance_scale=4.0)
    sample.add_argument("--num_images", type=int, default=1, help="Images per prompt. Default: %(default)s.")
    sample.add_argument("--height", type=int, help="Pixels; any resolution inside the model, too.")
    sample.add_argument("--width", type=int, help="Pixels.")
    sample.add_argument("--core_first", help='"auto" or a noise level: faster, see the README.')
    sample.add_argument("--guidance_resolution", default="full", choices=["full", "core"], help="core is faster.")
    sample.set_defaults(run="drawing:sample")

    upscale = commands.add_parser("upscale", help="Draw the detail of small images.")
    upscale.add_argument("images", nargs="+", metavar="IMAGE", help="The image files.")
    add_model(upscale)
    add_drawing(upscale, guidance_scale=1.0)
    upscale.add_argument("--prompt", help="What the images show.")
    upscale.add_argument("--strength", type=float, default=1.0, help="Below 1 leaves less to chance.")
    upscale.add_argument("--exact", action="store_true", help="Let the result, pooled, be the image.")
    upscale.add_argument(
        "--tile_overlap", type=int, help="Upscale larger images in tiles that overlap by so many pixels."
    )
    upscale.set_defaults(run="drawing:upscale")

    inspect = commands.add_parser("inspect", help="Show a model's resolutions, parts, license and lineage.")
    inspect.add_argument(
        "model", help="A pipeline or model: its folder, or its repository, of which no weights are read."
    )
    inspect.add_argument("--revision", help="The branch, tag or commit of the repository.")
    inspect.set_defaults(run="inspection:inspect")

    add_app(commands)
    add_grow(commands)
    add_push(commands)
    add_data(commands)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run a command. An error that a user can mend ends in one line, `error: ...`, and exit code 2."""
    parser = build_parser()
    try:
        import argcomplete
    except ImportError:
        pass
    else:
        argcomplete.autocomplete(parser)
    args, rest = parser.parse_known_args(argv)
    if rest and not getattr(args, "takes_more", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    module, function = args.run.split(":")
    run = getattr(import_module(f".{module}", __package__), function)
    if module == "training":  # it becomes another program, which explains its own errors
        return run(args)
    from diffusers_greedy_grow.training.errors import run_script

    run_script(lambda: run(args))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
