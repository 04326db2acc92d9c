#!/usr/bin/env python3
"""Grounding phrases of a text in PyTorch + transformers beside `flmm bench ground`, with the same weights.

    python3 -m venv target/bench && target/bench/bin/pip install torch numpy transformers==5.24.0 safetensors 'pillow<13'
    cargo build --release && cargo run --release -p xtask -- random-model deepseek-vl-1.3b --out target/model
    target/bench/bin/python benches/compare_ground.py target/release/flmm target/model examples/scene.png

The picture goes through the LMM, the U-Net and SAM; picture, text and tokens are the same on all sides. Each side is a
process of its own, so that each has its own peak of memory. Sides take turns in every round, and who comes first takes
turns too, so that whatever else the machine does hits all; medians are compared. Processor time is the steadiest.

LLaVA-1.6 reads as many tokens as the picture's shape allows: 2,928 of the picture if that is a square of 672 pixels.
PyTorch's bf16 products are slow on processors without instructions for them: `--torch-dtype f32` is what one would take
there.
"""

import argparse
import glob
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile

import numpy

TEXT = "a dog near the old tree and a red ball"
PHRASES = ["a dog", "the old tree", "a red ball"]
PARTS = ("wall", "cpu")


class PyTorch:
    """The other side: a process that makes a pass when told to."""

    def __init__(self, command, warm_up):
        self.command, self.warm_up, self.process = command, warm_up, None

    def take(self):
        if self.process is None:
            self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            if self.warm_up:
                self.one()
        return self.one()

    def one(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"the PyTorch side ended with status {self.process.wait()}")
        return json.loads(line)

    def close(self):
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()
            self.process = None


def flmm(command):
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    floor, rounds = {stage["name"]: stage["floor"] for stage in report["stages"]}, report["rounds"]
    # The stages come first and warm up; the whole is what a user gets.
    last = {"stages": rounds["stages"][-1], "whole": rounds["whole"][-1], "decode": [*rounds["decode"], None][0]}
    return report | last | {"floor": floor}


def decoded(segmentation):
    """COCO's compressed run lengths as an array of booleans."""
    runs, at, text = [], 0, segmentation["counts"].encode()
    while at < len(text):
        value, shift, more = 0, 0, True
        while more:
            byte = text[at] - 48
            value |= (byte & 31) << shift
            more, at, shift = bool(byte & 32), at + 1, shift + 5
            if not more and byte & 16:
                value |= -1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
    height, width = segmentation["size"]
    flat = numpy.repeat(numpy.arange(len(runs)) % 2 == 1, runs)
    return flat.reshape(width, height).T


def masks_of(report):
    return {kind: numpy.stack([decoded(mask[kind]) for mask in report["masks"]]) for kind in ("refined", "coarse")}


def costs(results, decode):
    """Wall and processor seconds of every stage, the whole and one more token: medians."""
    columns = [*zip(*(result["stages"] for result in results)), [result["whole"] for result in results]]
    found = [[statistics.median(times[part] for times in column) for part in PARTS] for column in columns]
    if decode:
        found.append([statistics.median(result["decode"][part] for result in results) / decode for part in PARTS])
    return found


def weights_of(model, dtype, sam_dtype):
    """Bytes of the weights that flmm keeps, which copies all: from the headers of the bundle's files."""
    total = 0
    for part in ("lmm", "sam", "head"):
        for path in glob.glob(os.path.join(model, part, "*.safetensors")):
            with open(path, "rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            for name, about in header.items():
                if name != "__metadata__":
                    total += math.prod(about["shape"]) * bytes_each(part, name, len(about["shape"]), dtype, sam_dtype)
    return total


def bytes_each(part, name, axes, dtype, sam_dtype):
    """Bytes of each number of a tensor in flmm's memory."""
    matrix = axes == 2 and name.endswith(".weight")
    # Of eight-bit weights 128 share a scale of two bytes.
    sizes = {"f32": 4, "bf16": 2, "int8": 1 + 2 / 128}
    if part == "lmm":
        # Tables stay bf16.
        return sizes[dtype] if matrix and "embed" not in name else 2
    if part == "sam" and not name.startswith("image_encoder."):
        return 0  # the head's prompt encoder and mask decoder take their place
    return sizes[sam_dtype] if part == "sam" and matrix else 4


def beside(sizes):
    """Two numbers of bytes, and the first as a part of the second."""
    ours, theirs = sizes
    return f"{ours / 2**30:.2f} / {theirs / 2**30:.2f} GiB = {100 * ours / theirs:.0f} %"


def agreement(ours, theirs, others, decode):
    """What of the masks and of the tokens generated is the same."""
    mine = masks_of(ours)
    pixels = [f"{kind} {100 * (mine[kind] == others[kind]).mean():.3f} %" for kind in mine]
    text = f"equal pixels: {', '.join(pixels)}"
    if decode:
        same = [a == b for a, b in zip(ours["generated"], theirs["generated"])]
        first = same.index(False) if False in same else len(same)
        text += f"; equal greedy tokens: {sum(same)} of {len(same)}, the first {first} in a row"
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("flmm", help="the flmm binary")
    parser.add_argument("model", help="a bundle: lmm/, sam/, head/")
    parser.add_argument("picture")
    parser.add_argument("--text", default=TEXT)
    parser.add_argument("--phrase", action="append", help="part of the text, may be repeated")
    parser.add_argument("--dtype", nargs="+", choices=["bf16", "int8"], default=["bf16", "int8"], help="flmm's LMM")
    parser.add_argument("--sam-dtype", choices=["f32", "bf16", "int8"], help="flmm's SAM [default: as its LMM]")
    parser.add_argument("--torch-dtype", choices=["bf16", "f32"], default="bf16", help="PyTorch's LMM")
    parser.add_argument("--sam-attention", choices=["eager", "sdpa"], default="eager", help="PyTorch's SAM")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--decode", type=int, default=16, help="tokens that all generate behind the text")
    parser.add_argument("--cold", action="store_true", help="do not warm PyTorch up, for passes of many minutes")
    parser.add_argument("--separate", action="store_true", help="open PyTorch's models anew in every round, to save memory")
    args = parser.parse_args()
    threads = str(args.threads)
    os.environ.update(OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads)
    ours = [args.flmm, "--threads", threads, "bench", "ground", args.picture, "--text", args.text, "--model", args.model]
    ours += [word for phrase in args.phrase or PHRASES for word in ("--phrase", phrase)]
    ours += ["--decode", str(args.decode), "--json", "--pass-only", "--warmup", "0", "--rounds", "1"]
    sam = {side: args.sam_dtype or side for side in args.dtype}
    ours = {side: [*ours, "--dtype", side, "--sam-dtype", sam[side]] for side in args.dtype}
    worker = os.path.join(os.path.dirname(os.path.abspath(__file__)), "pytorch_ground.py")
    with tempfile.TemporaryDirectory() as folder:
        about, masks = os.path.join(folder, "about.json"), os.path.join(folder, "masks.npz")
        theirs = [sys.executable, worker, args.model, args.picture, about, masks, "--threads", threads]
        theirs += ["--decode", str(args.decode), "--dtype", args.torch_dtype, "--sam-attention", args.sam_attention]
        theirs = PyTorch(theirs, not args.cold)
        with open(about, "w") as file:
            json.dump(flmm(ours[args.dtype[0]]), file)
        sides = ["PyTorch", *args.dtype]
        results = {side: [] for side in sides}
        for number in range(args.rounds):
            for turn in range(len(sides)):
                side = sides[(number + turn) % len(sides)]
                results[side].append(theirs.take() if side == "PyTorch" else flmm(ours[side]))
                if args.separate:
                    theirs.close()
            print(f"round {number + 1}: " + ", ".join(f"{s} {results[s][-1]['whole']['wall']:.2f} s" for s in sides), flush=True)
        theirs.close()
        others = dict(numpy.load(masks))
    other, base = results["PyTorch"][-1], costs(results["PyTorch"], args.decode)
    names = [*other["names"], "whole", "one more token"][: len(base)]
    for side in args.dtype:
        report, mine = results[side][-1], costs(results[side], args.decode)
        print(f"\n{'flmm ' + side:16}{'flmm':>20}{'PyTorch':>20}{'PyTorch / flmm':>18}   (wall / processor, medians)")
        for name, *pair in zip(names, mine, base):
            times = "".join(f"{1e3 * wall:.0f} / {1e3 * cpu:.0f} ms".rjust(20) for wall, cpu in pair)
            print(f"{name:16}{times}" + " / ".join(f"{b / a:.2f}" for a, b in zip(*pair)).rjust(18))
        print(f"floor of the whole, processor time: {1e3 * report['floor']['whole']:.0f} ms")
        for part in PARTS:
            pairs = zip(results[side], results["PyTorch"])
            ratios = [b["whole"][part] / a["whole"][part] for a, b in pairs]
            print(f"whole, ratios of the rounds by {part} time: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
        for name in ("opening", "grounding"):
            most = [max(result["peak_memory"][name] for result in results[s]) for s in (side, "PyTorch")]
            print(f"peak memory, {name}: {beside(most)}")
        held = [weights_of(args.model, side, sam[side]), other["weights"]]
        above = [peak - weights for peak, weights in zip(most, held)]
        print(f"memory above the weights, grounding: {beside(above)} (weights: {beside(held)})")
        print(agreement(report, other, others, args.decode))
    print(
        f"\n{len(report['read']['token_ids'])} tokens, {len(report['masks'])} phrases, {threads} thread(s), SAM in flmm "
        f"{', '.join(sam.values())}; PyTorch {other['torch']}: LMM {args.torch_dtype}, SAM f32 ({args.sam_attention}); "
        f"{100 * others['refined'].mean():.0f} % of PyTorch's pixels are inside"
    )


if __name__ == "__main__":
    main()
