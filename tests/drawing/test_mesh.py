"""Devices that share a drawing, in a process of two."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fleet_runs import ROOT

PROGRAM = Path(__file__).with_name("two_devices.py")


@pytest.mark.slow
def test_two_devices_draw_what_one_does(small_folder):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    ended = subprocess.run(
        [sys.executable, PROGRAM, small_folder], capture_output=True, text=True, env=environment, check=False
    )
    assert ended.returncode == 0, ended.stderr
    differences = dict(line.rsplit(": ", 1) for line in ended.stdout.splitlines())
    assert len(differences) == 10
    assert max(map(int, differences.values())) <= 1, differences
