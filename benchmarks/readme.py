"""Fills the results of README.md, docs/results.md and docs/models.md from benchmarks/results.

Linear layers come from gemm.json, convolutions and networks from conv.json, training steps from
training.json, and the accuracy table is demo.md as ``tetris demo --full --out benchmarks/results``
writes it. Transformers come from transformer.json.

    python -m benchmarks.readme [--check] [--readme PAGE ...]

Text between ``<!-- NAME -->`` and ``<!-- /NAME -->`` is replaced. ``--check`` changes nothing
and fails if the file would change, or if a section is empty.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from . import training, transformer
from .conv_report import network_table, summary_table
from .provenance import measured_on
from .report import headline, ordered, rival_table, table, training_table
from .sweep import FEW_TOKENS
from .targets import (
    Verdict,
    against_conv2d,
    block_height,
    geometric_mean,
    judge,
    judge_convolutions,
)

PAGES = [Path("README.md"), Path("docs/results.md"), Path("docs/models.md")]
FEW_BLOCKS = ("1x1", "4x1", "16x1", "16x16")  # shown in the table of few tokens


def claim(result: dict) -> str | None:
    """One sentence for the first screen: 90 % sparsity, one thread, many tokens.

    None where the result lacks one of the blocks it speaks of.
    """
    rows = [
        r
        for r in result["rows"]
        if r["isa"] == result["native_isa"]
        and r["threads"] == 1
        and r["tokens"] >= 128
        and r["sparsity"] == 0.9
    ]

    shapes = len({r["shape"] for r in rows})
    speeds = []
    for block in ("16x16", "4x1", "1x1"):
        points = [r["speedup"] for r in rows if r["block"] == block]
        if not points:
            return None
        speeds.append(f"**{geometric_mean(points):.1f} times**")
    return (
        f"On one core of the machine named below, a 90 % sparse layer runs {speeds[0]} as fast as "
        f"the fastest dense library with 16x16 blocks, {speeds[1]} with 4x1 blocks and {speeds[2]} "
        f"with no block structure at all (geometric means over {shapes} layer shapes with at least "
        "128 tokens, both permutations included)."
    )


def few_tokens_table(result: dict) -> str:
    """Speed-ups at 16 tokens and at one, native instruction set."""
    rows = [
        r for r in result["rows"] if r["isa"] == result["native_isa"] and r["tokens"] <= FEW_TOKENS
    ]
    sparsities = ordered(rows, "sparsity")
    lines = []
    for shape in ordered(rows, "shape"):
        for threads in ordered(rows, "threads"):
            for block in FEW_BLOCKS:
                found = {
                    r["sparsity"]: f"{r['speedup']:.2f}x"
                    for r in rows
                    if (r["shape"], r["threads"], r["block"]) == (shape, threads, block)
                }
                if found:
                    cells = (found.get(s, "") for s in sparsities)
                    lines.append([shape, str(threads), block, *cells])
    return table(["shape", "threads", "block", *(f"{s:.0%}" for s in sparsities)], lines)


def targets_sentence(result: dict) -> str:
    """How many of our own targets were met, group by group."""
    verdicts = judge(result["rows"], result["training"])
    tall = [v for v in verdicts if v.what.startswith(">=") and block_height(v.block) >= 4]
    return (
        f"Our own targets that were met, one and two threads: {_counts(verdicts)}. Of those for "
        f"many tokens, blocks of four rows and more met {sum(v.passed for v in tall)} of "
        f"{len(tall)}."
    )


def _counts(verdicts: list[Verdict]) -> str:
    groups = []
    for what in dict.fromkeys(v.what for v in verdicts):
        some = [v for v in verdicts if v.what == what]
        groups.append(f"{what}: {sum(v.passed for v in some)} of {len(some)}")
    return "; ".join(groups)


def steps_fragments(result: dict) -> dict[str, str]:
    """The pieces about whole training steps."""
    first = result["rows"][0]
    threads = f"{first['threads']} thread{'s' * (first['threads'] > 1)}"
    return {
        "steps": training.table(result["rows"]),
        "steps-machine": measured_on(result, threads, f"optimizer {first['optimizer']}"),
    }


def conv_fragments(result: dict) -> dict[str, str]:
    """The pieces about convolutions and whole networks."""
    rows = result["rows"]
    made = {
        "conv-machine": measured_on(result),
        "conv": "\n\n".join(
            f"Batch {batch}, 1 thread:\n\n{summary_table(rows, 1, batch)}"
            for batch in ordered(rows, "batch")
        ),
        "conv-targets": (
            "Our own targets that were met, one and two threads, against the fastest route: "
            f"{_counts(judge_convolutions(rows))}; against `F.conv2d` alone: "
            f"{_counts(judge_convolutions(against_conv2d(rows)))}."
        ),
    }
    if result["networks"]:
        made["networks"] = network_table(result["networks"])
    return made


def transformer_fragments(result: dict) -> dict[str, str]:
    """The pieces about transformers."""
    rows, threads = result["rows"], result["threads"]
    return {
        "transformer": f"{transformer.speed_table(rows)}\n\n{transformer.losses(rows)}",
        "transformer-machine": measured_on(result, f"{threads} thread{'s' * (threads > 1)}"),
    }


def fragments(result: dict) -> dict[str, str]:
    """Every generated piece by name."""
    threads = sorted({r["threads"] for r in result["rows"]})
    made = {
        "machine": measured_on(result),
        "results": "\n\n".join(
            f"{count} thread{'s' * (count > 1)}:\n\n{headline(result, count)}" for count in threads
        ),
    }
    if sentence_of_claim := claim(result):
        made["claim"] = sentence_of_claim
    made["few"] = few_tokens_table(result)
    made["targets"] = targets_sentence(result)
    if result["training"]:
        made["training"] = training_table([r for r in result["training"] if r["threads"] == 1])
    if result["rivals"]:
        made["rivals"] = rival_table(result["rivals"])
    return made


def fill(text: str, pieces: dict[str, str]) -> str:
    """The text with every named piece replaced; unknown names stay as they are."""
    for name, piece in pieces.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text = re.sub(pattern, lambda m, piece=piece: f"{m[1]}{piece}\n{m[2]}", text, flags=re.S)
    return text


def empty_sections(text: str) -> list[str]:
    """Names of the sections that have nothing between their markers."""
    return re.findall(r"<!-- ([\w-]+) -->\s*<!-- /\1 -->", text)


def main(argv: list[str] | None = None) -> int:
    """Rewrites the pages, or checks them."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.readme",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--check", action="store_true", help="only say whether it is up to date")
    made.add_argument("--json", type=Path, default=Path("benchmarks/results/gemm.json"))
    made.add_argument("--readme", type=Path, nargs="+", default=PAGES, metavar="PAGE")
    args = made.parse_args(argv)
    if not args.json.exists():
        print(f"{args.json} is missing: run python -m benchmarks.gemm first", file=sys.stderr)
        return 1
    result = json.loads(args.json.read_text())
    pieces = fragments(result)
    folder = args.json.parent
    if (folder / "demo.md").exists():
        pieces["demo"] = (folder / "demo.md").read_text().strip()
    if (folder / "conv.json").exists():
        pieces |= conv_fragments(json.loads((folder / "conv.json").read_text()))
    if (folder / "training.json").exists():
        pieces |= steps_fragments(json.loads((folder / "training.json").read_text()))
    if (folder / "transformer.json").exists():
        pieces |= transformer_fragments(json.loads((folder / "transformer.json").read_text()))
    curves = folder / f"speedup-{result['native_isa']}-1t.png"
    if curves.exists():
        pieces["curves"] = f"![speed-up against sparsity, per shape and block]({curves.as_posix()})"
    outdated = False
    for page in args.readme:
        before = page.read_text()
        after = fill(before, pieces)
        if not args.check:
            page.write_text(after)
            print(f"{page} filled from {folder}")
            continue
        if empty := empty_sections(after):
            print(
                f"{page}: nothing measured for {', '.join(empty)}: see HACKING.md, How to measure"
            )
            return 1
        outdated |= after != before
    if args.check:
        print("out of date: run python -m benchmarks.readme" if outdated else "up to date")
    return int(outdated)


if __name__ == "__main__":
    sys.exit(main())
