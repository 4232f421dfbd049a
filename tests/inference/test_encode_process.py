"""The real command, stopped by a signal: it ends with 42, and the same command goes on to the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np

from conan_jax.model import Embedder
from tests.inference.test_encoder import MODEL, WORDS, make_tokenizer, recipe, save
from tests.model.models import params_of


def test_sigterm_ends_with_42_and_the_same_command_writes_the_same_bytes(tmp_path):
    run = recipe(tmp_path / "run")
    tokenizer = make_tokenizer(WORDS, 330, tmp_path / "run" / "data" / "tokenizer")
    save(run, run.stage("weak"), params_of(Embedder(MODEL)), tokenizer)
    rng = np.random.default_rng(0)
    with open(tmp_path / "in.jsonl", "w") as file:
        for _ in range(12_000):
            file.write(json.dumps({"text": " ".join(rng.choice(WORDS, 12))}) + "\n")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}

    def command(out):
        return [sys.executable, "-m", "conan_jax", "encode", "in.jsonl", out, "--model", "run/weak", "--json"]

    whole = subprocess.run(command("whole.npy"), cwd=tmp_path, env=environment, capture_output=True, timeout=300, check=True)
    assert json.loads(whole.stdout)["count"] == 12_000
    stopped = subprocess.Popen(command("out.npy"), cwd=tmp_path, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    state = tmp_path / ".out.npy.partial" / "state.json"
    limit = time.monotonic() + 200
    while not state.exists() and stopped.poll() is None and time.monotonic() < limit:
        time.sleep(0.01)
    stopped.send_signal(signal.SIGTERM)
    _, said = stopped.communicate(timeout=100)
    assert stopped.returncode == 42 and b"start the same command again" in said
    assert not (tmp_path / "out.npy").exists() and 0 < json.loads(state.read_text())["done"] < 12_000
    again = subprocess.run(command("out.npy"), cwd=tmp_path, env=environment, capture_output=True, timeout=300, check=True)
    assert b"going on after" in again.stderr
    assert (tmp_path / "out.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
