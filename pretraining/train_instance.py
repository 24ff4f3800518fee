"""Train the instance encoder: `python -m pretraining.train_instance`. Resumes when it is given again.

Writes `instance/` under the cache in transformers' layout (half precision), and measures on rendered pictures of
held-out vendors: among eight individuals of one kind, is a picture's own the nearest? A watch over the training: the
ceiling of results is what `benchmarks/personal.py` measures beside them.
"""

import json
import math

import numpy as np
import torch
from absl import app, flags

from perfusion_jax.emoji_world.muon import MuonAndAdam
from pretraining import held_out, instance, places, things, training_tools, vendors
from pretraining.scenes import World

SAMPLES = flags.DEFINE_integer("samples", 400_000, "Pictures to train on.")
THREADS = flags.DEFINE_integer("threads", 0, "CPU threads; 0: as many as other processes leave free.")

SEED = 4_000
MUON_RATE, ADAM_RATE = 2e-3, 1e-3
WARM_UP_STEPS = 100
SAVE_EVERY = 100
KINDS_TESTED = 48
"""Spread evenly over those that `benchmarks/personal.py` chooses from."""


def share_found(model: torch.nn.Module, world: World, seed: int) -> float:
    """Share of rendered pictures whose own individual is the nearest of eight of its kind, of held-out vendors."""
    found, known = [], held_out.kinds()
    for number in np.linspace(0, len(known) - 1, min(KINDS_TESTED, len(known))).round().astype(int).tolist():
        kind = known[number]
        sprites = held_out.individuals_of(kind, 8, seed)
        references = held_out.scenes_of(world, sprites, 5, seed * 1_000 + 2 * number)
        questions = held_out.scenes_of(world, sprites, 4, seed * 1_000 + 2 * number + 1)
        own = instance.embed(model, references.flatten(0, 1)).reshape(8, 5, -1)
        asked = instance.embed(model, questions.flatten(0, 1))
        found.append(instance.share_found(asked, torch.arange(8).repeat_interleave(4).numpy(), own))
    return sum(found) / len(found)


def main(_: list[str]) -> None:
    """Trains, measures and saves the encoder."""
    if THREADS.value:
        torch.set_num_threads(THREADS.value)
    device = training_tools.device()
    held_out.prepare()
    folder = vendors.cache() / "instance_training"
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    world = World(things.atlas(), places.bank(), device)
    model = instance.build_encoder().to(device)
    optimizer = MuonAndAdam(model, MUON_RATE, ADAM_RATE, weight_decay=0.05)
    batch_size = 2 * instance.FAMILIES * instance.MEMBERS
    total, step = SAMPLES.value // batch_size, 0
    if state := training_tools.load_checkpoint(folder / "checkpoint.pt"):
        model.load_state_dict(state["model"])
        training_tools.restore_optimizer(optimizer, state["optimizer"])
        step = state["step"]
    losses: list[torch.Tensor] = []
    watch = training_tools.Stopwatch()
    cores = None if THREADS.value or device.type == "cuda" else training_tools.FreeCores()
    while step < total:
        if cores is not None and step % 10 == 0:
            cores.adapt()
        generator = training_tools.generator(SEED + 1, step)
        pictures = world.draw(instance.family_plan(world.planner, SEED, step))[0]
        factor = min(1.0, (step + 1) / WARM_UP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / total))
        losses.append(instance.train_step(model, optimizer, factor, instance.soften(pictures, generator)))
        step += 1
        if step % SAVE_EVERY == 0 or step == total:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            training_tools.save_checkpoint(folder / "checkpoint.pt", state)
            metrics = {
                "samples": step * batch_size,
                "loss": torch.stack(losses).mean().item(),
                "samples_per_second": watch.rate(len(losses) * batch_size),
            }
            if step % (10 * SAVE_EVERY) == 0 or step == total:
                metrics["found"] = share_found(model, world, 9_100)
            training_tools.append_metrics(folder / "metrics.jsonl", metrics)
            losses, watch = [], training_tools.Stopwatch()
    model.cpu().half().save_pretrained(vendors.cache() / "instance")
    normalisation = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}  # pictures go in as [-1, 1]
    (vendors.cache() / "instance" / "preprocessor_config.json").write_text(json.dumps(normalisation))


if __name__ == "__main__":
    app.run(main)
