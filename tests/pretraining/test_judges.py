"""The judges' training: which scenes belong together, what is counted as right."""

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pretraining needs the extra: pip install -e '.[pretrain]'")
pytest.importorskip("resvg_py", reason="pretraining needs the extra: pip install -e '.[pretrain]'")

from pretraining_drawings import atlas  # noqa: E402

from perfusion_jax.emoji_world.muon import MuonAndAdam  # noqa: E402
from pretraining import clip, instance, places, scenes, stream, things, tokenizer  # noqa: E402


@pytest.fixture(scope="module")
def world():
    return scenes.World(atlas(), places.bank())


def test_the_two_scenes_of_an_individual_share_it_and_nothing_else(world):
    plan = instance.family_plan(world.planner, 0, 0)
    count = instance.FAMILIES * instance.MEMBERS
    assert len(plan.styles) == 2 * count
    last = [int(torch.nonzero(plan.scene == scene)[-1]) for scene in range(2 * count)]
    one, other = plan.things[torch.tensor(last[:count])], plan.things[torch.tensor(last[count:])]
    assert torch.equal(one.colours, other.colours)
    # A picture bends what it shows: the second scene is bent a little otherwise, and much less than another would be.
    bend = (one.warp - other.warp).std()
    assert 0.2 < bend / one.warp.std() < 0.5
    sizes = plan.views.size[torch.tensor(last)]
    assert (sizes[:count] != sizes[count:]).all()
    members = one.drawing.reshape(instance.FAMILIES, instance.MEMBERS)
    kinds = world.planner.kind[members]
    assert (kinds == kinds[:, :1]).all()
    alone = torch.bincount(plan.scene) == 1
    assert 0.5 < alone.float().mean() < 0.9
    # Scenes are in order, and company stands behind.
    assert (plan.scene.diff() >= 0).all()
    assert world.draw(plan)[0].shape == (2 * count, 3, 64, 64)


def test_members_that_are_one_drawing_differ_in_colours(world):
    near, pairs = 0, 0
    for step in range(4):
        plan = instance.family_plan(world.planner, 0, step)
        scenes_, last = instance.FAMILIES * instance.MEMBERS, {}
        for number, scene in enumerate(plan.scene.tolist()):
            last[scene] = number
        people = plan.things[torch.tensor([last[scene] for scene in range(scenes_)])]
        shares = world.planner.areas[people.drawing]
        torch.testing.assert_close(shares.sum(1), torch.ones(scenes_))
        for family in range(instance.FAMILIES):
            members = range(family * instance.MEMBERS, (family + 1) * instance.MEMBERS)
            for one, other in itertools.combinations(members, 2):
                if people.drawing[one] == people.drawing[other]:
                    away = (people.colours[one] - people.colours[other]).abs().mean(1) @ shares[one]
                    near, pairs = near + int(away < instance.LEAST_APART), pairs + 1
    assert pairs > 100
    assert near < 0.01 * pairs  # without asking for it, more than a tenth


def test_contrast_is_low_where_partners_are_alike_and_others_are_not():
    apart = torch.eye(8).repeat(2, 1)
    assert instance.contrast(apart) < 0.01
    assert instance.contrast(torch.ones(16, 8)) == pytest.approx(np.log(15), abs=1e-4)
    assert instance.contrast(apart.roll(1, 0)[torch.cat([torch.arange(8), torch.arange(8)])]) < 0.01


def test_the_nearest_individual_is_found_by_its_mean_cosine():
    references = np.array([[[1, 0], [0.8, 0.6]], [[0, 1], [0.6, 0.8]]])
    pictures = np.array([[1, 0], [0, 1], [0.8, 0.6]])
    assert instance.share_found(pictures, np.array([0, 1, 0]), references) == 1
    assert instance.share_found(pictures, np.array([0, 0, 1]), references) == pytest.approx(1 / 3)


@pytest.mark.slow
def test_the_evaluator_begins_with_what_the_instance_encoder_sees(world, tmp_path):
    torch.manual_seed(0)
    encoder = instance.build_encoder().eval()
    with torch.no_grad():
        for weight in encoder.parameters():
            weight += 0.1 * torch.randn_like(weight)
    model = clip.build_clip(tokenizer.save_tokenizer(tmp_path)).eval()
    pictures = world.scenes(0, 0, 8)[0]
    clip.begin_as(model, encoder, pictures)
    with torch.no_grad():
        theirs = encoder(pictures).last_hidden_state[:, 0]
        before = encoder.embeddings(pictures)
        after = model.vision_model.pre_layrnorm(before)
        # But for the layer norm that a ViT has not, the two are the same.
        model.vision_model.pre_layrnorm = torch.nn.Identity()
        ours = model.vision_model(pixel_values=pictures).pooler_output
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
    assert torch.nn.functional.cosine_similarity(before, after, dim=-1).min() > 0.9
    assert after.std() == pytest.approx(before.std(), rel=0.2)


def test_the_instance_encoder_learns(world):
    torch.manual_seed(0)
    model = instance.build_encoder()
    optimizer = MuonAndAdam(model, 2e-3, 1e-3)
    # One batch again and again: of fresh ones it takes hundreds of steps to see anything.
    pictures = world.draw(instance.family_plan(world.planner, 1, 0))[0]
    losses = [instance.train_step(model, optimizer, 0.3, pictures).item() for _ in range(40)]
    assert losses[-1] < 0.9 * np.log(2 * instance.FAMILIES * instance.MEMBERS - 1)


def test_targets_name_what_a_scene_shows_and_not_what_is_worn(world):
    plan = world.planner.plan(3, 0, 256)
    targets = clip.kind_targets(plan, world.planner.kind)
    kinds = things.kinds()
    for scene in range(256):
        members = torch.nonzero((plan.scene == scene) & ~plan.worn)[:, 0].tolist()
        expected = {atlas().sources[plan.things.drawing[member]].entry.kind for member in members}
        assert {kinds[index] for index in torch.nonzero(targets[scene])[:, 0].tolist()} == expected
    assert set(targets.sum(1).round(decimals=4).tolist()) <= {0.0, 1.0}
    assert plan.worn.any()


@pytest.mark.slow
def test_the_evaluator_takes_a_step_and_is_measured(world, tmp_path):
    torch.manual_seed(0)
    text_tokenizer = tokenizer.save_tokenizer(tmp_path)
    model = clip.build_clip(text_tokenizer)
    optimizer = MuonAndAdam(model, 2e-3, 1e-3)
    plan = world.planner.plan(0, 0, 8)
    tokens = torch.tensor(tokenizer.encode(text_tokenizer, ["a photo of a dog", "a photo of a box"] * 4))
    words = torch.tensor(tokenizer.encode(text_tokenizer, clip.kind_phrases()))
    targets = clip.kind_targets(plan, world.planner.kind)
    pictures = world.draw(plan)[0]
    losses = [clip.train_step(model, optimizer, 1.0, pictures, tokens, words, targets).item() for _ in range(3)]
    assert losses[-1] < losses[0]
    model.logit_scale.data.fill_(6)
    clip.train_step(model, optimizer, 0.0, pictures, tokens, words, targets)
    assert model.logit_scale.exp().item() == pytest.approx(clip.LARGEST_SCALE)
    shares = clip.measure(model, text_tokenizer, world, 5, 256)
    assert set(shares) == {"category", "place", "pair"}
    assert all(0 <= share <= 1 for share in shares.values())
    assert stream.word_table(text_tokenizer)["dog"] == text_tokenizer("dog", add_special_tokens=False).input_ids
