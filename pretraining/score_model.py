"""Score the text-to-image model: `python -m pretraining.score_model --model=FOLDER/model --out=scores`.

Prints the table of the model card, and writes it to OUT/table.md: the evaluator's own accuracy on the same requests as
the world draws them (the ceiling), the autoencoder's error on drawings of held-out vendors, how often the evaluator
finds what a prompt asked for, and the same pictures and their time in PyTorch diffusers. The guidance scale is the best
on other seeds than those reported. Writes sheets beside: `plain.png`, 48 things whose kinds and places a fixed seed
chooses among the common ones, `pairs.png`, and `held_out.png`, 32 drawings and their reconstructions.
"""

import pathlib
import time

import numpy as np
import torch
from absl import app, flags
from diffusers import StableDiffusionPipeline

from perfusion_jax import load_base_model
from perfusion_jax.base_model import BaseModel
from perfusion_jax.base_model.clip import load_clip
from perfusion_jax.drawing.denoising import noise_for
from perfusion_jax.drawing.generation import generate
from perfusion_jax.runtime import shipped
from pretraining import autoencoder, held_out, personal, places, scenes, things, training_tools
from pretraining.asked import Request, rendered, requests, score

MODEL = flags.DEFINE_string("model", str(shipped.MODEL), "Stable Diffusion folder.")
EVALUATOR = flags.DEFINE_string("evaluator", "", "CLIP folder; the one beside the model if left out.")
OUT = flags.DEFINE_string("out", "scores", "Folder for the table and the sheets.")
SCALES = flags.DEFINE_list("guidance", ["3", "4", "6", "7", "9"], "Guidance scales to choose from.")

STEPS = 50
TEST_SEED = 9_300
SINGLES, PAIRS, SHOWN = 192, 64, 48
SEEDS = {"tuning": 50_000, "report": 10_000, "plain": 20_000}
"""First seed of the pictures of each kind; picture i has the i-th seed from it."""


def draw_in_pytorch(
    pipeline: StableDiffusionPipeline, noise: np.ndarray, prompts: list[str], guidance_scale: float, steps: int
) -> np.ndarray:
    """The pictures that diffusers draws from given noise: uint8 [prompts, side, side, 3]."""
    pictures = []
    for start in range(0, len(prompts), 16):
        latents = torch.from_numpy(noise[start : start + 16].transpose(0, 3, 1, 2).copy()).to(pipeline.device)
        pictures.append(
            pipeline(
                prompts[start : start + 16],
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                latents=latents,
                output_type="pt",
            ).images.cpu()
        )
    return (torch.cat(pictures).permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()


def time_sampling(
    base: BaseModel, pipeline: StableDiffusionPipeline, guidance_scale: float, rounds: int = 5
) -> tuple[float, float]:
    """Median seconds for 4 pictures of 30 steps, compilation left out: (ours, PyTorch diffusers), turn by turn."""
    prompts = [request.prompt for request in requests(0, 4, 1)]
    noise = np.asarray(noise_for(base.model, range(4), scenes.PIXELS, scenes.PIXELS))
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        start = time.perf_counter()
        generate(base, prompts, range(4), steps=30, guidance=guidance_scale, batch_size=4)
        middle = time.perf_counter()
        draw_in_pytorch(pipeline, noise, prompts, guidance_scale, 30)
        if number:  # the first round compiles
            seconds[0].append(middle - start)
            seconds[1].append(time.perf_counter() - middle)
    return float(np.median(seconds[0])), float(np.median(seconds[1]))


def main(_: list[str]) -> None:
    """Prints and writes the table."""
    out = pathlib.Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    device = training_tools.device()
    base = load_base_model(MODEL.value)
    judge = EVALUATOR.value or personal.judge_beside(pathlib.Path(MODEL.value), "clip")
    if not judge:
        raise app.UsageError(f"{MODEL.value}: no folder named clip beside it; name one by --evaluator")
    evaluator = load_clip(judge)
    pipeline = StableDiffusionPipeline.from_pretrained(MODEL.value, torch_dtype=torch.float32).to(device)
    pipeline.set_progress_bar_config(disable=True)
    world = scenes.World(things.atlas(), places.bank(), device)

    with torch.no_grad():
        unseen, _ = held_out.some_alone(world, 512, TEST_SEED)
        rebuilt = autoencoder.reconstruct(pipeline.vae, unseen)
    psnr = autoencoder.psnr(unseen, rebuilt)
    sheet = torch.stack([unseen[:32], rebuilt[:32]], 1).flatten(0, 1)
    training_tools.save_sheet(out / "held_out.png", training_tools.to_pixels(sheet), 8, 3)

    def drawn(asked: list[Request], first_seed: int, guidance_scale: float) -> np.ndarray:
        seeds = range(first_seed, first_seed + len(asked))
        return generate(base, [each.prompt for each in asked], seeds, steps=STEPS, guidance=guidance_scale)

    def row(name: str, pictures: np.ndarray, single: list[Request], pair: list[Request]) -> tuple[str, float]:
        ones, twos = score(evaluator, pictures[: len(single)], single), score(evaluator, pictures[len(single) :], pair)
        cells = f"{ones['kinds']:.1%} | {ones['place']:.1%} | {twos['kinds']:.1%}"
        return f"| {name} | {cells} |", sum(ones.values()) + sum(twos.values())

    single, pair = requests(1, SINGLES // 2, 1), requests(2, PAIRS // 2, 2)
    tried: dict[float, tuple[str, float]] = {}
    for scale in map(float, SCALES.value):
        pictures = drawn([*single, *pair], SEEDS["tuning"], scale)
        tried[scale] = row(f"guidance {scale:g}, seeds for choosing", pictures, single, pair)
    guidance_scale = max(tried, key=lambda scale: tried[scale][1])

    single, pair = requests(3, SINGLES, 1), requests(4, PAIRS, 2)
    asked = [*single, *pair]
    ours = drawn(asked, SEEDS["report"], guidance_scale)
    noise = np.asarray(
        noise_for(base.model, range(SEEDS["report"], SEEDS["report"] + len(asked)), scenes.PIXELS, scenes.PIXELS)
    )
    theirs = draw_in_pytorch(pipeline, noise, [each.prompt for each in asked], guidance_scale, STEPS)
    difference = np.abs(ours.astype(int) - theirs)
    seconds, torch_seconds = time_sampling(base, pipeline, guidance_scale)

    plain = requests(5, SHOWN, 1)
    training_tools.save_sheet(out / "plain.png", drawn(plain, SEEDS["plain"], guidance_scale), 12)
    (out / "plain.txt").write_text("".join(f"{each.prompt}\n" for each in plain))
    training_tools.save_sheet(out / "pairs.png", ours[len(single) :], 16)

    rows = [
        row("the reported requests as the world draws them", rendered(world, asked, TEST_SEED), single, pair),
        *tried.values(),
        row(f"guidance {guidance_scale:g}, reported (ours)", ours, single, pair),
        row(f"guidance {guidance_scale:g}, reported (PyTorch)", theirs, single, pair),
    ]
    table = [
        "| measure | category | place | both of two |",
        "| --- | --- | --- | --- |",
        *(line for line, _ in rows),
        "",
        f"Autoencoder on 512 drawings of held-out vendors: {psnr.mean():.2f} dB, the worst {psnr.min():.1f}.",
        f"The same {len(asked)} pictures by PyTorch diffusers: mean difference {difference.mean():.3f} of 255, "
        f"at most {difference.max()}.",
        f"4 pictures, 30 steps: {seconds:.2f} s, PyTorch diffusers {torch_seconds:.2f} s: "
        f"ratio {seconds / torch_seconds:.2f}.",
    ]
    text = "".join(f"{line}\n" for line in table)
    (out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    app.run(main)
