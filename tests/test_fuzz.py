"""A small share of tests/fuzz.py, which runs thousands of cases by hand."""

import subprocess
import sys

import pytest
from conftest import ENVIRONMENT, PROJECT


@pytest.mark.skipif(sys.platform != "linux", reason="it reads Linux's own tables")
def test_broken_inputs_end_in_a_line():
    kinds = [
        "pictures",
        "lists",
        "options_txt_annotation",
        "options_train",
        "options_predict",
        "checkpoints",
        "folders",
        "npz",
        "flips",
        "links",
        "foreign",
        "tables",
        "configs",
        "directories",
    ]
    command = [sys.executable, str(PROJECT / "tests" / "fuzz.py"), "--share", "0.02", "--seed", "7", *kinds]
    done = subprocess.run(
        command, env={**ENVIRONMENT, "PYTHONPATH": str(PROJECT)}, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count(" 0 failures") == len(kinds)
