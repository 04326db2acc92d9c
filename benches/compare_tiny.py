#!/usr/bin/env python3
"""A pre-training step of flmm-tiny's decoder in PyTorch + transformers beside the same step of `flmm-tiny codes`.

    python3 -m venv target/bench && target/bench/bin/pip install torch transformers
    cargo build --release
    target/bench/bin/python benches/compare_tiny.py target/release/flmm-tiny --rounds 3

Both read eight scenes of packed conversations that see the picture and not one another, as many tokens as flmm-tiny says
that it read, on one thread in f32: loss on a quarter of the tokens behind the picture, all gradients, clipping, AdamW. What
flmm-tiny does besides, it does in its own time: it makes scenes and their texts. Rounds take turns; medians are compared.
"""

import argparse
import json
import os
import pathlib
import re
import resource
import statistics
import subprocess
import tempfile
import time

STEPS, SCENES, IMAGE, CONVERSATIONS = 50, 8, 144, 8
ROOT = pathlib.Path(__file__).resolve().parent.parent


def flmm(program, folder):
    """Seconds and processor seconds of a step, and its tokens; the run's own start is left out."""
    command = [program, "--out", folder, "--level", "2", "codes", "--from", str(ROOT / "models/flmm-tiny/lmm")]
    command += ["--alignment", "0", "--workers", "1", "--lr", "1e-5", "--evaluation-scenes", "1"]
    one = {"RAYON_NUM_THREADS": "1", "CANDLE_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    quiet = {"stdout": subprocess.DEVNULL, "check": True}
    subprocess.run(command + ["--steps", str(STEPS)], env=os.environ | one, cwd=ROOT, **quiet)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    last = (pathlib.Path(folder) / "codes/log.txt").read_text().strip().split("\n")
    found = [re.match(rf"step {STEPS} .*steps/s ([0-9.]+) tokens ([0-9]+)", line) for line in last]
    rate, tokens = next(match for match in found if match).groups()
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return 1 / float(rate), processor / STEPS, int(tokens)


class PyTorch:
    def __init__(self, tokens):
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.set_num_threads(1)
        torch.manual_seed(1)
        config = json.loads((ROOT / "models/flmm-tiny/lmm/config.json").read_text())["text_config"]
        self.torch, self.model = torch, LlamaForCausalLM(LlamaConfig(**config, attn_implementation="sdpa"))
        self.adam = torch.optim.AdamW(self.model.parameters(), lr=1e-5, betas=(0.9, 0.98), weight_decay=0.02)
        rows = max(tokens // SCENES, IMAGE + CONVERSATIONS)
        # Who sees whom: everything causal, and what is said, only by its own conversation.
        talk = (torch.arange(rows) - IMAGE).clamp_min(-1) * CONVERSATIONS // max(rows - IMAGE, 1)
        see = (talk[None, :] < 0) | (talk[:, None] == talk[None, :])
        see &= torch.arange(rows)[:, None] >= torch.arange(rows)[None, :]
        self.mask = torch.zeros(rows, rows).masked_fill(~see, torch.finfo(torch.float32).min)
        self.mask = self.mask.expand(SCENES, 1, rows, rows)
        self.embeds = torch.randn(SCENES, rows, config["hidden_size"])
        self.targets = torch.arange(IMAGE, rows, 4)
        self.labels = torch.randint(0, config["vocab_size"], (SCENES, len(self.targets)))

    def step(self):
        torch = self.torch
        hidden = self.model.model(inputs_embeds=self.embeds, attention_mask=self.mask, use_cache=False)[0]
        logits = self.model.lm_head(hidden[:, self.targets])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), self.labels.flatten())
        self.adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.adam.step()

    def round(self):
        wall, processor = time.perf_counter(), time.process_time()
        for _ in range(STEPS):
            self.step()
        return (time.perf_counter() - wall) / STEPS, (time.process_time() - processor) / STEPS


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", help="flmm-tiny")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch, rounds = None, []
    for number in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as folder:
            wall, processor, tokens = flmm(os.path.abspath(arguments.program), folder)
        if torch is None:
            torch = PyTorch(tokens)
            torch.step()  # which only warms up
        their_wall, their_processor = torch.round()
        rounds.append((wall, their_wall, processor, their_processor))
        print(
            f"round {number + 1}: {tokens} tokens; flmm-tiny {wall:.3f} s a step, PyTorch {their_wall:.3f} s; "
            f"processor {processor:.3f} and {their_processor:.3f} s",
            flush=True,
        )
    medians = [statistics.median(column) for column in zip(*rounds)]
    ratios = [statistics.median(a[i] / a[i + 1] for a in rounds) for i in (0, 2)]
    print(f"flmm-tiny / PyTorch: medians {medians[0] / medians[1]:.2f}, median of the rounds {ratios[0]:.2f}, "
          f"processor time {ratios[1]:.2f} (with flmm-tiny's start and evaluation)")


main()
