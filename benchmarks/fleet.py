"""A fleet beside runs one after the other: `python benchmarks/fleet.py --out fleet`.

Learns fleets of 1, 4, 16 and 64 concepts on the embedded model, each fleet in one round, and before each a concept by a
run of its own; all by the command line, without validation. Everything is done with few steps and with more: the
difference tells the time of a step, and what is left is start, compilation and preparation of the pictures. Prints
both, the peak memory of the process, and the concepts per hour that follow for --steps steps; draws OUT/fleet.png.
Needs matplotlib.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from absl import app, flags

from perfusion_jax.runtime import shipped

matplotlib.use("agg")
from matplotlib import pyplot as plt

OUT = flags.DEFINE_string("out", "fleet", "Folder of the plot.")
SIZES = flags.DEFINE_multi_integer("size", [1, 4, 16, 64], "Concepts of a fleet; may be given several times.")
FEW = flags.DEFINE_integer("few", 5, "Steps of the shorter runs; of N < 16 concepts, 16 / N times as many.")
MORE = flags.DEFINE_integer("more", 20, "Steps of the longer runs, likewise.")
STEPS = flags.DEFINE_integer("steps", 400, "Steps of a concept, for the concepts per hour.")

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted(file.parent for file in shipped.EXAMPLES.glob("*/concept.json"))


def facts_of(number: int) -> dict[str, str | int]:
    """A concept of the table: the examples again and again, under names and seeds of their own."""
    example = EXAMPLES[number % len(EXAMPLES)]
    word = json.loads((example / "concept.json").read_text())["super_category"]
    return {"name": f"{example.name}_{number}", "super_category": word, "pictures": str(example), "seed": number}


def run(config: str, workdir: Path, **changes: object) -> tuple[float, float]:
    """Learns what a config says in a process of its own: (seconds, peak memory in GB)."""
    changes |= {"validation_prompts": "()", "validate_every": 0}
    words = [f"--config={ROOT / 'configs' / config}", f"--workdir={workdir}"]
    words += [f"--config.{name}={value}" for name, value in changes.items()]
    log = workdir.with_suffix(".log")
    into = [(os.POSIX_SPAWN_OPEN, number, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) for number in (1, 2)]
    began = time.perf_counter()
    command = [sys.executable, "-m", "perfusion_jax.train", *words]
    process = os.posix_spawn(sys.executable, command, {**os.environ, "PYTHONPATH": str(ROOT)}, file_actions=into)
    _, status, usage = os.wait4(process, 0)
    seconds = time.perf_counter() - began
    if status:
        sys.exit(f"{' '.join(command)}\n{log.read_text()}")
    return seconds, usage.ru_maxrss * 1024 / 1e9


def learn_fleet(folder: Path, size: int, steps: int) -> tuple[float, float]:
    """A fleet in one round."""
    table = folder / f"{size}.jsonl"
    table.write_text("".join(f"{json.dumps(facts_of(number))}\n" for number in range(size)))
    return run("fleet.py", folder / f"fleet_{size}_{steps}", concepts=table, members=size, steps=steps)


def learn_singly(folder: Path, number: int, steps: int) -> tuple[float, float]:
    """A concept of the table by a run of its own."""
    return run("dog.py", folder / f"single_{number}_{steps}", **facts_of(number), steps=steps)


def main(_: list[str]) -> None:
    out = Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)

    def steps_of(concepts: int) -> list[int]:
        """Of the shorter and the longer run: enough for the difference to be more than the noise of the start."""
        return [steps * -(-16 // concepts) for steps in (FEW.value, MORE.value)]

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        singles, fleets = [], []
        for number, size in enumerate(SIZES.value):
            singles.append([learn_singly(folder, number, steps) for steps in steps_of(1)])
            fleets.append([learn_fleet(folder, size, steps) for steps in steps_of(size)])
            print(f"measured: a run of its own, a fleet of {size}", file=sys.stderr, flush=True)

    def tell(name: str, concepts: int, measured: Sequence[tuple[float, float]]) -> tuple[float, float]:
        (few, more), ((short, _), (long, memory)) = steps_of(concepts), measured
        step = (long - short) / (more - few)
        begin = short - few * step
        total = begin + STEPS.value * step
        print(
            f"| {name} | {begin:.1f} | {step:.3f} | {step / concepts:.3f} | {memory:.2f} "
            f"| {concepts * 3600 / total:.0f} |"
        )
        return step / concepts, total

    print("| concepts | start, s | a step, s | a step for each concept, s | peak memory, GB | concepts per hour |")
    print("| --- | --- | --- | --- | --- | --- |")
    single_step, single = tell("1, a run of its own", 1, np.mean(singles, axis=0))
    told = [tell(f"{size} as a fleet", size, fleet) for size, fleet in zip(SIZES.value, fleets, strict=True)]
    totals, peaks = [total for _, total in told], [fleet[1][1] for fleet in fleets]
    for size, (step, total) in zip(SIZES.value, told, strict=True):
        print(
            f"{size} concepts of {STEPS.value} steps: fleet / runs one after the other = {total / size / single:.2f}, "
            f"without start and compilation {step / single_step:.2f}"
        )
    slope = np.polyfit(SIZES.value, peaks, 1)[0] if len(peaks) > 1 else float("nan")
    print(f"memory for each further concept: {1e3 * slope:.0f} MB")

    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    axes.loglog(SIZES.value, [size * single / 60 for size in SIZES.value], "o--", label="runs one after the other")
    axes.loglog(SIZES.value, np.array(totals) / 60, "o-", label="one fleet")
    axes.set_xticks(SIZES.value, [str(size) for size in SIZES.value])
    axes.set(xlabel="concepts", ylabel=f"minutes for {STEPS.value} steps each", title="embedded model, on this machine")
    axes.legend()
    figure.savefig(out / "fleet.png", dpi=120)


if __name__ == "__main__":
    app.run(main)
