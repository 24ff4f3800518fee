"""What all command lines share."""

import os
import subprocess
import sys

import pytest
from fleet_runs import ROOT

from perfusion_jax import InputError
from perfusion_jax.runtime.command_line import BAD_INPUT, parse_shard


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/dgo.py"], "--config: [Errno 2] No such file or directory: 'configs/dgo.py'"),
        (["--config=configs/dgo.py", "--config.steps=3"], "--config: [Errno 2] No such file or directory"),
        (["--config=configs/dog.py", "--config.steps=many"], "flag --config.steps=many: invalid literal"),
        (["--config=configs/dog.py", "--config.step=3"], "--config: no such key: 'step'. Did you mean \"steps\""),
        (["--config=configs/dog.py", "--config.templates=("], "config.templates is ('(',); it must be at least 1"),
        (["--config=configs/dog.py", "dog"], "'dog' is not a flag; see --help"),
        (["--config=configs/dog.py", "--workdir=https://host/x"], "https://host/x: https:// is no storage known here"),
    ],
)
def test_mistakes_in_a_command_are_told_in_a_line(tmp_path, arguments, message):
    command = [sys.executable, "-m", "perfusion_jax.train", f"--workdir={tmp_path}", *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == BAD_INPUT
    assert "Traceback" not in ended.stderr
    assert "\\n" not in ended.stderr  # a message, and not the quoted form of one
    assert ended.stderr.splitlines()[-1].startswith(f"error: {message}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:", "1: SyntaxError: invalid syntax"),
        ("import nothing_of_that_name", "1: ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("def get_config():\n    return foo", "2: NameError: name 'foo' is not defined"),
        ("def get_config():\n    return {}['a']", "2: KeyError: 'a'"),
        ("def get_config():\n    return 1 + 'x'", "2: TypeError: unsupported operand"),
        ("x = 1", " it needs a function get_config(base) that returns make_config(...) ("),
        ("def get_config():\n    pass", " it needs a function get_config(base) that returns make_config(...) ("),
    ],
)
def test_a_mistake_in_a_config_file_is_told_with_its_line(tmp_path, text, message):
    (tmp_path / "rex.py").write_text(text)
    command = [sys.executable, "-m", "perfusion_jax.train", f"--workdir={tmp_path}/run", f"--config={tmp_path}/rex.py"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == BAD_INPUT
    assert "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'rex.py'}:{message}")


def test_shards_share_the_table():
    assert parse_shard("3/16") == (3, 16)
    for wrong in ("16/16", "3", "-1/4", "a/b", "0/0"):
        with pytest.raises(InputError, match="--shard is"):
            parse_shard(wrong)


def test_memory_that_does_not_suffice_is_told_in_a_line():
    program = (
        "import jax.numpy as jnp; from perfusion_jax.runtime import command_line;"
        "command_line.run(lambda: jnp.zeros(2**50), memory_advice='take less')"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == BAD_INPUT
    assert "Traceback" not in ended.stderr
    told = ended.stderr.splitlines()[-1]
    assert told.startswith("error: the memory of a device does not suffice (")
    assert told.endswith("): take less")


def test_a_user_without_a_home_is_told_and_goes_on():
    program = (
        "import os; os.path.expanduser = lambda path: path\n"  # what it does where a user has no home
        "from perfusion_jax.runtime import command_line; command_line.run(lambda: print('done'))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment["XDG_CACHE_HOME"] = ""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert ended.stdout == "done\n", ended.stderr
    assert "XDG_CACHE_HOME; without it, what is compiled is compiled anew" in ended.stderr


def test_commands_import_no_pytorch_where_it_is_installed():
    program = (
        "import importlib.util, sys; from perfusion_jax.runtime import command_line\n"
        "def main():\n"
        "    import perfusion_jax.base_model, tensorflow_datasets\n"
        "    print('torch' in sys.modules, importlib.util.find_spec('torch'))\n"
        "print(importlib.util.find_spec('torch') is None)\n"
        "command_line.run(main)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.stdout.splitlines() == ["False", "False None"], ended.stderr
