"""What can be loaded, from where, and what is said when it cannot."""

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import requests
from checkpoints import save_checkpoint, save_full_size_xl
from fake_hub import serve
from huggingface_hub.errors import HfHubHTTPError
from safetensors.numpy import load_file, save_file
from transformers import CLIPTokenizerFast

from perfusion_jax import InputError, load_base_model
from perfusion_jax.base_model import source as source_lib
from perfusion_jax.runtime.errors import UnavailableError

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def broken(sd1_folder, tmp_path):
    """A copy of a good checkpoint, to be broken."""
    return shutil.copytree(sd1_folder, tmp_path / "model")


def same_parameters(a, b):
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)


def edit_json(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_sharded_weights(sd1_base, tmp_path):
    folder = save_checkpoint(tmp_path / "sharded", "sd1", max_shard_size="500KB")
    assert len(list((folder / "unet").glob("*-of-*.safetensors"))) > 2
    same_parameters(load_base_model(folder), sd1_base)
    next((folder / "unet").glob("*00002-of-*.safetensors")).unlink()
    with pytest.raises(InputError, match=r"index\.json: the shards .*00002-of"):
        load_base_model(folder)


def test_fp16_variant_only_on_request(sd1_base, tmp_path):
    folder = save_checkpoint(tmp_path / "half", "sd1", variant="fp16")
    same_parameters(load_base_model(folder, variant="fp16"), sd1_base)
    with pytest.raises(InputError, match="ask for variant='fp16'"):
        load_base_model(folder)


@pytest.mark.parametrize("name", ["{}.fp16.safetensors.index.json", "{}.safetensors.index.fp16.json"])
def test_sharded_fp16_variant_under_either_name_of_its_index(sd1_base, tmp_path, name):
    folder = save_checkpoint(tmp_path / "both", "sd1", max_shard_size="500KB", variant="fp16")
    (index,) = (folder / "unet").glob("*.index*.json")
    index.rename(folder / "unet" / name.format("diffusion_pytorch_model"))
    same_parameters(load_base_model(folder, variant="fp16"), sd1_base)


def test_a_component_without_the_variant_is_read_from_its_plain_files(sd1_folder, sd1_base, tmp_path):
    folder = save_checkpoint(tmp_path / "half", "sd1", variant="fp16")
    for component in ("vae", "text_encoder"):
        shutil.rmtree(folder / component)
        shutil.copytree(sd1_folder / component, folder / component)
    same_parameters(load_base_model(folder, variant="fp16"), sd1_base)
    with pytest.raises(InputError, match="unet: no weights, but some of variant 'fp16': ask for variant='fp16'"):
        load_base_model(folder)


def test_a_folder_as_transformers_5_writes_it(sd1_folder, sd1_base, tmp_path):
    """One file of words, and a text encoder without its prefix."""
    folder = tmp_path / "model"
    shutil.copytree(sd1_folder, folder)
    fast = CLIPTokenizerFast.from_pretrained(folder / "tokenizer")
    shutil.rmtree(folder / "tokenizer")
    fast.save_pretrained(folder / "tokenizer")
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json"):
        (folder / "tokenizer" / name).unlink()
    file = folder / "text_encoder/model.safetensors"
    tensors = load_file(file)
    save_file({name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}, file)
    base = load_base_model(folder)
    same_parameters(base, sd1_base)
    prompts = ["a photo of a <rex> on the beach, snow!", "THE teddy  bear's dog"]
    np.testing.assert_array_equal(
        base.model.tokenizer(prompts, ["<rex>"]), sd1_base.model.tokenizer(prompts, ["<rex>"])
    )
    assert base.model.tokenizer.has_words_of(sd1_base.model.tokenizer)
    (folder / "tokenizer/tokenizer.json").write_text('{"model": []}')
    with pytest.raises(InputError, match="tokenizer: not a CLIP tokeniser"):
        load_base_model(folder)


def test_a_variant_that_is_not_there_is_refused(sd1_folder):
    with pytest.raises(InputError, match="no weights of variant 'non_ema', but plain ones: leave the variant out"):
        load_base_model(sd1_folder, variant="non_ema")


def test_one_by_one_convolutions_stand_for_linear_layers_in_old_vaes(broken, sd1_base):
    def to_convolution(tensors):
        for name in [name for name in tensors if "attentions" in name and tensors[name].ndim == 2]:
            tensors[name] = tensors[name][:, :, None, None]

    change_tensors(broken / "vae/diffusion_pytorch_model.safetensors", to_convolution)
    same_parameters(load_base_model(broken), sd1_base)


def test_number_of_heads_may_be_given_by_its_proper_name(broken, sd1_base):
    edit_json(broken / "unet/config.json", num_attention_heads=4, attention_head_dim=8)
    assert load_base_model(broken).model.unet.attention_head_dim == sd1_base.model.unet.attention_head_dim == 4


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_half_precision_files_load_as_the_requested_dtype(broken, sd1_base, dtype):
    tensors = load_file(broken / WEIGHTS)
    save_file({name: tensor.astype(dtype) for name, tensor in tensors.items()}, broken / WEIGHTS)
    unet = load_base_model(broken).params["unet"]
    jax.tree.map(
        lambda ours, exact: np.testing.assert_array_equal(ours, exact.astype(dtype).astype(jnp.float32)),
        unet,
        sd1_base.params["unet"],
    )


def test_flax_msgpack(broken, sd1_base):
    for component, stem in (
        ("unet", "diffusion_flax_model"),
        ("vae", "diffusion_flax_model"),
        ("text_encoder", "flax_model"),
    ):
        next((broken / component).glob("*.safetensors")).unlink()
        file = broken / component / f"{stem}.msgpack"
        file.write_bytes(flax.serialization.to_bytes(sd1_base.params[component]))
    same_parameters(load_base_model(broken), sd1_base)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"flax_model\.msgpack: not a complete Flax msgpack file"):
        load_base_model(broken)


def test_old_names_of_the_vaes_attention(broken, sd1_base):
    file = broken / "vae/diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in load_file(file).items():
        for new, former in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{former}.")
        tensors[name] = tensor
    assert any("proj_attn" in name for name in tensors)
    save_file(tensors, file)
    same_parameters(load_base_model(broken), sd1_base)


def test_position_ids_saved_by_old_transformers_are_passed_over(broken, sd1_base):
    file = broken / "text_encoder/model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "text_model.embeddings.position_ids": np.arange(16)[None]}, file)
    same_parameters(load_base_model(broken), sd1_base)


def test_loads_where_pytorch_is_not_installed(sd1_folder):
    program = """
        import importlib.machinery, sys

        find_spec = importlib.machinery.PathFinder.find_spec

        def without_torch(name, path=None, target=None):
            return None if name.split(".")[0] in ("torch", "torchvision") else find_spec(name, path, target)

        importlib.machinery.PathFinder.find_spec = without_torch
        try:
            import torch
        except ImportError:
            pass
        else:
            sys.exit("torch can still be imported")

        import jax, jax.numpy as jnp
        import perfusion_jax
        from perfusion_jax.base_model import Context

        base = perfusion_jax.load_base_model(sys.argv[1])
        encodings = base.model.encode(base.params, base.model.tokenizer(["a photo of a dog"])).tokens
        fed = Context(perfusion_jax.keys_values(base.params["unet"], encodings))
        noise = jax.jit(base.model.denoise)(base.params["unet"], jnp.ones((1, 16, 16, 4)), jnp.array([5]), fed)
        assert jnp.isfinite(noise).all()
        assert "torch" not in sys.modules
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), sd1_folder], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "deprecated" not in result.stderr


def peak_memory_of_loading(small, folder, dtype) -> float:
    """Loads in a process of its own; returns how far its resident memory rose, over the size of the weights."""
    program = """
        import re, sys, jax, jax.numpy as jnp, perfusion_jax
        from pathlib import Path

        def kilobytes(field):
            return int(re.search(rf"{field}:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])

        perfusion_jax.load_base_model(sys.argv[1])  # whatever the libraries allocate once
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = kilobytes("VmRSS")
        base = perfusion_jax.load_base_model(sys.argv[2], dtype=jnp.dtype(sys.argv[3]))
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(base.params))
        print((kilobytes("VmHWM") - before) * 1024 / weights)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), small, folder, dtype]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_while_loading_is_little_more_than_the_weights(sd1_folder, large_folder, dtype):
    assert 0.9 < peak_memory_of_loading(sd1_folder, large_folder, dtype) < 1.3


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_while_loading_stable_diffusion_15(sd1_folder, full_size_folder, dtype):
    ratio = peak_memory_of_loading(sd1_folder, full_size_folder, dtype)
    print(f"peak memory of loading Stable Diffusion 1.5 in {dtype}: {ratio:.2f} x the weights")
    assert 0.9 < ratio < 1.3


@pytest.mark.slow
def test_memory_while_loading_sdxl(sd1_folder, tmp_path):
    ratio = peak_memory_of_loading(sd1_folder, save_full_size_xl(tmp_path), "bfloat16")
    print(f"peak memory of loading SDXL in bfloat16: {ratio:.2f} x the weights")
    assert 0.9 < ratio < 1.3


def last_line(process):
    return process.stderr.strip().splitlines()[-1]


class TestHub:
    @pytest.fixture
    def hub(self, sd1_folder, tmp_path, monkeypatch):
        """A hub on this machine that serves one model, and an empty cache."""
        repository = shutil.copytree(sd1_folder, tmp_path / "repository")
        (repository / "unet/diffusion_pytorch_model.bin").write_bytes(b"pickle")
        (repository / "unet/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"half")
        (repository / "unet/diffusion_flax_model.msgpack").write_bytes(b"flax")
        with serve({"owner/model": repository}) as server:
            yield server

    def run(self, hub, tmp_path, source, **options):
        """Loads in a process of its own: huggingface_hub reads its settings when it is imported."""
        program = (
            "import sys, json, perfusion_jax\n"
            "base = perfusion_jax.load_base_model(sys.argv[1], **json.loads(sys.argv[2]))\n"
            "print(base.params['unet']['conv_in']['bias'].sum())"
        )
        environment = {
            **os.environ,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_XET": "1",
        }
        return subprocess.run(
            [sys.executable, "-c", program, source, json.dumps(options)],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )

    def test_downloads_only_what_is_needed_and_then_works_offline(self, hub, tmp_path, sd1_base):
        first = self.run(hub, tmp_path, "owner/model", revision="main")
        assert first.returncode == 0, first.stderr
        assert np.isclose(float(first.stdout), sd1_base.params["unet"]["conv_in"]["bias"].sum())
        fetched = set(hub.fetched)
        assert WEIGHTS in fetched
        assert not {name for name in fetched if name.endswith((".bin", ".msgpack")) or ".fp16." in name}
        hub.close()
        again = self.run(hub, tmp_path, "owner/model", revision="main")
        assert again.stdout == first.stdout, again.stderr

    @pytest.mark.parametrize(
        "kind", [*(pytest.param(kind, marks=pytest.mark.slow) for kind in ("sharded fp16", "msgpack")), "pickle"]
    )
    def test_other_kinds_of_weights(self, hub, tmp_path, sd1_base, kind):
        repository = tmp_path / "repository"
        options = {}
        if kind == "sharded fp16":
            shutil.rmtree(repository)
            save_checkpoint(repository, "sd1", max_shard_size="500KB", variant="fp16")
            options = {"variant": "fp16"}
        else:
            (repository / WEIGHTS).unlink()
        if kind == "msgpack":
            flax_file = repository / "unet/diffusion_flax_model.msgpack"
            flax_file.write_bytes(flax.serialization.to_bytes(sd1_base.params["unet"]))
            (repository / "safety_checker").mkdir()
            (repository / "safety_checker/flax_model.msgpack").write_bytes(b"large")
        elif kind == "pickle":
            (repository / "unet/diffusion_flax_model.msgpack").unlink()
        result = self.run(hub, tmp_path, "owner/model", **options)
        if kind == "pickle":
            assert "Pickled weights (*.bin, *.ckpt) can run code" in result.stderr
        else:
            assert result.returncode == 0, result.stderr
            assert np.isclose(float(result.stdout), sd1_base.params["unet"]["conv_in"]["bias"].sum())
        assert not {name for name in hub.fetched if name.endswith(".bin") or name.startswith("safety_checker")}

    def test_a_component_without_the_variant_is_fetched_as_it_is(self, hub, tmp_path, sd1_folder, sd1_base):
        shutil.rmtree(tmp_path / "repository")
        repository = save_checkpoint(tmp_path / "repository", "sd1", variant="fp16")
        shutil.rmtree(repository / "unet")
        shutil.copytree(sd1_folder / "unet", repository / "unet")
        result = self.run(hub, tmp_path, "owner/model", variant="fp16")
        assert result.returncode == 0, result.stderr
        assert np.isclose(float(result.stdout), sd1_base.params["unet"]["conv_in"]["bias"].sum())

    def test_an_unknown_model_or_revision_is_an_error_that_names_it(self, hub, tmp_path):
        told = last_line(self.run(hub, tmp_path, "owner/other"))
        assert "InputError: owner/other: no such folder here, and no such model on the hub; if it is private" in told
        told = last_line(self.run(hub, tmp_path, "owner/model", revision="v9"))
        assert "InputError: owner/model: it has no branch, tag or commit 'v9' on the hub" in told

    def test_a_licence_that_must_be_accepted_is_named(self, hub, tmp_path):
        hub.gated.add("owner/model")
        told = last_line(self.run(hub, tmp_path, "owner/model"))
        assert f"InputError: owner/model: its licence must be accepted first: do so at {hub.url}/owner/model" in told

    def test_without_network_and_cache_the_error_says_so(self, hub, tmp_path):
        hub.close()
        told = last_line(self.run(hub, tmp_path, "owner/model"))
        assert "UnavailableError: owner/model: not in the cache, and the hub cannot be reached" in told

    @pytest.mark.slow
    def test_offline_and_without_a_cache_the_error_names_the_setting(self, hub, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        told = last_line(self.run(hub, tmp_path, "owner/model"))
        assert "InputError: owner/model: not in the cache, and HF_HUB_OFFLINE forbids to ask the hub" in told

    @pytest.mark.parametrize(("status", "to_be_tried_again"), [(404, False), (403, False), (429, True), (503, True)])
    def test_what_the_hub_says_tells_whether_to_try_again(self, monkeypatch, status, to_be_tried_again):
        def refuse(*_, **__):
            response = requests.Response()
            response.status_code = status
            raise HfHubHTTPError("no", response=response)

        monkeypatch.setattr(source_lib, "snapshot_download", refuse)
        with pytest.raises(InputError, match=r"owner/model: .*the hub said: no") as caught:
            load_base_model("owner/model")
        assert isinstance(caught.value, UnavailableError) == to_be_tried_again

    @pytest.mark.parametrize(
        ("error", "advice"),
        [
            (requests.exceptions.SSLError("certificate verify failed"), "certificates in REQUESTS_CA_BUNDLE"),
            (requests.exceptions.ProxyError("no tunnel"), "See to HTTPS_PROXY"),
            (requests.exceptions.ChunkedEncodingError("broken off"), "goes on where it was"),
            (requests.exceptions.ReadTimeout(), "ReadTimeout. The same command goes on"),
            (OSError(errno.ENOSPC, "No space left on device"), "name another folder in HF_HOME"),
            (PermissionError(errno.EACCES, "Permission denied", "/cache"), "Permission denied: '/cache'$"),
        ],
    )
    def test_what_fails_on_the_way_is_one_line_and_tells_whether_to_try_again(self, monkeypatch, error, advice):
        def fail(*_, **__):
            raise error

        monkeypatch.setattr(source_lib, "snapshot_download", fail)
        with pytest.raises(InputError, match=f"owner/model: cannot be fetched: .*{advice}") as caught:
            load_base_model("owner/model")
        assert isinstance(caught.value, UnavailableError) == (not isinstance(error, PermissionError))


@pytest.mark.parametrize(
    ("source", "message"),
    [("no/such/folder", "no such folder"), ("./missing", "no such folder"), ("/missing/model", "no such folder")],
)
def test_missing_folder(source, message):
    with pytest.raises(InputError, match=f"{source}: {message}"):
        load_base_model(source)


def test_folder_of_something_else(tmp_path):
    with pytest.raises(InputError, match=r"sd14: no such folder, and not .* or one of emoji, sd15, sd21, sdxl"):
        load_base_model("sd14")
    with pytest.raises(InputError, match=r"no model_index\.json"):
        load_base_model(tmp_path)


@pytest.mark.parametrize(
    "file", ["unet/config.json", "tokenizer/vocab.json", "scheduler/scheduler_config.json", "vae/config.json"]
)
def test_missing_file_is_named(broken, file):
    (broken / file).unlink()
    with pytest.raises(InputError, match=f"{file}: missing"):
        load_base_model(broken)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("unet/config.json", "{", r"unet/config\.json: not JSON"),
        ("vae/config.json", "[]", r"vae/config\.json: not a JSON object"),
        ("tokenizer/vocab.json", "{", "tokenizer: not a CLIP tokeniser"),
    ],
)
def test_broken_json(broken, file, text, message):
    (broken / file).write_text(text)
    with pytest.raises(InputError, match=message):
        load_base_model(broken)


def test_truncated_safetensors(broken):
    (broken / WEIGHTS).write_bytes((broken / WEIGHTS).read_bytes()[:-1000])
    with pytest.raises(InputError, match=f"{WEIGHTS}: not a complete safetensors file"):
        load_base_model(broken)


@pytest.mark.parametrize("file", ["unet/config.json", "vae/diffusion_flax_model.msgpack"])
def test_storage_that_fails_for_now_may_be_tried_again(broken, sd1_base, monkeypatch, file):
    next((broken / "vae").glob("*.safetensors")).unlink()
    (broken / "vae/diffusion_flax_model.msgpack").write_bytes(flax.serialization.to_bytes(sd1_base.params["vae"]))
    open_file = Path.open

    def fail(path, *arguments, **options):
        if path == broken / file:
            raise OSError(errno.EIO, "Input/output error")
        return open_file(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(UnavailableError, match=f"{file}: cannot be read .*Input/output error"):
        load_base_model(broken)


def test_pickles_are_never_loaded(broken):
    (broken / WEIGHTS).rename(broken / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(InputError, match=r"Pickled weights.*save_pretrained\('converted', safe_serialization=True\)"):
        load_base_model(broken)


def test_no_weights(broken):
    (broken / WEIGHTS).unlink()
    with pytest.raises(InputError, match="unet: no weights"):
        load_base_model(broken)


def change_tensors(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("conv_in.weight"), r"missing: \['conv_in.weight'\]"),
        (lambda t: t.update({"extra.weight": np.ones(3)}), r"unexpected: \['extra.weight'\]"),
        (lambda t: t.update({"conv_in.bias": np.ones(3)}), r"conv_in.bias has shape \(3,\).* asks for \(32,\)"),
        (lambda t: t["conv_in.bias"].__setitem__(0, np.nan), "conv_in.bias has values that are not finite"),
        (lambda t: t["conv_in.bias"].__setitem__(0, np.inf), "conv_in.bias has values that are not finite"),
    ],
)
def test_wrong_tensors_are_named(broken, change, message):
    change_tensors(broken / WEIGHTS, change)
    with pytest.raises(InputError, match=message):
        load_base_model(broken)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("unet/config.json", {"_class_name": "SD3Transformer2DModel"}, "of class SD3Transformer2DModel"),
        ("unet/config.json", {"act_fn": "gelu"}, "act_fn = 'gelu' is not supported, only 'silu'"),
        ("unet/config.json", {"addition_embed_type": "text_image"}, "addition_embed_type = 'text_image'"),
        ("unet/config.json", {"down_block_types": ["AttnDownBlock2D"] * 3}, "AttnDownBlock2D"),
        ("vae/config.json", {"_class_name": "AutoencoderTiny"}, "of class AutoencoderTiny"),
        ("vae/config.json", {"shift_factor": 0.1}, "shift_factor = 0.1"),
        ("unet/config.json", {"in_channels": 9}, "takes 9 channels, the VAE gives 4: models for inpainting"),
        ("unet/config.json", {"cross_attention_dim": 64}, "reads encodings of width 64, the text encoder's are 48"),
        ("unet/config.json", {"layers_per_block": [1, 2]}, "no model can be built from it"),
        ("text_encoder/config.json", {"hidden_act": "bogus"}, "no model can be built from it"),
        ("text_encoder/config.json", {"architectures": None}, "of class None"),
        ("scheduler/scheduler_config.json", {"beta_start": "x"}, "the betas cannot be computed"),
        ("text_encoder/config.json", {"architectures": ["T5EncoderModel"]}, "of class T5EncoderModel"),
        ("text_encoder/config.json", {"vocab_size": 50}, "but the text encoder knows 50"),
    ],
)
def test_models_that_cannot_be_run_are_refused(broken, file, changes, message):
    edit_json(broken / file, **changes)
    with pytest.raises(InputError, match=message):
        load_base_model(broken)


def test_a_short_name_stands_for_a_model_on_the_hub_unless_a_folder_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert source_lib.full_name("sd15", None) == ("stable-diffusion-v1-5/stable-diffusion-v1-5", "fp16")
    assert source_lib.full_name("sd15", "ema") == ("stable-diffusion-v1-5/stable-diffusion-v1-5", "ema")
    assert source_lib.full_name("owner/model", None) == ("owner/model", None)
    (tmp_path / "sd15").mkdir()
    assert source_lib.full_name("sd15", None) == ("sd15", None)
