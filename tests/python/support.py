"""What the tests share: the built sidecar, the golden models, weights to push."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
import unittest
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "sidecar/client.python"
PROGRAM = Path(os.environ.get("ROLLOUT_PROGRAM", ROOT / "sidecar/server/bin/Release/net10.0/rollout.dll"))
SHM = Path("/dev/shm")
sys.path.insert(0, str(PACKAGE))

import rollout  # noqa: E402
from rollout.weights.shared_memory import Segment  # noqa: E402

try:
    import torch
except ImportError:
    torch = None

needs_torch = unittest.skipIf(torch is None, "torch is not installed")


@dataclass(frozen=True)
class Case:
    """A greedy continuation by Hugging Face transformers."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]


def golden(model: str) -> Path:
    return ROOT / "tests/golden" / model


def cases(model: str) -> list[Case]:
    content = json.loads((golden(model) / "golden.json").read_text())
    return [Case(prompt, c["tokens"], c["logprobs"]) for prompt, c in zip(content["prompts"], content["continuations"])]


def golden_config(model: str) -> dict[str, Any]:
    return json.loads((golden(model) / "config.json").read_text())


def golden_weights(model: str) -> dict[str, rollout.BFloat16]:
    data = (golden(model) / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    weights = {}
    for name, info in json.loads(data[8:start]).items():
        if name != "__metadata__":
            assert info["dtype"] == "BF16"
            begin, end = info["data_offsets"]
            weights[name] = rollout.BFloat16(np.frombuffer(data[start + begin : start + end], "<u2").reshape(info["shape"]))
    return weights


def other_weights(model: str) -> dict[str, rollout.BFloat16]:
    """The model's own tensors with their elements in reverse: a different model with equally random weights."""
    return {name: rollout.BFloat16(tensor.bits.reshape(-1)[::-1].reshape(tensor.bits.shape)) for name, tensor in golden_weights(model).items()}


def as_float32(tensor: rollout.BFloat16) -> np.ndarray:
    return (tensor.bits.astype(np.uint32) << 16).view(np.float32)


def start(model: str | Path = "qwen3", *arguments: str) -> rollout.Sidecar:
    folder = golden(model) if isinstance(model, str) else model
    return rollout.Sidecar.start(folder, program=PROGRAM, threads=1, arguments=arguments, ready_timeout=60)


def in_another_container() -> Any:
    """Makes the sidecar's own memory unreachable, as from another container: pushes go through a file in /dev/shm."""
    return mock.patch.object(Segment, "try_open", return_value=None)


def own_files() -> list[str]:
    """Of this process in /dev/shm."""
    return [path.name for path in SHM.glob(f"rollout-{os.getpid()}-*")]


def eventually(condition: Callable[[], bool], what: str, seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(0.02)


class SidecarTests(unittest.TestCase):
    """A sidecar with the golden qwen3, new for each test."""

    def setUp(self) -> None:
        self.sidecar = start()
        self.addCleanup(self.sidecar.stop)
        self.rollout = self.sidecar.connect()
        self.addCleanup(self.rollout.close)
        self.golden = cases("qwen3")[1]

    def assert_serves_the_old_weights(self, version: int = 0) -> None:
        eventually(lambda: not self.rollout.status().updating, "the update's seat is given back")
        self.assertEqual(self.rollout.status().version, version)
        [[sample]] = self.rollout.generate([self.golden.prompt], max_tokens=len(self.golden.tokens), temperature=0)
        self.assertEqual(sample.ids.tolist(), self.golden.tokens)

    def temporary_folder(self) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="rollout-test-"))
        self.addCleanup(shutil.rmtree, folder)
        return folder
