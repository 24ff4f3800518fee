import dataclasses
import errno
import json
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import save_checkpoint
from etils import epath
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from perfusion_jax import Concept, Gate, InputError, insert, load_base_model
from perfusion_jax.formats.concept_file import FORMAT, ConceptCard, load_concept, read_card, save_concept
from perfusion_jax.method import baselines
from perfusion_jax.method.baselines import BASELINES
from perfusion_jax.method.concept import stack
from perfusion_jax.method.surgery import cross_attention_layers
from perfusion_jax.runtime.errors import UnavailableError


@pytest.fixture(scope="module")
def concept(sd1_base):
    return sd1_base.new_concept("teddy bear", jnp.eye(sd1_base.model.context_width))


@pytest.fixture
def card(sd1_base):
    return ConceptCard(
        name="rex",
        super_category="teddy bear",
        base_model=sd1_base.name,
        fingerprint=sd1_base.fingerprint,
        bias=0.7,
        temperature=0.15,
        guidance_scale=5.0,
        step=400,
        licence="CC-BY-4.0",
    )


@pytest.fixture
def file(tmp_path, concept, card):
    save_concept(tmp_path / "rex.safetensors", concept, card)
    return tmp_path / "rex.safetensors"


def test_what_was_saved_is_read(file, concept, card, sd1_base):
    found, found_card = load_concept(file, sd1_base)
    assert found_card == card
    assert found_card.placeholder == "<rex>"
    assert jax.tree.structure(found) == jax.tree.structure(concept)
    jax.tree.map(np.testing.assert_array_equal, found, concept)
    assert [path.name for path in file.parent.iterdir()] == ["rex.safetensors"]


@pytest.mark.parametrize("method", BASELINES)
def test_what_other_methods_learn_is_kept_likewise(tmp_path, small_base, card, method):
    card = dataclasses.replace(card, fingerprint=small_base.fingerprint, method=method, class_noun=True)
    assert card.phrase == "<rex> teddy bear"
    embedding = small_base.super_category_embedding("dog")
    learnt = baselines.begin(method, small_base.params["unet"], embedding, jax.random.key(0), rank=3)
    learnt = jax.tree.map(lambda leaf: leaf + 0.5, learnt)
    file = tmp_path / "rex.safetensors"
    save_concept(file, learnt, card)
    found, found_card = load_concept(file, small_base)
    assert found_card == card
    assert jax.tree.structure(found) == jax.tree.structure(learnt)
    jax.tree.map(np.testing.assert_array_equal, found, learnt)
    tensors = load_file(file)
    del tensors[max(tensors)]
    save_file(tensors, file, {"format": FORMAT, **{k: json.dumps(v) for k, v in dataclasses.asdict(card).items()}})
    with pytest.raises(InputError, match=r"rex.safetensors: damaged: .* is missing"):
        load_concept(file, small_base)


def test_a_file_of_before_there_were_other_methods_is_perfusions(file, sd1_base):
    metadata = dict(safe_open(file, "numpy").metadata())
    assert json.loads(metadata.pop("method")) == "perfusion"
    del metadata["class_noun"]
    save_file(load_file(file), file, metadata)
    card = read_card(file)
    assert (card.method, card.class_noun, card.phrase) == ("perfusion", False, "<rex>")
    for method in ("hypernetwork", 3, None):
        save_file(load_file(file), file, {**metadata, "method": json.dumps(method)})
        with pytest.raises(InputError, match="its metadata cannot be read"):
            read_card(file)


def test_equal_concepts_are_equal_files(file, concept, card):
    before = file.read_bytes()
    for _ in range(5):
        save_concept(file, concept, card)
        assert file.read_bytes() == before


def test_tensors_have_plain_names(file):
    names = set(load_file(file))
    assert {"embedding", "target_input", "dual"} < names
    assert "value_outputs.down_blocks.0.attentions.0.transformer_blocks.0.attn2" in names
    assert "key_outputs.mid_block.attentions.0.transformer_blocks.0.attn2" in names


@pytest.mark.parametrize("change", [1.0, 0.1])  # of another model, and of a fine-tune
def test_another_base_model_is_refused_and_both_are_named(file, sd1_base, tmp_path, change):
    folder = save_checkpoint(tmp_path / "other", "sd1")
    tensors = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    rng = np.random.default_rng(0)
    for name in tensors:
        if "attn2" in name:
            tensors[name] += (change * tensors[name].std() * rng.standard_normal(tensors[name].shape)).astype(
                np.float32
            )
    save_file(tensors, folder / "unet/diffusion_pytorch_model.safetensors")
    other = load_base_model(folder)
    with pytest.raises(InputError, match=f"trained on the base model {sd1_base.name}, which {other.name} is not"):
        load_concept(file, other)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_same_model_in_another_dtype_is_accepted(file, sd1_base, sd1_folder, dtype):
    half = load_base_model(sd1_folder, dtype=dtype)
    assert half.fingerprint != sd1_base.fingerprint  # the fields differ, the model does not
    assert load_concept(file, half)[0].embedding.dtype == jnp.float32


def test_a_concept_may_lie_in_a_bucket(bucket, concept, card, sd1_base):
    file = f"{bucket}/concepts/rex.safetensors"
    with pytest.raises(InputError, match=r"gs://bucket/concepts/rex.safetensors: no such concept file"):
        read_card(file)
    save_concept(file, concept, card)
    assert read_card(file) == card
    jax.tree.map(np.testing.assert_array_equal, load_concept(file, sd1_base).concept, concept)
    with pytest.raises(InputError, match="http:// is no storage known here"):
        read_card("http://bucket/rex.safetensors")


BucketError = type("HttpError", (Exception,), {"__module__": "gcsfs.retry"})


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.EIO, "Input/output error"), UnavailableError),
        (BucketError("503, backend error"), UnavailableError),
        (PermissionError(errno.EACCES, "Permission denied"), InputError),
        (BucketError("Forbidden: storage.objects.get"), InputError),
    ],
)
def test_storage_that_fails_for_now_is_no_fault_of_a_concept(file, sd1_base, monkeypatch, error, kind):
    def fail(_):
        raise error

    monkeypatch.setattr(type(epath.Path(file)), "read_bytes", fail)
    for read in (read_card, lambda file: load_concept(file, sd1_base)):
        with pytest.raises(InputError, match=r"rex.safetensors: cannot be read") as raised:
            read(file)
        assert type(raised.value) is kind


def damage(file, change, **metadata_changes):
    tensors = load_file(file)
    change(tensors)
    with file.open("rb") as stream:
        header = stream.read(int.from_bytes(stream.read(8), "little"))
    metadata = json.loads(header)["__metadata__"]
    save_file(tensors, file, {**metadata, **metadata_changes})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("dual"), "damaged: dual is missing"),
        (lambda t: t.update(extra=np.ones(2)), "damaged: extra is not known"),
        (lambda t: t.update(dual=np.ones(2)), r"dual has shape \(2,\) instead of \(48,\)"),
        (lambda t: t["dual"].__setitem__(0, np.nan), "dual has values that are not finite"),
    ],
)
def test_files_edited_by_hand_are_refused(file, sd1_base, change, message):
    damage(file, change)
    with pytest.raises(InputError, match=f"{re.escape(str(file))}: .*{message}"):
        load_concept(file, sd1_base)


@pytest.mark.parametrize("said", [{"bias": '"x"'}, {"step": "Infinity"}, {"name": "5"}, {"licence": "[]"}])
def test_metadata_edited_by_hand_is_refused(file, sd1_base, said):
    damage(file, lambda tensors: None, **said)
    with pytest.raises(InputError, match="metadata cannot be read"):
        load_concept(file, sd1_base)


def test_stacked_concepts_are_not_one_file(tmp_path, concept, card):
    with pytest.raises(InputError, match="2 stacked concepts; a file holds one"):
        save_concept(tmp_path / "two.safetensors", stack([concept, concept]), card)


def test_truncated_missing_and_foreign_files_are_refused(file, sd1_base, tmp_path, concept):
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(InputError, match="not a complete safetensors file"):
        load_concept(file, sd1_base)
    with pytest.raises(InputError, match="no such concept file"):
        load_concept(tmp_path / "missing.safetensors", sd1_base)
    file.write_bytes(pickle.dumps({"embedding": [1.0]}))
    with pytest.raises(InputError, match="not a complete safetensors file"):
        load_concept(file, sd1_base)
    header = b'{"embedding":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}'
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"12")
    with pytest.raises(InputError, match="its numbers are BF16"):
        load_concept(file, sd1_base)
    save_file({"embedding": np.ones(3)}, file)
    with pytest.raises(InputError, match="not a concept of perfusion_jax"):
        load_concept(file, sd1_base)
    save_file({"embedding": np.ones(3)}, file, {"format": FORMAT.replace("1", "2")})
    with pytest.raises(
        InputError, match="of a newer version of perfusion_jax: its format is 'perfusion_jax concept 2'"
    ):
        load_concept(file, sd1_base)
    file.write_bytes(len(header).to_bytes(8, "little") + header.replace(b"embedding", b"rex_lora_") + b"12")
    with pytest.raises(InputError, match="a LoRA, and not a concept"):
        load_concept(file, sd1_base)
    save_file({"lora_unet_mid_block.lora_down.weight": np.ones((1, 3))}, file)
    with pytest.raises(InputError, match="a LoRA, and not a concept: it has no target input and no gate"):
        load_concept(file, sd1_base)


def test_a_failed_write_leaves_the_old_file(file, sd1_base, card, concept):
    before = file.read_bytes()
    not_an_array = dataclasses.replace(concept, dual="no array")
    with pytest.raises(ValueError, match="could not convert string"):
        save_concept(file, not_an_array, card)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == ["rex.safetensors"]
    with pytest.raises(InputError, match="cannot be written"):
        save_concept(file / "below.safetensors", concept, card)


def test_a_concept_of_stable_diffusion_15_takes_at_most_120_kilobytes(tmp_path, card):
    """The layers' widths are read off the real architecture, without its weights."""
    from perfusion_jax.base_model.flax_classes import FlaxUNet2DConditionModel

    module = FlaxUNet2DConditionModel(cross_attention_dim=768)
    params = jax.eval_shape(module.init_weights, jax.random.key(0))
    layers = cross_attention_layers(params)
    widths = {layer: weights["to_v"]["kernel"].shape[1] for layer, weights in layers.items()}
    assert len(widths) == 16
    assert sum(widths.values()) == 12_480
    outputs = {layer: jnp.ones(width) for layer, width in widths.items()}
    concept = Concept(jnp.ones(768), jnp.ones(768), jnp.ones(768), outputs, outputs)
    edited = jax.eval_shape(lambda params: insert(params, concept, Gate(0.6, 0.15)), params)
    assert len(jax.tree.leaves(edited)) == len(jax.tree.leaves(params)) + 2 * 16 + 5
    save_concept(tmp_path / "full.safetensors", concept, card)
    assert 99_840 < (tmp_path / "full.safetensors").stat().st_size <= 120_000
