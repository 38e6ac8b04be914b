"""The example people copy from: a few of its steps."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import unittest

import simulated_cuda
from simulated_cuda import needs_it
from support import PACKAGE, ROOT, needs_torch

EXAMPLE = ROOT / "examples/python/grpo.py"

setUpModule = simulated_cuda.set_up_module  # noqa: N816  unittest's name


class GrpoTests(unittest.TestCase):
    def ran(self, *arguments: str) -> tuple[str, float]:
        """What it printed, and the largest difference between its log-probabilities and the sidecar's."""
        ran = subprocess.run(
            [sys.executable, str(EXAMPLE), *arguments], capture_output=True, text=True, timeout=300,
            env={**os.environ, "PYTHONPATH": str(PACKAGE)})
        self.assertEqual(ran.returncode, 0, ran.stderr)
        steps = re.findall(r"^step +(\d+)  reward ([\d.]+)  \|dlogp\| (\S+)  version (\d+) ", ran.stdout, re.MULTILINE)
        self.assertGreater(len(steps), 2, ran.stdout)
        self.assertEqual([(int(step), int(version)) for step, _, _, version in steps], [(i + 1, i + 1) for i in range(len(steps))])
        self.assertRegex(ran.stdout, r"held out, greedy: [\d.]+% right")
        return ran.stdout, max(float(difference) for _, _, difference, _ in steps)

    @needs_torch
    def test_trainer_and_sidecar_agree_and_versions_advance(self) -> None:
        printed, difference = self.ran("--steps", "4", "--warm-steps", "10", "--sidecar-device", "cpu")
        self.assertIn("; sampling on cpu ", printed)
        self.assertLessEqual(difference, 1e-3)

    @needs_torch
    @needs_it
    def test_a_sidecar_on_a_gpu_learns_from_a_trainer_elsewhere(self) -> None:
        printed, difference = self.ran("--steps", "3", "--warm-steps", "2", "--prompts", "2", "--sidecar-device", "cuda:1")
        self.assertRegex(printed, "^training on cpu, without a GPU; sampling on cuda:1 simulated device")
        self.assertIn("\nweights go by shared_memory: the sidecar's memory can be opened here\n", printed)
        self.assertLessEqual(difference, 0.02)  # activations are rounded to bf16 there

    def test_it_stays_readable(self) -> None:
        self.assertLessEqual(len(EXAMPLE.read_text().splitlines()), 120)


if __name__ == "__main__":
    unittest.main()
