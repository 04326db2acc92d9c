#!/usr/bin/env python3
"""Products of a frozen model in PyTorch beside those of `flmm bench kernels`, in bf16.

    python3 -m venv target/bench && target/bench/bin/pip install torch numpy
    cargo build --release
    target/bench/bin/python benches/compare_kernels.py target/release/flmm --rounds 9 --threads 1

A prompt's product, a decoding step's product, and causal attention that gives its probabilities, as the reference needs
them. The rounds take turns, so that whatever else the machine does hits both, and medians are compared.
"""

import argparse
import json
import statistics
import subprocess
import time

import torch

HEADS, HEAD_DIM = 32, 128


class Theirs:
    def __init__(self, tokens, inputs, outputs):
        self.x, self.weight = torch.randn(tokens, inputs).bfloat16(), torch.randn(outputs, inputs).bfloat16()
        self.qkv = [torch.randn(1, HEADS, tokens, HEAD_DIM).bfloat16() for _ in range(3)]
        self.mask = torch.full((tokens, tokens), torch.finfo(torch.bfloat16).min, dtype=torch.bfloat16).triu(1)

    def prompt(self):
        return torch.nn.functional.linear(self.x, self.weight)

    def decode(self):
        return torch.nn.functional.linear(self.x[:1], self.weight)

    def attention(self):
        q, k, v = self.qkv
        scores = q @ k.transpose(2, 3) / HEAD_DIM**0.5 + self.mask
        probs = torch.softmax(scores, -1, dtype=torch.float32).bfloat16()
        return probs @ v


CASES = {"prompt bf16": "prompt", "decode bf16": "decode", "causal attention bf16": "attention"}


def timed(work):
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("flmm")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=640)
    parser.add_argument("--inputs", type=int, default=4096)
    parser.add_argument("--outputs", type=int, default=11008)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    theirs = Theirs(args.tokens, args.inputs, args.outputs)
    sizes = ["--tokens", str(args.tokens), "--inputs", str(args.inputs), "--outputs", str(args.outputs)]
    command = [args.flmm, "--threads", str(args.threads), "bench", "kernels", "--json", "--rounds", "3", *sizes]
    times = {name: ([], []) for name in CASES}
    with torch.inference_mode():
        for method in CASES.values():
            getattr(theirs, method)()
        for _ in range(args.rounds):
            report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            found = {case["name"]: case for case in report["cases"]}
            for name, method in CASES.items():
                ours = found[name]
                times[name][0].append((ours["work"] / ours["median"], ours["work"] / ours["per_cpu_second"]))
                rounds = [timed(getattr(theirs, method)) for _ in range(3)]
                times[name][1].append(tuple(statistics.median(r[i] for r in rounds) for i in (0, 1)))
    print(f"{'medians, ms':24}{'flmm':>9}{'PyTorch':>9}{'ratio':>7}   processor:{'flmm':>9}{'PyTorch':>9}{'ratio':>7}")
    for name, (ours, other) in times.items():
        line = f"{name:24}"
        for i in (0, 1):
            mine, yours = (1e3 * statistics.median(r[i] for r in rounds) for rounds in (ours, other))
            ratio = statistics.median(b[i] / a[i] for a, b in zip(ours, other))
            line += f"{mine:9.1f}{yours:9.1f}{ratio:6.2f}x" + (" " * 13 if i == 0 else "")
        print(line)
    print(f"PyTorch {torch.__version__}, {args.threads} thread(s); ratio: how many times faster flmm is, median of the rounds")


if __name__ == "__main__":
    main()
