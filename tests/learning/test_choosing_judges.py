"""Which encoders judge a run: by default, in the cache, from a hub on this machine, and when a run goes on."""

import json
import shutil

import numpy as np
import pytest
import torch
from checkpoints import randomise, save_clip, save_dinov2
from etils import epath
from fake_hub import reach, serve
from fleet_runs import CONFIG, STEPS, make_config, report_of, write_inputs
from huggingface_hub import constants
from ml_collections import ConfigDict
from PIL import Image
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
)

from configs.dog import get_config
from perfusion_jax import InputError
from perfusion_jax.base_model.source import may_fetch
from perfusion_jax.formats.concept_file import read_card
from perfusion_jax.learning import judges
from perfusion_jax.learning.judges import CLIP_ON_HUB, INSTANCE_ENCODER_ON_HUB, NONE, Judges, Reach, choose
from perfusion_jax.learning.runs import train_fleet, train_one
from perfusion_jax.pod import distributed
from perfusion_jax.runtime import shipped

HUB = Judges(CLIP_ON_HUB, INSTANCE_ENCODER_ON_HUB)
NOTHING = Reach(fetches=False, evaluator=False, instance_encoder=False)


@pytest.mark.parametrize(
    ("given", "base", "reachable", "chosen"),
    [
        (("", ""), "emoji", NOTHING, (str(shipped.EVALUATOR), NONE)),
        (("", ""), "emoji", Reach(True, True, True), (str(shipped.EVALUATOR), NONE)),
        (("", "mine"), "emoji", NOTHING, (str(shipped.EVALUATOR), "mine")),
        ((NONE, ""), "emoji", NOTHING, (NONE, NONE)),
        (("", ""), "sd15", NOTHING._replace(fetches=True), HUB),
        (("mine", ""), "sd15", NOTHING._replace(fetches=True), ("mine", INSTANCE_ENCODER_ON_HUB)),
        ((NONE, ""), "sd15", NOTHING._replace(fetches=True), (NONE, NONE)),
        (("", NONE), "sd15", NOTHING._replace(fetches=True), (CLIP_ON_HUB, NONE)),
        (("", ""), "a/folder", NOTHING, (NONE, NONE)),
        (("", ""), "a/folder", Reach(False, True, True), HUB),
        (("", ""), "a/folder", Reach(False, True, False), (CLIP_ON_HUB, NONE)),
        (("", ""), "a/folder", Reach(False, False, True), (NONE, NONE)),
        (("owner/clip", ""), "a/folder", NOTHING, ("owner/clip", NONE)),
    ],
)
def test_what_judges_by_default(given, base, reachable, chosen):
    assert choose(Judges(*given), base, reachable) == chosen


def test_a_base_model_is_fetched_if_it_is_of_the_hub_and_the_hub_may_be_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a/folder").mkdir(parents=True)
    (tmp_path / "a/model.safetensors").touch()
    names = ("sd15", "owner/model", "emoji", "a/folder", "a/model.safetensors", "./folder")
    assert [name for name in names if may_fetch(name)] == ["sd15", "owner/model"]
    (tmp_path / "sd15").mkdir()
    assert not may_fetch("sd15")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not may_fetch("owner/model")


@pytest.fixture
def cached(monkeypatch):
    """The folders in the hub's cache, by id: what a test puts there."""
    folders = {}
    monkeypatch.setattr(judges, "find_cached_folder", folders.get)
    return folders


@pytest.fixture
def clip(tmp_path):
    return save_clip(tmp_path / "clip")


@pytest.fixture
def local(tmp_path):
    """The config of a base model in a folder."""
    (tmp_path / "model").mkdir()
    keys = {"base": str(tmp_path / "model"), "evaluator": "", "instance_encoder": "", "validation_prompts": ("a {}",)}
    return ConfigDict(keys)


def test_encoders_of_the_cache_are_loaded_without_asking_the_hub(cached, clip, local, tmp_path):
    assert judges.load_evaluator(local) is None
    cached[CLIP_ON_HUB] = clip
    assert judges.load_evaluator(local).instance is None
    cached[INSTANCE_ENCODER_ON_HUB] = save_dinov2(tmp_path / "dinov2")
    assert judges.load_evaluator(local).instance is not None
    local.instance_encoder = NONE
    assert judges.load_evaluator(local).instance is None


def test_one_line_says_what_is_lacking_and_how_to_have_it(cached, clip, local, tmp_path, caplog):
    run = epath.Path(tmp_path / "run")
    assert judges.name_judges(local, run).evaluator == NONE
    (line,) = caplog.messages
    assert "the last step is kept; with a new --workdir, --config.evaluator=openai/clip-vit-base-patch32" in line
    cached[CLIP_ON_HUB] = clip
    caplog.clear()
    settled = judges.name_judges(local, run)
    assert (settled.evaluator, settled.instance_encoder) == (CLIP_ON_HUB, NONE)
    (line,) = caplog.messages
    assert "the CLIP compares pictures with pictures; with a new --workdir, --config.instance_encoder=" in line
    caplog.clear()
    local.instance_encoder = NONE
    judges.name_judges(local, run)
    local.evaluator = NONE
    judges.name_judges(local, run)
    assert not caplog.messages


def test_what_one_host_lacks_none_takes(cached, clip, local, monkeypatch):
    cached.update({CLIP_ON_HUB: clip, INSTANCE_ENCODER_ON_HUB: clip})
    assert judges.find_judges(local) == HUB
    monkeypatch.setattr(distributed, "gather", lambda mine: [mine, [False, True, False]])
    assert judges.find_judges(local) == (CLIP_ON_HUB, NONE)


def test_an_encoder_that_cannot_be_loaded_is_named_with_a_way_out(clip, local):
    (clip / "model.safetensors").unlink()
    local.evaluator = str(clip)
    with pytest.raises(InputError, match=r"config\.evaluator: .*clip: no weights .*--config\.evaluator=none, with"):
        judges.load_evaluator(local)
    shutil.rmtree(clip)
    with pytest.raises(InputError, match="clip: no such folder, and not a hub id"):
        judges.load_evaluator(local)


class TestRuns:
    @pytest.fixture
    def config(self, tmp_path):
        write_inputs(tmp_path)
        config = get_config(str(tmp_path / "base"))
        config.update(CONFIG, name="rex", pictures=str(tmp_path / "rex"), covariance=str(tmp_path / "covariance.npz"))
        config.update(steps=2, validate_every=1, sampling_steps=2, pictures_per_prompt=1)
        config.validation_prompts = ("a {} on the beach",)
        return config

    @staticmethod
    def scored_steps(run):
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        return [line["step"] for line in lines if "score" in line]

    @pytest.mark.parametrize(
        "there", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["without one", "with one"]
    )
    def test_a_run_goes_on_as_it_began_though_a_clip_came_into_the_cache_or_left_it(
        self, cached, clip, config, tmp_path, there
    ):
        run = epath.Path(tmp_path / "run")
        cached.update({CLIP_ON_HUB: clip} if there else {})
        train_one(config, run)
        cached.clear()
        cached.update({} if there else {CLIP_ON_HUB: clip})
        config.steps = 3
        if there:  # nothing is fetched that was not named
            with pytest.raises(InputError, match=r"--config\.evaluator=openai/clip-vit-base-patch32 fetches it"):
                train_one(config, run)
            cached[CLIP_ON_HUB] = clip
        train_one(config, run)
        assert self.scored_steps(run) == ([1, 2, 3] if there else [])
        if not there:
            assert read_card(run / "concepts/rex.safetensors").step == 3
            config.evaluator = str(clip)
            with pytest.raises(InputError, match="evaluator was 'none', is"):
                train_one(config, run)

    def test_without_an_evaluator_the_last_step_of_a_base_model_of_the_hub_is_kept(self, config, tmp_path, monkeypatch):
        with serve({"owner/model": tmp_path / "base"}) as hub:
            reach(hub, tmp_path / "cache", monkeypatch)
            config.update(base="owner/model", evaluator=NONE)
            train_one(config, epath.Path(tmp_path / "run"))
        assert self.scored_steps(tmp_path / "run") == []
        assert read_card(tmp_path / "run/concepts/rex.safetensors").step == 2

    def test_a_fleet_on_a_base_model_of_the_hub_keeps_each_best_step(self, clip, tmp_path, monkeypatch):
        write_inputs(tmp_path)
        repositories = {CLIP_ON_HUB: clip, INSTANCE_ENCODER_ON_HUB: save_dinov2(tmp_path / "dinov2")}
        with serve({"owner/model": tmp_path / "base", **repositories}) as hub:
            reach(hub, tmp_path / "cache", monkeypatch)
            config = make_config(tmp_path, validation_prompts=("a {} on the moon",), base="owner/model")
            config.update(sampling_steps=2, validate_every=2, pictures_per_prompt=1)
            run = tmp_path / "run"
            train_fleet(config, epath.Path(run))
        saved = json.loads((run / "config.json").read_text())
        assert (saved["evaluator"], saved["instance_encoder"]) == HUB
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for name in STEPS:
            scores = {line["step"]: line["score"] for line in lines if line.get("name") == name}
            assert read_card(run / f"concepts/{name}.safetensors").step == max(scores, key=scores.get)
            assert report_of(run)[name]["score"] == pytest.approx(max(scores.values()))


@pytest.mark.slow
def test_encoders_of_full_size_equal_pytorch_behind_its_own_preprocessors(tmp_path):
    """The default ones, of random weights, on a batch of drawn pictures of 512 pixels."""
    tokenizer = CLIPTokenizer(shipped.CLIP_VOCABULARY / "vocab.json", shipped.CLIP_VOCABULARY / "merges.txt")
    tokenizer.save_pretrained(tmp_path / "clip")
    clip = randomise(CLIPModel(CLIPConfig(projection_dim=512)), 0)  # whose other sizes are those of ViT-B/32
    sizes = {"hidden_size": 384, "num_attention_heads": 6, "image_size": 518, "patch_size": 14}
    dinov2 = randomise(Dinov2Model(Dinov2Config(**sizes)), 1)
    cut = BitImageProcessor(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224})
    for name, model, processor in (("clip", clip, CLIPImageProcessor()), ("dinov2", dinov2, cut)):
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    evaluator = judges.load_evaluator(
        ConfigDict(
            {"base": "a/folder", "evaluator": str(tmp_path / "clip"), "instance_encoder": str(tmp_path / "dinov2")}
        )
    )
    coarse = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3)).astype(np.uint8)
    pictures = np.stack(
        [np.asarray(Image.fromarray(one).resize((512, 512), Image.Resampling.BICUBIC)) for one in coarse]
    )
    with torch.no_grad():
        seen = clip.get_image_features(CLIPImageProcessor()(list(pictures), return_tensors="pt").pixel_values)
        hidden = dinov2(cut(list(pictures), return_tensors="pt").pixel_values).last_hidden_state[:, 0]
    for ours, theirs in ((evaluator.clip.images(pictures), seen), (evaluator.embed_instances(pictures), hidden)):
        cosines = ours @ torch.nn.functional.normalize(theirs).numpy().T
        assert np.diag(cosines).min() > 0.9999
        assert (cosines - np.eye(4)).max() < np.diag(cosines).min() - 1e-3  # so that a mistake would show
