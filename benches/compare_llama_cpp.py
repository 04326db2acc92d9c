#!/usr/bin/env python3
"""Products of a frozen model in llama.cpp beside those of `flmm bench kernels`: BF16, F16, Q8_0 and Q4_0.

    python3 -m venv target/llama && target/llama/bin/pip install numpy
    CMAKE_ARGS="-DGGML_NATIVE=ON" target/llama/bin/pip install --no-binary llama-cpp-python llama-cpp-python
    cargo build --release
    target/llama/bin/python benches/compare_llama_cpp.py target/release/flmm --rounds 9 --threads 1

A prompt's product and a decoding step's product. ggml, llama.cpp's library of kernels, is called as the package installs
it, with f32 activations, as llama.cpp has them, and with weights laid out as llama.cpp lays them out when it opens a model:
formats for which it has one that suits the processor better are repacked. The rounds take turns, so that whatever else the
machine does hits both, and medians are compared.
"""

import argparse
import ctypes
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time

import numpy

# The numbers of ggml's `enum ggml_type`.
TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 8, "BF16": 30}
# flmm's formats, and llama.cpp's that stand beside them.
PAIRS = [("bf16", "BF16"), ("bf16", "F16"), ("int8", "Q8_0"), ("int4", "Q4_0")]
KINDS = ["prompt", "decode"]
# For the tensors' descriptions and a graph, beside numbers.
ROOM = 1 << 20

pointer, size_t, int64 = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64


class InitParams(ctypes.Structure):
    _fields_ = [("mem_size", size_t), ("mem_buffer", pointer), ("no_alloc", ctypes.c_bool)]


Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, pointer)


@Log
def log(level, text, _):
    """Warnings and errors only: ggml also tells which weights it repacks."""
    if level in (3, 4):
        sys.stderr.write(text.decode())


# Results and arguments of what is called.
BASE = {
    "ggml_log_set": (None, Log, pointer),
    "ggml_init": (pointer, InitParams),
    "ggml_free": (None, pointer),
    "ggml_new_tensor_2d": (pointer, pointer, ctypes.c_int, int64, int64),
    "ggml_mul_mat": (pointer, pointer, pointer, pointer),
    "ggml_new_graph": (pointer, pointer),
    "ggml_build_forward_expand": (None, pointer, pointer),
    "ggml_quantize_chunk": (size_t, ctypes.c_int, pointer, pointer, int64, int64, int64, pointer),
    "ggml_row_size": (size_t, ctypes.c_int, int64),
    "ggml_get_data": (pointer, pointer),
    "ggml_backend_reg_dev_get": (pointer, pointer, size_t),
    "ggml_backend_reg_get_proc_address": (pointer, pointer, ctypes.c_char_p),
    "ggml_backend_dev_buffer_type": (pointer, pointer),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, pointer, pointer),
    "ggml_backend_buft_name": (ctypes.c_char_p, pointer),
    "ggml_backend_alloc_ctx_tensors_from_buft": (pointer, pointer, pointer),
    "ggml_backend_buffer_free": (None, pointer),
    "ggml_backend_tensor_set": (None, pointer, pointer, size_t, size_t),
}
CPU = {
    "ggml_backend_cpu_reg": (pointer,),
    "ggml_graph_compute_with_ctx": (ctypes.c_int, pointer, pointer, ctypes.c_int),
}


def library(folder, name, functions):
    """The functions of a shared library that the package brings along."""
    suffix = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
    found = ctypes.CDLL(os.path.join(folder, f"lib{name}.{suffix}"), mode=ctypes.RTLD_GLOBAL)
    for function, (result, *arguments) in functions.items():
        getattr(found, function).restype, getattr(found, function).argtypes = result, arguments
    return found


class Ggml:
    """llama.cpp's kernels and the ways in which its CPU backend keeps weights."""

    def __init__(self):
        package = importlib.util.find_spec("llama_cpp")
        if package is None:
            sys.exit("llama-cpp-python is not installed, see the head of this file")
        folder = os.path.join(os.path.dirname(package.origin), "lib")
        # Found without importing the package, which would open the rest of llama.cpp too.
        self.base, self.cpu = library(folder, "ggml-base", BASE), library(folder, "ggml-cpu", CPU)
        self.base.ggml_log_set(log, None)
        registry = self.cpu.ggml_backend_cpu_reg()
        self.device = self.base.ggml_backend_reg_dev_get(registry, 0)
        extra = self.base.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        self.kept_as = []
        if extra:
            listed = ctypes.CFUNCTYPE(ctypes.POINTER(pointer), pointer)(extra)(self.device)
            while listed and listed[len(self.kept_as)]:
                self.kept_as.append(listed[len(self.kept_as)])
        self.kept_as.append(self.base.ggml_backend_dev_buffer_type(self.device))

    def context(self, memory=None):
        """A new context; in `memory` it has room for numbers, without it only for descriptions."""
        if memory is None:
            return self.base.ggml_init(InitParams(ROOM, None, True))
        return self.base.ggml_init(InitParams(memory.nbytes, memory.ctypes.data, False))


class Weight:
    """A weight `[outputs, inputs]` in a format of llama.cpp's, kept as llama.cpp would keep it."""

    def __init__(self, ggml, kind, numbers):
        self.ggml, base = ggml, ggml.base
        outputs, inputs = numbers.shape
        self.bytes = outputs * base.ggml_row_size(TYPES[kind], inputs)
        packed = numpy.empty(self.bytes, numpy.uint8)
        base.ggml_quantize_chunk(TYPES[kind], numbers.ctypes.data, packed.ctypes.data, 0, outputs, inputs, None)
        for kept_as in ggml.kept_as:
            context = ggml.context()
            self.tensor = base.ggml_new_tensor_2d(context, TYPES[kind], inputs, outputs)
            buffer = base.ggml_backend_alloc_ctx_tensors_from_buft(context, kept_as)
            x = base.ggml_new_tensor_2d(context, TYPES["F32"], inputs, 1)
            product = base.ggml_mul_mat(context, self.tensor, x)
            if buffer and base.ggml_backend_dev_supports_op(ggml.device, product):
                base.ggml_backend_tensor_set(self.tensor, packed.ctypes.data, 0, self.bytes)
                self.name = kind
                if kept_as != ggml.kept_as[-1]:
                    self.name += f" ({base.ggml_backend_buft_name(kept_as).decode()})"
                return
            if buffer:
                base.ggml_backend_buffer_free(buffer)
            base.ggml_free(context)
        sys.exit(f"llama.cpp cannot multiply {kind}")


class Product:
    """`x · weightᵀ` for weights of one shape."""

    def __init__(self, ggml, x, outputs):
        self.ggml, self.x, self.shape = ggml, x, (len(x), outputs)
        # Reused by every product, as llama.cpp does: activations, results, and what ggml turns activations into.
        self.memory = numpy.zeros(4 * (2 * x.size + len(x) * outputs) + ROOM, numpy.uint8)

    def __call__(self, weight, threads):
        """The result and wall and processor seconds."""
        base = self.ggml.base
        context = self.ggml.context(self.memory)
        x = base.ggml_new_tensor_2d(context, TYPES["F32"], self.x.shape[1], len(self.x))
        ctypes.memmove(base.ggml_get_data(x), self.x.ctypes.data, self.x.nbytes)
        y, graph = base.ggml_mul_mat(context, weight.tensor, x), base.ggml_new_graph(context)
        base.ggml_build_forward_expand(graph, y)
        wall, cpu = time.perf_counter(), time.process_time()
        status = self.ggml.cpu.ggml_graph_compute_with_ctx(context, graph, threads)
        times = time.perf_counter() - wall, time.process_time() - cpu
        if status != 0:
            sys.exit(f"llama.cpp: {weight.name}: status {status}")
        data = (ctypes.c_float * (self.shape[0] * self.shape[1])).from_address(base.ggml_get_data(y))
        result = numpy.frombuffer(data, numpy.float32).reshape(self.shape)
        base.ggml_free(context)  # the memory is ours and stays
        return result, times


def check(weight, products, numbers, threads):
    """That what is timed is the product; it also warms up."""
    for product in products.values():
        found, _ = product(weight, threads)
        right = product.x[:1] @ numbers.T
        error = numpy.linalg.norm(found[:1] - right) / numpy.linalg.norm(right)
        if not error < 0.2:
            sys.exit(f"llama.cpp: {weight.name}: the product is {100 * error:.0f} % off")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("flmm")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=640)
    parser.add_argument("--inputs", type=int, default=4096)
    parser.add_argument("--outputs", type=int, default=11008)
    args = parser.parse_args()
    random, ggml = numpy.random.default_rng(1), Ggml()
    numbers = random.standard_normal((args.outputs, args.inputs), numpy.float32)
    x = random.standard_normal((args.tokens, args.inputs), numpy.float32)
    products = {"prompt": Product(ggml, x, args.outputs), "decode": Product(ggml, x[:1], args.outputs)}
    weights = {kind: Weight(ggml, kind, numbers) for _, kind in PAIRS}
    for weight in weights.values():
        check(weight, products, numbers, args.threads)
    sizes = ["--tokens", str(args.tokens), "--inputs", str(args.inputs), "--outputs", str(args.outputs)]
    command = [args.flmm, "--threads", str(args.threads), "bench", "kernels", "--json", "--rounds", "3", *sizes]
    ours, theirs, work = {}, {}, {}
    for _ in range(args.rounds):
        report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for case in report["cases"]:
            times = (case["work"] / case["median"], case["work"] / case["per_cpu_second"])
            ours.setdefault(case["name"], []).append(times)
            work[case["name"]] = case["work"]
        # In turns here too, as in flmm, so that no weight is still in the processor's cache.
        rounds = [
            {(kind, name): products[kind](weight, args.threads)[1] for kind in KINDS for name, weight in weights.items()}
            for _ in range(3)
        ]
        for case in rounds[0]:
            times = tuple(statistics.median(times[case][i] for times in rounds) for i in (0, 1))
            theirs.setdefault(case, []).append(times)
    print(f"{'medians':37}{'flmm':>9}{'llama.cpp':>11}{'ratio':>7}   processor:{'flmm':>9}{'llama.cpp':>11}{'ratio':>7}")
    for kind in KINDS:
        for own, name in PAIRS:
            mine, yours = ours[f"{kind} {own}"], theirs[kind, name]
            # Operations of a prompt; bytes of a weight, each side's own, that decoding reads.
            amounts = (work[f"{kind} {own}"], weights[name].bytes / 1e9 if kind == "decode" else work[f"{kind} {own}"])
            line = f"{f'{kind} {own} / {weights[name].name}':37}"
            for i in (0, 1):
                rates = (a / statistics.median(r[i] for r in rounds) for a, rounds in zip(amounts, (mine, yours)))
                ratio = statistics.median(b[i] / a[i] for a, b in zip(mine, yours))
                line += "{:9.1f}{:11.1f}".format(*rates) + f"{ratio:6.2f}x" + (" " * 13 if i == 0 else "")
            print(f"{line}  {'GB/s' if kind == 'decode' else 'GFLOP/s'}")
    version = importlib.metadata.version("llama-cpp-python")
    print(
        f"llama-cpp-python {version}, {args.threads} thread(s); ratio: how many times faster flmm is, median of the rounds"
    )


if __name__ == "__main__":
    main()
