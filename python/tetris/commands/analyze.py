"""``tetris analyze``: which layers of a file would gain by becoming sparse, and at which blocks."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .arguments import (
    add_json,
    block_shape,
    check_output,
    checked,
    count,
    number,
    sizes,
    sparsity_share,
    text_stream,
    threads,
    write_output,
)

DESCRIPTION = """\
Reads the weights of a safetensors file, and says for each how much saliency
blocks would retain with and without reordering, how fast they are predicted to
be on this machine's CPU, and which of them to use, if any. No model code is
needed, so sizes of inputs come from options: every linear layer gets as many
tokens, every convolution a map of one size, stride 1 and one group.

  tetris analyze model.safetensors --tokens 128
  tetris analyze resnet.safetensors --map 28x28 --include layer2
  tetris analyze model.safetensors --exclude '*embed*' --json analysis.json

Times are predicted; `tetris calibrate` makes them those of this machine. With
the model's code, tetris.analyze(model, example_inputs) sees the real sizes, and
measures as well; it also knows weights that are stored transposed, as GPT-2's.
"""

BLOCKS = "4x1 16x1 16x16"
SPARSITY = "75 90"


def add_parser(commands: Any) -> None:
    """Adds ``analyze`` to the subcommands of argparse."""
    made = commands.add_parser(
        "analyze",
        help="which layers of a file would gain by becoming sparse",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("file", type=Path, metavar="FILE.safetensors", help="weights of a model")
    add(
        "--tokens",
        type=checked(count),
        default=512,
        metavar="N",
        help="tokens that every linear layer gets: batch times sequence length (default: 512)",
    )
    add(
        "--map",
        type=checked(sizes("HxW")),
        default=(14, 14),
        metavar="HxW",
        help="input of every convolution (default: 14x14)",
    )
    add("--batch", type=checked(count), default=1, metavar="N", help="images (default: 1)")
    add(
        "--blocks",
        nargs="+",
        type=checked(block_shape),
        default=[block_shape(text) for text in BLOCKS.split()],
        metavar="HxW",
        help=f"height along outputs x width along inputs (default: {BLOCKS})",
    )
    add(
        "--sparsity",
        nargs="+",
        type=checked(sparsity_share),
        default=[sparsity_share(text) for text in SPARSITY.split()],
        metavar="PERCENT",
        help=f"shares of the blocks to remove (default: {SPARSITY})",
    )
    add(
        "--include",
        nargs="+",
        default=["*"],
        metavar="PATTERN",
        help="names of layers, as sparsify takes them: 'layer2', '*.fc1'",
    )
    add("--exclude", nargs="+", default=[], metavar="PATTERN", help="the same; wins")
    add(
        "--threads",
        type=checked(threads),
        metavar="N",
        help="threads to predict for (default: torch's choice)",
    )
    add(
        "--seconds",
        type=checked(number),
        default=0.5,
        metavar="S",
        help="of the search for each layer, block and sparsity (default: 0.5)",
    )
    add_json(add, "what was found")
    made.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Analyzes the file and prints what was found, writes the JSON file."""
    from ..analysis.weights import analyze_file

    check_output("--json", args.json)
    report = analyze_file(
        args.file,
        tokens=args.tokens,
        size=args.map,
        batch=args.batch,
        blocks=args.blocks,
        sparsities=args.sparsity,
        include=args.include,
        exclude=args.exclude,
        threads=args.threads,
        progress=sys.stderr.isatty(),
        budget=args.seconds,
    )
    print(report, file=text_stream(args.json))
    if args.json:
        write_output(args.json, json.dumps(report.to_dict(), indent=1))
