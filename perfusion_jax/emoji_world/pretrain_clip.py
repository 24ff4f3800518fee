"""Train the evaluator, a small CLIP: `python -m perfusion_jax.emoji_world.pretrain_clip`.

Sees rendered scenes and their captions only, never a generated picture, and shares no weight with the model that it
judges. Running the command again after a kill resumes. Writes `clip/` under the cache in transformers' layout (half
precision, model and tokenizer), then measures it on fresh scenes.
"""

import json
import math

import numpy as np
import torch
from absl import app, flags

from perfusion_jax.emoji_world import captions, drawings, scenes, tokenizer, torch_training
from perfusion_jax.emoji_world import clip_training as training
from perfusion_jax.emoji_world.fetch import cache_directory
from perfusion_jax.emoji_world.muon import MuonAndAdam

SAMPLES = flags.DEFINE_integer("samples", 200_000, "Scenes to train on.")
THREADS = flags.DEFINE_integer("threads", 1, "CPU threads.")

SEED = 3_000
TEST_SEED = 9_002
TEST_SCENES = 2_000
BATCH_SIZE = 128
MUON_RATE, ADAM_RATE = 2e-3, 1e-3
WARM_UP_STEPS = 100
SAVE_EVERY = 100


def main(_: list[str]) -> None:
    """Trains, measures and saves the evaluator."""
    torch.set_num_threads(THREADS.value)
    folder = cache_directory() / "clip_training"
    folder.mkdir(parents=True, exist_ok=True)
    text_tokenizer = tokenizer.save_tokenizer(cache_directory() / "clip")
    sprites = drawings.world_sprites()
    torch.manual_seed(SEED)
    model = training.build_clip(text_tokenizer)
    optimizer = MuonAndAdam(model, MUON_RATE, ADAM_RATE, weight_decay=0.05)
    total_steps, step = SAMPLES.value // BATCH_SIZE, 0
    checkpoint = torch_training.load_checkpoint(folder / "clip.pt")
    if checkpoint is not None:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        step = checkpoint["step"]

    phrases = [f"a photo of {captions.noun_phrase(word)}" for word in training.WORDS]
    word_tokens = torch.tensor(tokenizer.encode(text_tokenizer, phrases))
    losses, stopwatch = [], torch_training.Stopwatch()
    while step < total_steps:
        generator = torch.Generator().manual_seed(SEED * 2**32 + step)
        batch = [
            scenes.render_scene(SEED, index, sprites) for index in range(step * BATCH_SIZE, (step + 1) * BATCH_SIZE)
        ]
        images = training.soften(torch_training.from_pixels(np.stack([scene.image for scene in batch])), generator)
        tokens = torch.tensor(tokenizer.encode(text_tokenizer, [scene.caption for scene in batch]))
        factor = min(1.0, (step + 1) / WARM_UP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / total_steps))
        targets = training.word_targets(batch)
        losses.append(training.train_step(model, optimizer, factor, images, tokens, word_tokens, targets))
        step += 1
        if step % SAVE_EVERY == 0 or step == total_steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch_training.save_checkpoint(folder / "clip.pt", state)
            metrics = {
                "samples": step * BATCH_SIZE,
                "loss": float(np.mean(losses)),
                "samples_per_second": stopwatch.rate(len(losses) * BATCH_SIZE),
                **training.measure(training.make_judge(model, text_tokenizer), TEST_SEED + 1, 500),
            }
            torch_training.append_metrics(folder / "metrics.jsonl", metrics)
            losses, stopwatch = [], torch_training.Stopwatch()
    test = training.measure(training.make_judge(model, text_tokenizer), TEST_SEED, TEST_SCENES)
    torch_training.append_metrics(folder / "metrics.jsonl", {"test": test})
    model.to(torch.float16).save_pretrained(cache_directory() / "clip", safe_serialization=True)
    # Pictures go in as [-1, 1].
    normalisation = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (cache_directory() / "clip" / "preprocessor_config.json").write_text(json.dumps(normalisation))


if __name__ == "__main__":
    app.run(main)
