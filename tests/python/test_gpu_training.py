"""Training with the weights on a GPU, simulated, trainer and sidecar being processes of their own: on the same GPU, and on one each."""

from __future__ import annotations

import json
import subprocess
import sys
import unittest
from pathlib import Path

import simulated_cuda
from simulated_cuda import needs_it
from support import golden_weights, start

import rollout

STEPS = 4
setUpModule = simulated_cuda.set_up_module  # noqa: N816  unittest's name


@needs_it
class GpuTrainingTests(unittest.TestCase):
    def trained(self, sidecar: rollout.Sidecar, transport: str) -> list[dict]:
        """What each step printed, and the end."""
        ran = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("gpu_trainer.py")), sidecar.address, "--transport", transport,
             "--steps", str(STEPS)], capture_output=True, text=True, timeout=120)
        self.assertEqual(ran.returncode, 0, ran.stderr)
        return [json.loads(line) for line in ran.stdout.splitlines()]

    def test_steps_by_ipc_and_by_nccl_have_the_bits_of_steps_through_the_host(self) -> None:
        runs = []
        for device, direct in (("cuda:0", "cuda_ipc"), ("cuda:1", "nccl")):
            sidecar = start("qwen3", "--device", device, "--max-sequences", "8", "--kv-cache", "4MiB")
            self.addCleanup(sidecar.stop)
            for asked, expected in (("shared_memory", "shared_memory"), ("auto", direct)):
                with sidecar.connect() as client:  # all begin with the same weights
                    client.push_weights(golden_weights("qwen3"), transport="shared_memory")
                *steps, last = self.trained(sidecar, asked)
                self.assertEqual([step.pop("transport") for step in steps], [expected] * STEPS)
                # Every sample is drawn from the weights that were pushed last, and from no others.
                self.assertEqual([step["pushed"] for step in steps], [*range(1, STEPS + 1)])
                self.assertEqual([step["sampled"] for step in steps], [[[i]] * 4 for i in range(STEPS)])
                self.assertEqual(len({str(step["logprobs"]) for step in steps}), STEPS)
                runs.append([*steps, last])
        for other in runs[1:]:
            self.assertEqual(other, runs[0])


if __name__ == "__main__":
    unittest.main()
