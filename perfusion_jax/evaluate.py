"""Evaluates learnt concepts: pictures of them by prompts that training has not, scores, and a report.

    python -m perfusion_jax.evaluate --workdir runs/fleet --out evaluation
    python -m perfusion_jax.evaluate --concept dog.safetensors --pictures dog/ --sweep bias=0.4:0.8:5 --out evaluation
    python -m perfusion_jax.evaluate --workdir ours=runs/a --workdir lora=runs/b --sweep ours:bias=0.4:0.8:5 \\
        --sweep lora:strength=0.4:1.2:5 --out evaluation

OUT/report.html shows pictures and scores, with intervals over concepts; OUT/report.json holds the numbers. The same
command goes on where an interrupted one was.
"""

import json
from collections.abc import Callable

from absl import flags
from etils import epath

from perfusion_jax.runtime import command_line
from perfusion_jax.runtime.errors import InputError
from perfusion_jax.runtime.files import check_writable, read_text, to_path, write_bytes


def read_templates(file: str) -> list[str]:
    """Reads prompts with {} for the concept, one on a line.

    Raises:
        InputError: there are none, or one has no {}, or several.
        UnavailableError: storage fails.
    """
    from perfusion_jax.drawing.arguments import read_prompts

    prompts = read_prompts(None, file)
    for prompt in prompts:
        if prompt.count("{}") != 1:
            raise InputError(f"{file}: {prompt!r} needs one {{}}, where the concept's name goes")
    return prompts


def claim(out: epath.Path, facts: str) -> Callable[[], None]:
    """Sees that a folder is free for an evaluation, or holds this one.

    Args:
        out: the folder.
        facts: what the evaluation is of, JSON.

    Returns:
        What writes them there, when there is a first score: a mistake before that leaves the folder free.

    Raises:
        InputError: it holds another evaluation, or a report of something else; or cannot be written.
        UnavailableError: storage fails.
    """
    check_writable(out)
    record = out / "evaluation.json"
    before = read_text(record)
    if before not in ("", facts):
        raise InputError(f"{out}: holds another evaluation: give another --out, or delete it")
    for name in ("report.json", "report.html"):
        if not before and read_text(out / name):
            raise InputError(f"{out / name}: is there already, and is of no evaluation: give another --out, or move it")
    return lambda: write_bytes(record, facts.encode())


def main() -> None:
    """Evaluates --workdir, or --concept, and writes --out.

    Raises:
        InputError: the flags do not go together, or what they name cannot be used or replaced.
        UnavailableError: storage or the hub fails.
    """
    # Imported when the flags are right: JAX and diffusers take seconds.
    from ml_collections import ConfigDict
    from tqdm import tqdm

    from perfusion_jax.base_model import load_base_model, network_dtype
    from perfusion_jax.evaluation.report import check_plots, write_report
    from perfusion_jax.evaluation.scores import PROMPTS, Drawing, over_devices, read_scores, score_all, settings_of
    from perfusion_jax.evaluation.subjects import base_of, check_names, of_files, of_workdirs
    from perfusion_jax.learning.judges import NONE, find_judges, open_judges

    given = flags.FLAGS
    subjects = of_files(given.concept, given.pictures) + of_workdirs(given.workdir)
    if not subjects:
        raise InputError("nothing to evaluate: give --workdir of a run or a fleet, or --concept and --pictures")
    check_names(subjects)
    prompts = read_templates(given.prompts) if given.prompts else list(PROMPTS)
    settings = settings_of(given.sweep, subjects)
    index, count = command_line.parse_shard(given.shard) if given.shard else (0, 1)
    if count == 1 and (given.sweep or len(settings) > 1):
        check_plots()
    named = base_of(subjects, given)
    keys = {"base": named.source, "evaluator": given.evaluator, "instance_encoder": given.instance_encoder}
    judges = find_judges(ConfigDict(keys))
    if judges.evaluator == NONE:
        raise InputError("nothing to score by: give --evaluator, the folder or hub id of a CLIP")
    evaluator = open_judges(judges, named.source, "--{key}: {error}")
    facts = {
        "base model": " at ".join(filter(None, (named.source, named.revision))),
        **judges._asdict(),
        "prompts": prompts,
        "seeds": f"{given.seed} to {given.seed + given.num_images - 1}",
        "steps": given.steps or "the sampler's own",
    }
    out = to_path(given.out)
    begin = claim(out, json.dumps(facts, indent=2))
    base = load_base_model(dtype=network_dtype(), **named._asdict())
    plan = Drawing(
        prompts,
        range(given.seed, given.seed + given.num_images),
        {"steps": given.steps, "batch_size": given.batch_size},
    )
    mine = subjects[index::count]
    work = score_all(*over_devices(base, evaluator), mine, settings, plan, out, begin)
    for _ in tqdm(work, "evaluating", sum(len(settings[subject.label]) for subject in mine), unit="sheet"):
        pass
    if count == 1:
        lines = [line for subject in subjects for line in read_scores(out, subject)]
        print(write_report(out, subjects, lines, facts))
    else:
        print(f"{len(mine)} of {len(subjects)} concepts are scored; without --shard the same command writes the report")


def run() -> None:
    """The command."""
    flags.DEFINE_multi_string("workdir", [], "of a run or a fleet: all that it has finished; or LABEL=FOLDER")
    flags.DEFINE_multi_string("concept", [], "concept file; may be given several times")
    flags.DEFINE_multi_string("pictures", [], "the concept's own pictures, in the order of --concept")
    flags.DEFINE_string("out", None, "the folder to write", required=True)
    flags.DEFINE_string("prompts", None, "file of prompts, one on a line, with {} for the concept; twenty if left out")
    flags.DEFINE_multi_string("sweep", [], "control to draw at several values, [LABEL:]bias=0.4:0.8:5")
    flags.DEFINE_string("shard", None, "I/N: draw every N-th concept from the I-th on; then report without it")
    flags.DEFINE_integer("num_images", 4, "pictures of each prompt", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "of the first of them; the next has the next", lower_bound=0, upper_bound=2**31)
    flags.DEFINE_integer("batch_size", 16, "pictures drawn at once", lower_bound=1)
    flags.DEFINE_integer("steps", None, "sampling steps; the sampler's own if left out", lower_bound=1)
    flags.DEFINE_string(
        "base",
        None,
        "base model, that of the runs or emoji if left out: emoji, sd15, sd21, sdxl, a folder, a file or a hub id",
    )
    flags.DEFINE_string("revision", None, "branch, tag or commit of a hub id")
    flags.DEFINE_string("variant", None, "weight files to take, such as fp16")
    flags.DEFINE_string("evaluator", "", "folder or hub id of a CLIP; as training chooses it if left out")
    flags.DEFINE_string("instance_encoder", "", "folder or hub id of a DINO, for image similarity; likewise")
    command_line.run(main, resumes=True)


if __name__ == "__main__":
    run()
