"""The example people copy from: a few of its steps."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import unittest

from support import PACKAGE, ROOT, needs_torch

EXAMPLE = ROOT / "examples/python/grpo.py"


class GrpoTests(unittest.TestCase):
    @needs_torch
    def test_trainer_and_sidecar_agree_and_versions_advance(self) -> None:
        ran = subprocess.run(
            [sys.executable, str(EXAMPLE), "--steps", "4", "--warm-steps", "10"],
            capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(PACKAGE)})
        self.assertEqual(ran.returncode, 0, ran.stderr)
        steps = re.findall(r"^step +(\d+)  reward ([\d.]+)  \|dlogp\| (\S+)  version (\d+) ", ran.stdout, re.MULTILINE)
        self.assertEqual([(int(step), int(version)) for step, _, _, version in steps], [(1, 1), (2, 2), (3, 3), (4, 4)], ran.stdout)
        self.assertLessEqual(max(float(difference) for _, _, difference, _ in steps), 1e-3)
        self.assertRegex(ran.stdout, r"held out, greedy: [\d.]+% right")

    def test_it_stays_readable(self) -> None:
        self.assertLessEqual(len(EXAMPLE.read_text().splitlines()), 120)


if __name__ == "__main__":
    unittest.main()
