"""Training's parts: the autoencoder, the optimiser, what a step of the diffusion model sees, checkpoints, the folder
that is written."""

import copy
import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pretraining needs the extra: pip install -e '.[pretrain]'")
pytest.importorskip("resvg_py", reason="pretraining needs the extra: pip install -e '.[pretrain]'")

from diffusers import StableDiffusionPipeline  # noqa: E402
from pretraining_drawings import atlas  # noqa: E402

from perfusion_jax.emoji_world.muon import MuonAndAdam  # noqa: E402
from pretraining import (  # noqa: E402
    autoencoder,
    captions,
    codes,
    diffusion,
    model,
    places,
    scenes,
    stream,
    tokenizer,
    training_tools,
)

SETTINGS = diffusion.Settings()
LENGTH = tokenizer.MODEL_MAX_LENGTH
SMALL = autoencoder.Settings(block_out_channels=(8, 8, 8), latent_channels=8)


@pytest.fixture(scope="module")
def text_tokenizer(tmp_path_factory):
    return tokenizer.save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def world():
    return scenes.World(atlas(), places.bank())


@pytest.fixture(scope="module")
def trainer(text_tokenizer):
    return diffusion.make_trainer(text_tokenizer, 8, 16, torch.device("cpu"), SETTINGS)


def made_up(count, text_tokenizer):
    """Random latents, the left half covered, and "a blue dog on the", with a code before it or on it in two thirds."""
    torch.manual_seed(0)
    ids = stream.word_table(text_tokenizer)
    before = [("a", -1), (captions.CODE, 0), ("blue", 0), ("dog", 0), ("on", -1), ("the", -1)]
    written = []
    for number in range(count):
        way = number % 3  # 0: no code, 1: before the noun, 2: on the noun
        words = tuple(
            captions.Word(text, phrase, text not in ("dog",) and phrase == 0, text == "dog")
            for text, phrase in before
            if way == 1 or text != captions.CODE
        )
        written.append(captions.Caption(words, number if way else -1, way == 2, 0 if way else -1))
    texts = captions.to_texts(written, ids, text_tokenizer.bos_token_id, text_tokenizer.eos_token_id, LENGTH)
    objects = torch.zeros(count, 16, 16)
    objects[:, :, :8] = 1
    pictures = torch.randint(256, (count, 4, codes.CODE_SIDE, codes.CODE_SIDE), dtype=torch.uint8)
    return torch.randn(count, 8, 16, 16), objects, texts, pictures


def batch_of(count, text_tokenizer, **changes):
    settings = dataclasses.replace(SETTINGS, **changes)
    schedule = model.build_scheduler().alphas_cumprod
    generator = torch.Generator().manual_seed(0)
    made = made_up(count, text_tokenizer)
    return made, diffusion.make_batch(*made, schedule, text_tokenizer.eos_token_id, generator, settings)


def test_whitening_changes_the_latents_and_not_the_pictures():
    torch.manual_seed(0)
    small = autoencoder.build_autoencoder(SMALL).eval()
    pictures = torch.rand(64, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        before = small(pictures).sample
        autoencoder.whiten(small, pictures)
        latents = small.encode(pictures).latent_dist.mean
        after = small(pictures).sample
    flat = latents.permute(0, 2, 3, 1).reshape(-1, 8)
    torch.testing.assert_close(flat.mean(0), torch.zeros(8), rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.cov(flat.T), torch.eye(8), rtol=0, atol=1e-3)
    torch.testing.assert_close(before, after, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_scaled_latents_change_the_picture_as_much_along_any_axis():
    torch.manual_seed(0)
    small = autoencoder.build_autoencoder(SMALL).eval().double()
    pictures = torch.rand(32, 3, 64, 64, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        before = small(pictures).sample
        autoencoder.whiten(small, pictures)
        autoencoder.scale_by_impact(small, pictures, least=1e-6)
        latents = small.encode(pictures).latent_dist.mean
        after = small(pictures).sample
    torch.testing.assert_close(before, after, rtol=0, atol=1e-4)
    # But along the axis that changes least: there a step of the scaling's own length left where the decoder is linear.
    gram = autoencoder.impact(small, pictures, step=1e-3)[:7, :7]
    torch.testing.assert_close(gram, gram[0, 0] * torch.eye(7).double(), rtol=0, atol=0.05 * float(gram[0, 0]))
    # The derivative by a single cell, as an independent measure of what a step along each axis does.
    lengths = torch.zeros(7)
    for axis in range(7):
        cell = torch.zeros(8, 16, 16, dtype=torch.float64)
        cell[axis, 8, 8] = 1e-4
        with torch.no_grad():
            ahead, behind = (small.decode(latents + sign * cell).sample for sign in (1, -1))
        lengths[axis] = ((ahead - behind) / 2e-4).square().sum((1, 2, 3)).mean()
    assert lengths.max() < 1.5 * lengths.min()


def test_a_turned_model_is_the_same_along_other_axes():
    torch.manual_seed(0)
    unet = model.build_unet(8, 16).eval()
    axes = torch.linalg.qr(torch.randn(8, 8))[0]
    latents, text = torch.randn(2, 8, 16, 16), torch.randn(2, 5, model.CONTEXT_WIDTH)

    def along(axes, maps):
        return torch.einsum("ji,bihw->bjhw", axes, maps)

    with torch.no_grad():
        before = unet(latents, 500, text).sample
        weights = {f"unet.{name}": value for name, value in unet.state_dict().items()}
        turned = diffusion.turned(weights, axes)
        unet.load_state_dict({name.removeprefix("unet."): value for name, value in turned.items()})
        after = unet(along(axes, latents), 500, text).sample
    torch.testing.assert_close(after, along(axes, before), rtol=0, atol=1e-4)


def test_the_smallest_scale_holds():
    torch.manual_seed(0)
    small = autoencoder.build_autoencoder(SMALL).eval()
    pictures = torch.rand(64, 3, 64, 64) * 2 - 1
    autoencoder.whiten(small, pictures)
    autoencoder.scale_by_impact(small, pictures, least=0.5)
    deviations = autoencoder.encode(small, pictures).std((0, 2, 3))
    assert deviations[0] == pytest.approx(1, abs=0.05)
    assert deviations.min() == pytest.approx(0.5, abs=0.05)
    assert (deviations.diff() < 0.02).all()


def test_psnr_is_that_of_eight_bit_pixels_and_of_the_mask_alone():
    pictures = torch.zeros(2, 3, 8, 8)
    wrong = pictures + torch.tensor([0, 10 / 127.5])[:, None, None, None]
    wrong[1, :, :4] += 30 / 127.5
    mask = torch.zeros(2, 8, 8)
    mask[:, 4:] = 1
    assert autoencoder.psnr(pictures, wrong, mask)[1] == pytest.approx(20 * np.log10(255 / 10), abs=0.01)
    whole = 10 * np.log10(255**2 / ((10**2 + 40**2) / 2))
    assert autoencoder.psnr(pictures, wrong)[1] == pytest.approx(whole, abs=0.01)
    assert autoencoder.psnr(pictures, wrong)[0] > 100


def test_latents_are_moved_as_pictures_are():
    picture = torch.arange(2 * 8 * 8.0).reshape(1, 2, 8, 8)
    for way in range(3):
        small = torch.nn.functional.avg_pool2d(picture, 2)
        moved = torch.nn.functional.avg_pool2d(autoencoder.move(picture, way), 2)
        torch.testing.assert_close(autoencoder.move(small, way), moved)
        assert not torch.equal(autoencoder.move(picture, way), picture)
    assert autoencoder.move(picture, 3).shape == (1, 2, 4, 4)


@pytest.mark.slow
def test_the_autoencoder_learns(world):
    small = autoencoder.build_autoencoder(SMALL)
    optimizer = MuonAndAdam(small, 3e-3, 2e-3)
    generator = torch.Generator().manual_seed(0)
    losses = [
        autoencoder.train_step(small, optimizer, 1.0, world.scenes(0, step, 16)[0], SMALL, generator)[0]
        for step in range(150)
    ]
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:5])


def test_a_batch_mixes_latents_and_noise_as_the_schedule_says(text_tokenizer):
    (latents, *_), batch = batch_of(64, text_tokenizer, middle_share=0.0)
    alphas = model.build_scheduler().alphas_cumprod[batch.timesteps][:, None, None, None]
    recovered = alphas.sqrt() * batch.noisy_latents - (1 - alphas).sqrt() * batch.velocity
    torch.testing.assert_close(recovered, latents, rtol=0, atol=1e-5)
    # One timestep from each stratum of 1000 / 64.
    assert len(set((batch.timesteps * 64 // 1000).tolist())) >= 60
    torch.testing.assert_close(batch.weights[..., :8], (1 + SETTINGS.object_weight) * batch.weights[..., 8:])
    ratio = (alphas / (1 - alphas)).flatten()
    of_ground = batch.weights[:, 0, 0, -1]
    expected = torch.where(ratio < 5, ratio + 0.5, 5.5) / (ratio + 1)
    torch.testing.assert_close(of_ground, expected)


def test_more_timesteps_are_where_shapes_are_told_from_the_noise(text_tokenizer):
    _, batch = batch_of(4_000, text_tokenizer, middle_share=0.5)
    counts = torch.histc(batch.timesteps.float(), 10, 0, 1000)
    # Half of all evenly over ten tenths, the other half over four of these.
    expected = torch.tensor([200.0, 700, 700, 700, 700, 200, 200, 200, 200, 200])
    torch.testing.assert_close(counts, expected, rtol=0, atol=2)


def test_captions_are_dropped_and_words_hidden_in_the_shares_that_settings_say(text_tokenizer):
    (_, _, texts, _), batch = batch_of(3072, text_tokenizer)
    end = text_tokenizer.eos_token_id
    empty = batch.texts.tokens[:, 1] == end
    assert empty.float().mean() == pytest.approx(SETTINGS.empty_caption_share, abs=0.02)
    assert (batch.texts.code[empty] == -1).all()
    assert batch.visible[empty].all()
    kept = ~empty
    assert (~batch.visible[kept, -1]).float().mean() == pytest.approx(SETTINGS.hidden_padding_share, abs=0.03)
    nouns = (texts.phrase == 0) & ~texts.tells
    assert batch.visible[nouns].all()
    nothing = kept & (batch.attended.sum((1, 2)) == 2 * LENGTH - 1)
    assert nothing[kept].float().mean() == pytest.approx(SETTINGS.reads_nothing_share, abs=0.03)
    causal = kept & (batch.attended.sum((1, 2)) == LENGTH * (LENGTH + 1) // 2)
    everything = 1 - SETTINGS.reads_nothing_share - SETTINGS.reads_phrase_share
    assert causal[kept].float().mean() == pytest.approx(everything, abs=0.03)
    telling = (texts.tells & ~batch.visible).any(1)
    assert not telling[nothing].any()
    assert telling[kept & ~nothing].float().mean() == pytest.approx(SETTINGS.hidden_telling_share, abs=0.03)


def test_the_whole_caption_is_read_as_clip_reads_it(text_tokenizer, trainer):
    _, batch = batch_of(12, text_tokenizer, reads_nothing_share=0, reads_phrase_share=0, empty_caption_share=0.3)
    plain = batch.texts.code < 0
    with torch.no_grad():
        ours = trainer.model.encode(batch)
        clip = trainer.model.text_encoder(batch.texts.tokens).last_hidden_state
    torch.testing.assert_close(ours[plain], clip[plain], rtol=0, atol=1e-5)
    # A code changes what is said from its own position on, and nothing before it.
    for row in torch.nonzero(~plain)[:, 0].tolist():
        position = batch.texts.code[row]
        torch.testing.assert_close(ours[row, :position], clip[row, :position], rtol=0, atol=1e-5)
        assert ((ours[row, position:] - clip[row, position:]).abs().amax(-1) > 1e-5).all()


def test_a_phrase_is_read_alone(text_tokenizer, trainer):
    _, batch = batch_of(12, text_tokenizer, reads_nothing_share=0, reads_phrase_share=1, empty_caption_share=0)
    with torch.no_grad():
        ours = trainer.model.encode(batch)
    rows, nouns = torch.nonzero((batch.texts.phrase == 0) & ~batch.texts.tells, as_tuple=True)
    told = batch.texts.code >= 0
    # The noun has read the code, the article and the words after it have not.
    first_plain = int(torch.nonzero(~told)[0])
    for row in torch.nonzero(told)[:, 0].tolist():
        noun, plain_noun = nouns[rows == row], nouns[rows == first_plain]
        assert (ours[row, noun] - ours[first_plain, plain_noun]).abs().max() > 1e-3
        torch.testing.assert_close(ours[row, 1], ours[first_plain, 1], rtol=0, atol=1e-5)
        if noun == plain_noun:
            torch.testing.assert_close(ours[row, noun + 1], ours[first_plain, noun + 1], rtol=0, atol=1e-5)


def test_a_code_does_not_know_where_its_individual_stands(world):
    plan = world.planner.plan(0, 0, 16)
    painted = world.paint(plan.things)

    def read(generator):
        return codes.code_pictures(painted, plan.things, generator)

    one, same = read(torch.Generator().manual_seed(1)), read(torch.Generator().manual_seed(1))
    assert torch.equal(one, same)
    assert one.shape == (len(plan.things), 4, codes.CODE_SIDE, codes.CODE_SIDE)
    assert one[:, 3].flatten(1).any(1).all()
    assert not torch.equal(one, read(torch.Generator().manual_seed(2)))


def test_the_stream_goes_on_as_if_it_had_never_stopped(world, text_tokenizer):
    torch.manual_seed(0)
    small = autoencoder.build_autoencoder(SMALL).eval()

    def batches(first):
        return stream.Stream(world, small, text_tokenizer, seed=1, batch_size=8, uses=4, capacity=16).batches(first)

    whole, resumed = batches(0), batches(3)
    for _ in range(3):
        next(whole)
    for _ in range(2):
        one, other = next(whole), next(resumed)
        torch.testing.assert_close(
            one[0], other[0], rtol=0, atol=1e-2
        )  # float16 latents of a batch in another order of sums
        for field in dataclasses.fields(one[2]):
            assert torch.equal(getattr(one[2], field.name), getattr(other[2], field.name))
        assert torch.equal(one[3], other[3])
    latents, objects, texts, pictures = one
    assert latents.shape == (8, 8, 16, 16)
    assert objects.shape == (8, 16, 16)
    assert texts.tokens.shape == (8, LENGTH)
    assert pictures.shape == (8, 4, codes.CODE_SIDE, codes.CODE_SIDE)


def test_the_learning_rate_warms_up_and_falls_to_zero():
    factors = [diffusion.rate_factor(step, 1000, 100, SETTINGS) for step in (0, 500, 1000, 1050, 1100)]
    assert factors == pytest.approx([1 / SETTINGS.warm_up_steps, 1, 1, 0.5, 0])
    assert diffusion.rate_factor(10**6, None, 0, SETTINGS) == 1


def test_a_trainer_comes_back_from_its_checkpoint(tmp_path, text_tokenizer):
    from pretraining import train_diffusion

    def steps(trainer, count):
        for _ in range(count):
            _, batch = batch_of(6, text_tokenizer)
            diffusion.train_step(trainer.model, trainer.optimizer, 1.0, batch)
            training_tools.average_weights(trainer.average, trainer.model, 0.5)
            trainer.step += 1

    def make():
        return diffusion.make_trainer(text_tokenizer, 8, 16, torch.device("cpu"), SETTINGS)

    trainer = make()
    steps(trainer, 1)
    trainer.save(tmp_path / "constant.pt")
    assert not (tmp_path / "constant.pt.partial").exists()
    steps(trainer, 1)
    again = make()
    assert train_diffusion.open_trainer(tmp_path, again, decay_samples=0).name == "constant.pt"
    assert again.step == 1
    steps(again, 1)
    for one, other in zip(trainer.average.parameters(), again.average.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    branch = make()
    assert train_diffusion.open_trainer(tmp_path, branch, decay_samples=640).name == "decaying.pt"
    assert (branch.step, branch.decay_start) == (1, 1)
    assert train_diffusion.latest(tmp_path)["decay_start"] is None
    branch.save(tmp_path / "decaying.pt")
    light = make()
    light.restore(diffusion.lightened(train_diffusion.latest(tmp_path)))
    assert (light.step, light.decay_start) == (1, None)  # of the decay phase, and a constant phase goes on from it
    kept = make()
    kept.restore(training_tools.load_checkpoint(tmp_path / "constant.pt"))
    for one, other in zip(kept.average.parameters(), light.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    again.save(tmp_path / "constant.pt")  # the constant phase has gone on: the branch is of the past
    assert train_diffusion.latest(tmp_path)["step"] == 2
    anew = make()
    train_diffusion.open_trainer(tmp_path, anew, decay_samples=640)
    assert (anew.step, anew.decay_start) == (2, 2)


def test_moments_are_laid_out_as_the_parameters_of_another_device_are():
    """A card's convolutions have channels last; fused AdamW reads memory as it lies."""

    def trained(layout):
        torch.manual_seed(0)
        net = torch.nn.ModuleDict({"conv_in": torch.nn.Conv2d(3, 4, 3), "inner": torch.nn.Conv2d(4, 4, 3)})
        net = net.to(memory_format=layout)
        return net, MuonAndAdam(net, 1e-2, 1e-2)

    def step(net, optimizer, number):
        inputs = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(number))
        net["inner"](net["conv_in"](inputs)).square().mean().backward()
        optimizer.step(1.0)

    net, optimizer = trained(torch.contiguous_format)
    step(net, optimizer, 0)
    other, moved = trained(torch.channels_last)
    other.load_state_dict(net.state_dict())
    training_tools.restore_optimizer(moved, copy.deepcopy(optimizer.state_dict()))
    for part in moved.optimizers:
        for parameter, moments in part.state.items():
            for value in moments.values():
                assert value.ndim == 0 or value.stride() == parameter.stride()
    step(net, optimizer, 1)
    step(other, moved, 1)
    for one, same in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, same, rtol=0, atol=1e-3)


def test_a_checkpoint_of_another_vocabulary_is_refused(trainer, tmp_path):
    trainer.save(tmp_path / "constant.pt")
    state = training_tools.load_checkpoint(tmp_path / "constant.pt")
    light = diffusion.lightened(state)
    assert light["vocabulary"] == state["vocabulary"] == trainer.vocabulary != ""
    trainer.restore({name: value for name, value in light.items() if name != "vocabulary"})  # as older ones are
    with pytest.raises(ValueError, match="vocabulary"):
        trainer.restore({**light, "vocabulary": "another"})


@pytest.mark.parametrize("killed_after", [0, 1, 2])
def test_latents_are_rescaled_whenever_the_command_was_killed(tmp_path, killed_after):
    from pretraining import rescale_latents

    autoencoder_folder, checkpoint = tmp_path / "model", tmp_path / "constant.pt"
    for folder in ("model", "scaled"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "is").write_text(folder)
    checkpoint.write_text("white")
    (tmp_path / "scaled.pt").write_text("scaled")
    if killed_after > 0:
        autoencoder_folder.rename(tmp_path / "white")
    if killed_after > 1:
        (tmp_path / "scaled").rename(autoencoder_folder)
    rescale_latents.take_over(autoencoder_folder, checkpoint)
    assert (autoencoder_folder / "is").read_text() == "scaled"
    assert (tmp_path / "white" / "is").read_text() == "model"
    assert checkpoint.read_text() == "scaled"
    assert not (tmp_path / "scaled.pt").exists()


def test_the_folder_is_a_stable_diffusion_model(tmp_path, text_tokenizer):
    pipeline = model.build_pipeline(
        autoencoder.build_autoencoder(SMALL),
        model.build_text_encoder(text_tokenizer),
        text_tokenizer,
        model.build_unet(8, 16),
    )
    pictures = model.sample(pipeline, ("a dog",), seed=0, steps=2)
    assert model.save_pipeline(pipeline, tmp_path) < 50e6
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.float32)
    again = model.sample(loaded, ("a dog",), seed=0, steps=2)
    assert pictures.shape == (1, 64, 64, 3)
    assert np.abs(pictures.astype(int) - again).max() <= 8  # half precision on disk


def test_lifting_the_context_keeps_the_model_and_makes_the_covariance_invertible(text_tokenizer):
    torch.manual_seed(0)
    text_encoder, unet = model.build_text_encoder(text_tokenizer), model.build_unet(8, 16)
    norm = text_encoder.text_model.final_layer_norm
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_(0, 2)
    tokens = torch.randint(0, 700, (300, LENGTH))
    latents, timesteps = torch.randn(2, 8, 16, 16), torch.tensor([3, 900])

    @torch.no_grad()
    def run():
        encodings = text_encoder(tokens).last_hidden_state
        rows = encodings.reshape(-1, encodings.shape[-1]).double()
        eigenvalues = torch.linalg.eigvalsh(rows.T @ rows)
        return unet(latents, timesteps, encodings[:2]).sample, (eigenvalues[-1] / eigenvalues[0]).item()

    before, condition_before = run()
    model.lift_context(text_encoder, unet, tokens)
    after, condition_after = run()
    torch.testing.assert_close(before, after, rtol=0, atol=2e-5)
    assert condition_before > 1e5
    assert condition_after < 5e3


def test_every_word_of_the_world_is_one_token(text_tokenizer):
    for word in tokenizer.split_words(captions.vocabulary()):
        assert text_tokenizer.tokenize(word) == [f"{word}</w>"]


def test_unknown_words_fall_apart_and_come_back(text_tokenizer):
    ids = text_tokenizer("a wombat in Zürich!").input_ids
    assert text_tokenizer.decode(ids, skip_special_tokens=True).strip() == "a wombat in zürich !"
    assert text_tokenizer.eos_token_id not in ids[1:-1]


def test_merges_are_learned_from_the_most_frequent_pair():
    assert tokenizer.learn_merges(["ab", "abc"]) == [("a", "b"), ("a", "b</w>"), ("ab", "c</w>")]
