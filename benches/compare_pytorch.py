#!/usr/bin/env python3
"""One training step of a grounding head in PyTorch beside the same step of `flmm bench train-step`.

    python3 -m venv target/bench && target/bench/bin/pip install torch numpy
    cargo build --release
    target/bench/bin/python benches/compare_pytorch.py target/release/flmm --rounds 9 --threads 1

Both compute the mask head and SAM's decoder, the four losses, all gradients, clipping and AdamW, in f32 on the
processor. The rounds take turns, so that whatever else the machine does hits both, and medians are compared.
"""

import argparse
import json
import math
import statistics
import subprocess
import time

import torch
import torch.nn.functional as F
from torch import nn

LAYERS, HIDDEN = 32, 4096
HEIGHT, WIDTH = 480, 640
WIDTH_SAM, GRID, IMAGE = 256, 64, 1024
RESIZED = (768, 1024)


def unit(inputs, outputs, kernel):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), nn.GroupNorm(1, outputs), nn.ReLU(inplace=True)
    )


def block(inputs, outputs):
    return nn.Sequential(unit(inputs, outputs, 3), unit(outputs, outputs, 3))


class MaskHead(nn.Module):
    def __init__(self, channels, base):
        super().__init__()
        self.encoder = nn.ModuleList(block(channels if i == 0 else base << (i - 1), base << i) for i in range(4))
        self.up = nn.ModuleList(unit(base << (i + 1), base << i, 1) for i in range(3))
        self.decoder = nn.ModuleList(block(base << (i + 1), base << i) for i in range(3))
        self.conv_seg = nn.Conv2d(base, 1, 1)

    def forward(self, maps):
        x = maps / maps.sum((2, 3), keepdim=True).clamp_min(1e-12)
        x = F.interpolate(x, scale_factor=64 / maps.shape[-1], mode="bilinear")
        outputs = []
        for i, stage in enumerate(self.encoder):
            x = stage(x if i == 0 else F.max_pool2d(x, 2))
            outputs.append(x)
        for i in (2, 1, 0):
            up = self.up[i](F.interpolate(x, scale_factor=2, mode="bilinear"))
            x = self.decoder[i](torch.cat([outputs[i], up], 1))
        return self.conv_seg(x)[:, 0]


class ChannelNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        mean = x.mean(1, keepdim=True)
        centred = x - mean
        normed = centred / torch.sqrt(centred.pow(2).mean(1, keepdim=True) + 1e-6)
        return normed * self.weight[:, None, None] + self.bias[:, None, None]


class Attention(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH_SAM, inner) for _ in range(3))
        self.out = nn.Linear(inner, WIDTH_SAM)

    def forward(self, q, k, v):
        def split(x):
            return x.unflatten(-1, (8, -1)).transpose(1, 2)

        y = F.scaled_dot_product_attention(split(self.q(q)), split(self.k(k)), split(self.v(v)))
        return self.out(y.transpose(1, 2).flatten(2))


class TwoWay(nn.Module):
    def __init__(self, first):
        super().__init__()
        self.first = first
        self.self_attn, self.to_image, self.from_image = Attention(256), Attention(128), Attention(128)
        self.mlp = nn.Sequential(nn.Linear(256, 2048), nn.ReLU(), nn.Linear(2048, 256))
        self.norms = nn.ModuleList(nn.LayerNorm(256) for _ in range(4))

    def forward(self, tokens, pe, image, image_pe):
        if self.first:
            tokens = self.self_attn(tokens, tokens, tokens)
        else:
            q = tokens + pe
            tokens = tokens + self.self_attn(q, q, tokens)
        tokens = self.norms[0](tokens)
        keys = image + image_pe
        tokens = self.norms[1](tokens + self.to_image(tokens + pe, keys, image))
        tokens = self.norms[2](tokens + self.mlp(tokens))
        image = self.norms[3](image + self.from_image(keys, tokens + pe, tokens))
        return tokens, image


class Refiner(nn.Module):
    def __init__(self):
        super().__init__()
        self.gaussian = nn.Buffer(torch.randn(2, 128))
        self.corners = nn.Parameter(torch.randn(2, 256))
        self.downscaling = nn.Sequential(
            nn.Conv2d(1, 4, 2, 2), ChannelNorm(4), nn.GELU(), nn.Conv2d(4, 16, 2, 2), ChannelNorm(16), nn.GELU(),
            nn.Conv2d(16, 256, 1),
        )
        self.own_tokens = nn.Parameter(torch.randn(5, 256))
        self.layers = nn.ModuleList([TwoWay(True), TwoWay(False)])
        self.final, self.final_norm = Attention(128), nn.LayerNorm(256)
        self.upscaling = nn.Sequential(
            nn.ConvTranspose2d(256, 64, 2, 2), ChannelNorm(64), nn.GELU(), nn.ConvTranspose2d(64, 32, 2, 2), nn.GELU()
        )
        self.hyper = nn.Sequential(
            nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 32)
        )
        axis = (torch.arange(GRID) + 0.5) / GRID
        self.image_pe = nn.Buffer(self.fourier(torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)).view(1, -1, 256))

    def fourier(self, points):
        v = 2 * math.pi * ((2 * points - 1) @ self.gaussian)
        return torch.cat([v.sin(), v.cos()], -1)

    def forward(self, embedding, coarse, texts):
        pad = min(-1.0, coarse.detach().min().item())
        prompt = F.interpolate(coarse[:, None], RESIZED, mode="bilinear")
        prompt = F.pad(prompt, (0, IMAGE - RESIZED[1], 0, IMAGE - RESIZED[0]), value=pad)
        dense = self.downscaling(F.interpolate(prompt, (256, 256), mode="bilinear"))
        with torch.no_grad():
            inside = F.interpolate(coarse.sigmoid()[:, None], (HEIGHT, WIDTH), mode="bilinear")[:, 0] > 0.5
            boxes = []
            for mask in inside:
                rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
                box = (0, 0, WIDTH, HEIGHT)
                if len(rows):
                    box = (columns[0].item(), rows[0].item(), columns[-1].item() + 1, rows[-1].item() + 1)
                boxes.append(box)
            boxes = torch.tensor(boxes).view(-1, 2, 2) * torch.tensor([RESIZED[1] / WIDTH, RESIZED[0] / HEIGHT])
            corners = self.fourier((boxes + 0.5) / IMAGE)
        corners = corners + self.corners
        masks = [None] * len(texts)
        for length in sorted({len(text) for text in texts}):
            group = [i for i, text in enumerate(texts) if len(text) == length]
            sparse = torch.cat([corners[group], torch.stack([texts[i] for i in group])], 1)
            pe = torch.cat([self.own_tokens.expand(len(group), -1, -1), sparse], 1)
            tokens, image = pe, (embedding + dense[group]).flatten(2).transpose(1, 2)
            for layer in self.layers:
                tokens, image = layer(tokens, pe, image, self.image_pe)
            tokens = self.final_norm(tokens + self.final(tokens + pe, image + self.image_pe, image))
            up = self.upscaling(image.transpose(1, 2).reshape(-1, 256, GRID, GRID))
            for i, mask in zip(group, torch.einsum("nc,nchw->nhw", self.hyper(tokens[:, 1]), up)):
                masks[i] = mask
        masks = F.interpolate(torch.stack(masks)[:, None], (IMAGE, IMAGE), mode="bilinear")
        masks = masks[:, :, : RESIZED[0], : RESIZED[1]]
        return F.interpolate(masks, (HEIGHT, WIDTH), mode="bilinear")[:, 0]


class Head(nn.Module):
    def __init__(self, channels, base):
        super().__init__()
        self.mask_head, self.refiner = MaskHead(channels, base), Refiner()
        self.text_proj = nn.Linear(HIDDEN, WIDTH_SAM)
        self.text_layer_weights = nn.Parameter(torch.ones(LAYERS))

    def forward(self, maps, hidden, lengths, embedding):
        coarse = self.mask_head(maps)[:, 8:56]
        states = torch.einsum("l,ltd->td", self.text_layer_weights.softmax(0), hidden)
        return coarse, self.refiner(embedding, coarse, self.text_proj(states).split(lengths))


def loss(logits, target):
    eps = torch.finfo(torch.float32).eps
    n = len(logits)
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / (logits.numel() + eps)
    p, y = logits.sigmoid().flatten(1), target.flatten(1)
    dice = 1 - (2 * (p * y).sum(1) + 1) / (p.sum(1) + y.sum(1) + 1)
    return bce + dice.sum() / (n + eps)


class Step:
    """The step and its made-up sample."""

    def __init__(self, channels, phrases, base, grid=24):
        torch.manual_seed(1)
        self.head = Head(channels, base)
        self.optimizer = torch.optim.AdamW(self.head.parameters(), 1e-4, weight_decay=0.01)
        self.lengths = [2 + n % 2 for n in range(phrases)]
        self.maps = torch.rand(phrases, channels, grid, grid) * 0.01
        self.hidden = torch.rand(LAYERS, sum(self.lengths), HIDDEN) * 2 - 1
        self.embedding = torch.rand(1, WIDTH_SAM, GRID, GRID) * 2 - 1
        self.masks = torch.zeros(phrases, HEIGHT, WIDTH)
        for n in range(phrases):
            self.masks[n, 60 + 20 * n : 260 + 20 * n, 100:400] = 1

    def take(self):
        clock, processor = [time.perf_counter()], time.process_time()
        coarse, refined = self.head(self.maps, self.hidden, self.lengths, self.embedding)
        small = F.interpolate(self.masks[:, None], coarse.shape[1:], mode="nearest")[:, 0]
        total = loss(coarse, small) + loss(refined, self.masks)
        clock.append(time.perf_counter())
        total.backward()
        clock.append(time.perf_counter())
        nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        clock.append(time.perf_counter())
        return [b - a for a, b in zip(clock, clock[1:])] + [time.process_time() - processor]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("flmm", help="the flmm binary")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="steps of each side in one round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--channels", type=int, default=1024)
    parser.add_argument("--phrases", type=int, default=4)
    parser.add_argument("--base-channels", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    step = Step(args.channels, args.phrases, args.base_channels)
    command = [
        args.flmm, "--threads", str(args.threads), "bench", "train-step", "--json", "--warmup", "1",
        "--rounds", str(args.steps), "--channels", str(args.channels), "--phrases", str(args.phrases),
        "--base-channels", str(args.base_channels),
    ]  # fmt: skip
    step.take()
    ours, theirs, ratios = [], [], []
    for number in range(args.rounds):
        round_theirs = [step.take() for _ in range(args.steps)]
        report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        round_ours = [[r["forward"], r["backward"], r["optimizer"], r["cpu"]] for r in report["rounds"]]
        ours += round_ours
        theirs += round_theirs
        best = [min(sum(r[:3]) for r in rounds) for rounds in (round_ours, round_theirs)]
        ratios.append(best[0] / best[1])
        print(f"round {number + 1}: flmm {best[0]:.3f} s, PyTorch {best[1]:.3f} s, ratio {ratios[-1]:.2f}", flush=True)
    gflop = report["gflop"]
    print(f"\n{'':10}{'forward':>10}{'backward':>10}{'optimiser':>10}{'step':>10}{'processor':>10}{'GFLOP/s':>10}   (medians)")
    whole, cpu = [], []
    for name, rounds in (("flmm", ours), ("PyTorch", theirs)):
        parts = [statistics.median(r[i] for r in rounds) for i in range(4)]
        whole.append(statistics.median(sum(r[:3]) for r in rounds))
        cpu.append(parts.pop())
        print(f"{name:10}" + "".join(f"{1e3 * t:.0f} ms".rjust(10) for t in (*parts, whole[-1], cpu[-1])) + f"{gflop / whole[-1]:10.0f}")
    print(
        f"\nflmm / PyTorch {torch.__version__}, {args.threads} thread(s): {whole[0] / whole[1]:.2f} by medians, "
        f"{statistics.median(ratios):.2f} median of the rounds' ratios, {cpu[0] / cpu[1]:.2f} by processor time"
    )


if __name__ == "__main__":
    main()
