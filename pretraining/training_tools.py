"""What the training commands share: checkpoints that survive a kill, logs, averaged weights, sheets of pictures."""

import json
import os
import pathlib
import time
from typing import Any

import numpy as np
import torch
from PIL import Image

from perfusion_jax.emoji_world.muon import MuonAndAdam, bfloat16_is_quick


def device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(device: torch.device) -> torch.autocast:
    """Within it, networks compute in bfloat16 where that is quick, else in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bfloat16_is_quick(device))


def generator(*numbers: int) -> torch.Generator:
    """A generator on the CPU for each list of whole numbers from 0 on, such as a seed and a step.

    PyTorch's generator on the CPU reads the lower 32 bits of its seed alone, so the numbers are mixed into as many.
    """
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def normal(shape: torch.Size | tuple[int, ...], generator: torch.Generator, where: torch.device) -> torch.Tensor:
    """Normal noise drawn on the device that needs it, seeded by a generator on the CPU.

    A card would wait for noise from the CPU; the same seed gives other noise on another kind of device.
    """
    seed = int(torch.randint(2**62, (), generator=generator))
    return torch.randn(shape, generator=torch.Generator(where).manual_seed(seed), device=where)


def save_checkpoint(path: pathlib.Path, state: dict[str, Any]) -> None:
    """Write `state` with torch.save so that a kill at any moment leaves the old file or the new one, never half."""
    partial = pathlib.Path(f"{path}.partial")
    with open(partial, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load_checkpoint(path: pathlib.Path) -> dict[str, Any] | None:
    """The state last saved at `path`, on the CPU, or None."""
    path = pathlib.Path(path)
    return torch.load(path, weights_only=True, map_location="cpu") if path.exists() else None


def restore_optimizer(optimizer: MuonAndAdam, state: list[dict[str, Any]]) -> None:
    """Takes back an optimiser's state, its moments laid out in memory as the parameters are.

    A card's parameters have channels last and a CPU's have not, and the fused AdamW reads parameters and moments in the
    order in which they lie.
    """
    optimizer.load_state_dict(state)
    for part in optimizer.optimizers:
        for parameter, moments in part.state.items():
            for name, value in moments.items():
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    moments[name] = torch.empty_like(parameter).copy_(value)


def check_vocabulary(state: dict[str, Any], vocabulary: str) -> None:
    """Refuses a checkpoint whose token ids mean other words. Those of before there was a digest in them pass.

    Raises:
        ValueError: its vocabulary is another than `vocabulary` (`tokenizer.digest`).
    """
    if state.get("vocabulary", vocabulary) != vocabulary:
        raise ValueError(
            f"the checkpoint was trained with the vocabulary {state['vocabulary']}, and this one is {vocabulary}: "
            "the words of things.txt, places or captions have changed since; train anew with another --run or cache"
        )


def append_metrics(path: pathlib.Path, metrics: dict[str, Any]) -> None:
    """Append one JSON line and print it."""
    line = json.dumps({name: round(value, 5) if isinstance(value, float) else value for name, value in metrics.items()})
    with open(path, "a") as file:
        file.write(line + "\n")
    print(line, flush=True)


@torch.no_grad()
def average_weights(average: torch.nn.Module, model: torch.nn.Module, decay: float) -> None:
    """Exponential moving average, in place: average = decay * average + (1 - decay) * model."""
    targets = [value for value in average.state_dict().values() if value.is_floating_point()]
    sources = [value for value in model.state_dict().values() if value.is_floating_point()]
    torch._foreach_lerp_(targets, sources, 1 - decay)


class FreeCores:
    """Keeps PyTorch to the cores that other processes leave free.

    A thread that waits for a busy core stops all others.
    """

    def __init__(self) -> None:
        self.busy, self.own, self.wall = self._clocks()

    @staticmethod
    def _clocks() -> tuple[float, float, float]:
        """Core-seconds of all processes (Linux; 0 elsewhere), core-seconds of this one, and seconds by the clock."""
        own = time.process_time()
        stat = pathlib.Path("/proc/stat")
        if not stat.exists():
            return 0.0, 0.0, time.monotonic()
        user, nice, system = map(int, stat.read_text().split(maxsplit=4)[1:4])
        return (user + nice + system) / os.sysconf("SC_CLK_TCK"), own, time.monotonic()

    def adapt(self) -> None:
        """Set the number of threads by what other processes did since the last call."""
        before, now = (self.busy, self.own, self.wall), self._clocks()
        others = ((now[0] - before[0]) - (now[1] - before[1])) / max(now[2] - before[2], 1e-3)
        torch.set_num_threads(max(1, round((os.cpu_count() or 1) - others)))
        self.busy, self.own, self.wall = now


class Stopwatch:
    """Samples per second since the last reading."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def rate(self, samples: int) -> float:
        """Samples per second since the last call; starts anew."""
        now = time.monotonic()
        rate = samples / (now - self.start)
        self.start = now
        return rate


def to_pixels(pictures: torch.Tensor) -> np.ndarray:
    """Turn float pictures [batch, 3, height, width] in [-1, 1] into uint8 [batch, height, width, 3]."""
    pixels = ((pictures.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def save_sheet(path: pathlib.Path, pictures: np.ndarray, columns: int, scale: int = 2) -> None:
    """Save uint8 pictures [count, height, width, 3] as one PNG, `columns` a row, each pixel `scale` pixels wide.

    The last row is filled up with white.
    """
    missing = -len(pictures) % columns
    pictures = np.concatenate([pictures, np.full((missing, *pictures.shape[1:]), 255, np.uint8)])
    rows = [np.concatenate(list(pictures[start : start + columns]), 1) for start in range(0, len(pictures), columns)]
    sheet = Image.fromarray(np.concatenate(rows))
    sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST).save(path)
