"""What benchmarks beside PyTorch have in common: one device for both libraries, rounds in turn, and a table."""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from perfusion_jax.pod.chips import CHIPS

# The first round compiles; the second may again, for arrays that came out of a step.
WARM_UP = 2


@dataclass(frozen=True)
class Setup:
    """Where and how both libraries compute.

    Attributes:
        device: `cpu` or `cuda`.
        dtype: `float32` or `bfloat16`, of both.
        compiles: whether PyTorch's modules go through `torch.compile`.
        rounds: that are timed, after WARM_UP that are not.
    """

    device: str
    dtype: str
    compiles: bool
    rounds: int

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def jax_dtype(self) -> Any:
        return jnp.dtype(self.dtype)

    @property
    def agreement(self) -> float:
        """By how much of the largest value two libraries may differ."""
        return 1e-4 if self.dtype == "float32" else 5e-2

    def place(self, module: torch.nn.Module) -> torch.nn.Module:
        """A frozen PyTorch module on the device, in the layout that suits its convolutions there."""
        module = module.eval().requires_grad_(False).to(self.device, self.torch_dtype)
        return module.to(memory_format=torch.channels_last) if self.device == "cuda" else module

    def compiled(self, module: torch.nn.Module) -> torch.nn.Module:
        """The same module, compiled by PyTorch if that is asked for."""
        return torch.compile(module) if self.compiles else module

    def tensor(self, array: Any) -> torch.Tensor:
        """An array on the device; of floats, in the dtype of the networks."""
        tensor = torch.from_numpy(np.array(array)).to(self.device)
        return tensor.to(self.torch_dtype) if tensor.is_floating_point() else tensor

    def wait(self) -> None:
        """Returns when PyTorch's device has done all it was told."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def describe(self) -> str:
        cpu = f"{processor()}, {os.cpu_count()} cores"
        where = torch.cuda.get_device_name() if self.device == "cuda" else cpu
        how = f"{self.dtype}, PyTorch {'compiled' if self.compiles else 'as it is'}"
        return f"PyTorch {torch.__version__}, JAX {jax.__version__}; {where}; {how}"


def processor() -> str:
    """The name of this machine's processor."""
    try:
        with open("/proc/cpuinfo") as stream:
            return next(line.partition(":")[2].strip() for line in stream if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def add_flags(parser: argparse.ArgumentParser, rounds: int = 7) -> None:
    """Adds the flags of `setup`."""
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="of both libraries")
    parser.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: bfloat16 on cuda"
    )
    parser.add_argument("--no_compile", action="store_true", help="leave PyTorch's modules as they are, on cuda")
    parser.add_argument("--rounds", type=int, default=rounds, help="timed rounds, after two that are not")


def setup(options: argparse.Namespace) -> Setup:
    """Reads the flags, and sees to it that both libraries have the device."""
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    elif jax.default_backend() != "gpu" or not torch.cuda.is_available():
        raise SystemExit("--device=cuda: a library sees no GPU; install jax[cuda13] and a PyTorch for CUDA")
    dtype = options.dtype if options.dtype != "auto" else {"cpu": "float32", "cuda": "bfloat16"}[device]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    return Setup(device, dtype, device == "cuda" and not options.no_compile, options.rounds)


def torch_flops(work: Callable[[], Any]) -> float:
    """Floating-point operations of some PyTorch work, by PyTorch's own count."""
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def compare(where: Setup, name: str, ours: Callable[[], Any], theirs: Callable[[], Any], flops: float) -> None:
    """Times two works in turn and prints a line of the table.

    Args:
        where: the setup.
        name: of the work.
        ours, theirs: each waits until it is done.
        flops: of the work, for the share of the chip's peak; 0 leaves it out.
    """
    seconds: Mapping[str, list[float]] = {"ours": [], "theirs": []}
    for number in range(-WARM_UP, where.rounds):
        for side, work in (("theirs", theirs), ("ours", ours)):
            start = time.perf_counter()
            work()
            where.wait()
            if number >= 0:
                seconds[side].append(time.perf_counter() - start)
    ratio = statistics.median(one / other for one, other in zip(*seconds.values(), strict=True))
    medians = {side: statistics.median(times) for side, times in seconds.items()}
    chip = CHIPS.get(jax.devices()[0].device_kind)
    shares = {side: f"{flops / time / chip.flops:.1%}" if chip and flops else "-" for side, time in medians.items()}
    print(
        f"| {name} | {medians['theirs']:.4g} | {medians['ours']:.4g} | {ratio:.2f} | {shares['theirs']} | "
        f"{shares['ours']} |"
    )


def print_head(where: Setup) -> None:
    """Prints the setup and the head of the table: medians of seconds, and of the ratio round by round."""
    print(f"{where.describe()}; medians of {where.rounds} rounds\n")
    print("| work | PyTorch, s | JAX, s | JAX / PyTorch | PyTorch, MFU | JAX, MFU |")
    print("| --- | --- | --- | --- | --- | --- |")
