"""examples/python/grpo.py with a sidecar on the GPU. Says what is missing where its packages are not installed."""
import argparse, pathlib, sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "client.python"), str(ROOT / "examples")]
try:
    import grpo, rollout
except ImportError as error:
    print(f"not installed: {error}")
    raise SystemExit

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, required=True)
parser.add_argument("--warm-steps", type=int, required=True)
parser.add_argument("--samples", type=int, default=16)
arguments = parser.parse_args()
grpo.held_out = grpo.held_out[:: len(grpo.held_out) // arguments.samples]
grpo.PROGRAM = ROOT / "server/rollout.dll"
grpo.main(arguments.steps, arguments.warm_steps, prompts=32, seed=1, sidecar_device="cuda", n=arguments.samples)
