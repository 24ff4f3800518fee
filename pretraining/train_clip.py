"""Train the evaluator, a small CLIP: `python -m pretraining.train_clip`. Resumes when it is given again.

It begins with what the instance encoder has learnt (`train_instance`), which must be there.
Writes `clip/` under the cache in transformers' layout (half precision, model and tokenizer), and measures it on fresh
scenes and on drawings of held-out vendors.
"""

import json
import math

import numpy as np
import torch
from absl import app, flags
from transformers import ViTModel

from perfusion_jax.emoji_world.muon import MuonAndAdam
from pretraining import captions, clip, held_out, instance, places, stream, things, tokenizer, training_tools, vendors
from pretraining.scenes import World

SAMPLES = flags.DEFINE_integer("samples", 400_000, "Scenes to train on.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 128, "Scenes a step.")
THREADS = flags.DEFINE_integer("threads", 0, "CPU threads; 0: as many as other processes leave free.")

SEED = 3_000
TEST_SEED = 9_200
MUON_RATE, ADAM_RATE = 2e-3, 1e-3
WARM_UP_STEPS = 100
SAVE_EVERY = 100


def held_out_share(model: torch.nn.Module, text_tokenizer: tokenizer.CLIPTokenizer, world: World) -> float:
    """Share of held-out drawings of common kinds, alone in a scene, whose kind is found."""
    found = []
    for vendor in vendors.HELD_OUT:
        entries, sprites = held_out.all_sprites(vendor)
        common = [number for number, entry in enumerate(entries) if entry.common]
        pictures, _ = held_out.draw_alone(world, sprites[common], TEST_SEED + 5)
        wanted = np.array([things.kinds().index(entries[number].kind) for number in common])
        found.append(clip.found_kinds(model, text_tokenizer, pictures) == wanted)
    return float(np.concatenate(found).mean())


def main(_: list[str]) -> None:
    """Trains, measures and saves the evaluator."""
    if THREADS.value:
        torch.set_num_threads(THREADS.value)
    device = training_tools.device()
    held_out.prepare()
    folder = vendors.cache() / "clip_training"
    folder.mkdir(parents=True, exist_ok=True)
    text_tokenizer = tokenizer.save_tokenizer(vendors.cache() / "clip")
    world = World(things.atlas(), places.bank(), device)
    writer, ids = captions.Writer(world.atlas, coded_share=0), stream.word_table(text_tokenizer)
    torch.manual_seed(SEED)
    model = clip.build_clip(text_tokenizer).to(device)
    optimizer = MuonAndAdam(model, MUON_RATE, ADAM_RATE, weight_decay=0.05)
    total, step, vocabulary = SAMPLES.value // BATCH_SIZE.value, 0, tokenizer.digest(text_tokenizer)
    if state := training_tools.load_checkpoint(folder / "checkpoint.pt"):
        training_tools.check_vocabulary(state, vocabulary)
        model.load_state_dict(state["model"])
        training_tools.restore_optimizer(optimizer, state["optimizer"])
        step = state["step"]
    else:
        encoder = ViTModel.from_pretrained(vendors.cache() / "instance", add_pooling_layer=False, dtype=torch.float32)
        clip.begin_as(model, encoder.to(device), world.scenes(SEED, 0, BATCH_SIZE.value)[0])
    word_tokens = torch.tensor(tokenizer.encode(text_tokenizer, clip.kind_phrases()), device=device)
    losses: list[torch.Tensor] = []
    watch = training_tools.Stopwatch()
    cores = None if THREADS.value or device.type == "cuda" else training_tools.FreeCores()
    while step < total:
        if cores is not None and step % 10 == 0:
            cores.adapt()
        plan = world.planner.plan(SEED, step, BATCH_SIZE.value)
        random = np.random.default_rng([SEED, step])
        written = writer.write(plan, writer.codable(plan, random), random)
        tokens = captions.to_texts(
            written, ids, text_tokenizer.bos_token_id, text_tokenizer.eos_token_id, tokenizer.MODEL_MAX_LENGTH
        ).tokens
        generator = training_tools.generator(SEED + 1, step)
        pictures = instance.soften(world.draw(plan)[0], generator)
        targets = clip.kind_targets(plan, world.planner.kind).to(device)
        factor = min(1.0, (step + 1) / WARM_UP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / total))
        losses.append(clip.train_step(model, optimizer, factor, pictures, tokens.to(device), word_tokens, targets))
        step += 1
        if step % SAVE_EVERY == 0 or step == total:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            training_tools.save_checkpoint(folder / "checkpoint.pt", {**state, "vocabulary": vocabulary})
            metrics = {
                "samples": step * BATCH_SIZE.value,
                "loss": torch.stack(losses).mean().item(),
                "samples_per_second": watch.rate(len(losses) * BATCH_SIZE.value),
            }
            if step % (5 * SAVE_EVERY) == 0 or step == total:
                metrics |= clip.measure(model, text_tokenizer, world, TEST_SEED, 2_048)
                metrics["held_out"] = held_out_share(model, text_tokenizer, world)
            training_tools.append_metrics(folder / "metrics.jsonl", metrics)
            losses, watch = [], training_tools.Stopwatch()
    model.cpu().half().save_pretrained(vendors.cache() / "clip")
    normalisation = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}  # pictures go in as [-1, 1]
    (vendors.cache() / "clip" / "preprocessor_config.json").write_text(json.dumps(normalisation))


if __name__ == "__main__":
    app.run(main)
