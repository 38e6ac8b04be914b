"""The package: the descriptors match the protos, pip installs it, and it imports only its declared dependencies."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from google.protobuf import descriptor_pb2
from support import PACKAGE, PROGRAM, eventually, golden

import rollout
from rollout import Sidecar, SidecarError


class PackageTests(unittest.TestCase):
    def test_the_descriptors_are_those_of_the_protos(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            fresh = Path(folder, "rollout.binpb")
            made = subprocess.run([str(PACKAGE / "regenerate"), str(fresh)], capture_output=True, text=True)
            if "no protoc" in made.stderr:
                self.skipTest(made.stderr.strip())
            self.assertEqual(made.returncode, 0, made.stderr)
            committed = (PACKAGE / "rollout/_wire/rollout.binpb").read_bytes()
            expected, actual = (descriptor_pb2.FileDescriptorSet.FromString(content) for content in (fresh.read_bytes(), committed))
            self.assertEqual(actual, expected, "protos/ has changed: run sidecar/client.python/regenerate")

    def test_pip_installs_it_without_a_network(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            # From a copy: setuptools leaves its build folders beside the source.
            source = Path(folder, "source")
            subprocess.run(["cp", "-r", str(PACKAGE), str(source)], check=True)
            pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", "--target", f"{folder}/site"]
            probe = subprocess.run([*pip[:3], "--version"], capture_output=True, text=True)
            if probe.returncode != 0:
                self.skipTest(probe.stderr.strip())
            installed = subprocess.run([*pip, str(source)], capture_output=True, text=True)
            self.assertEqual(installed.returncode, 0, installed.stdout + installed.stderr)
            code = "import rollout; print(rollout.__file__, rollout.Rollout('unix:/nowhere').address)"
            ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": f"{folder}/site"}, cwd=folder)
            self.assertEqual(ran.returncode, 0, ran.stderr)
            self.assertIn(f"{folder}/site/rollout/__init__.py", ran.stdout)
            self.assertTrue(Path(folder, "site/rollout/py.typed").exists())

    def test_it_imports_neither_torch_nor_anything_else_it_does_not_need(self) -> None:
        # What grpc and numpy bring is theirs to choose: grpc takes grpc_tools, grpc_health and grpc_status where they are installed.
        code = (
            "import sys, grpc, numpy; before = set(sys.modules); import rollout\n"
            "new = {name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
            "print(sorted(new - {'google', 'grpc', 'numpy', 'xxhash'}))"
        )
        with tempfile.TemporaryDirectory() as folder:
            # Also where torch and the like are not installed: these are found first, and say so when they are imported.
            for name in ("torch", "ml_dtypes", "transformers", "safetensors", "jax", "pandas"):
                Path(folder, f"{name}.py").write_text("import sys; print(__name__, 'is imported'); __version__ = '0'\n")
            path = os.pathsep.join([folder, str(PACKAGE), *filter(None, [os.environ.get("PYTHONPATH")])])
            ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
        self.assertEqual(ran.returncode, 0, ran.stderr)
        self.assertEqual(ran.stdout, "['rollout']\n")

    def test_every_public_name_says_what_it_is(self) -> None:
        public = [getattr(rollout, name) for name in rollout.__all__]
        methods = [value for name, value in vars(rollout.Rollout).items() if not name.startswith("_") and callable(value)]
        self.assertEqual([thing for thing in [*public, *methods] if not thing.__doc__ and thing is not rollout.Rollout.__init__], [])
        self.assertEqual(sorted(rollout.__all__), rollout.__all__)


class SidecarProcessTests(unittest.TestCase):
    def test_a_sidecar_that_cannot_start_says_why(self) -> None:
        with tempfile.TemporaryDirectory() as empty:
            with self.assertRaisesRegex(SidecarError, "exit code") as failed:
                Sidecar.start(empty, program=PROGRAM)
            self.assertNotEqual(failed.exception.exit_code, 0)
            self.assertIn("config.json", "\n".join(failed.exception.last_lines))
            with self.assertRaisesRegex(SidecarError, "there is no program"):
                Sidecar.start(empty, program=f"{empty}/rollout.dll")
            with self.assertRaisesRegex(SidecarError, "not ready after 0.01 s"):
                Sidecar.start(golden("qwen3"), program=PROGRAM, ready_timeout=0.01)

    def test_it_is_gone_with_its_parent_even_a_killed_one(self) -> None:
        if not os.access("/usr/bin/setpriv", os.X_OK):
            self.skipTest("setpriv is not installed")
        for how in ("raise SystemExit", "os.kill(os.getpid(), 9)"):
            code = f"import os, support; sidecar = support.start(); print(sidecar.pid, sidecar.address, flush=True); {how}"
            parent = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=60)
            pid, address = parent.stdout.split()
            eventually(lambda pid=pid: not Path(f"/proc/{pid}").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text(), f"end after {how}")
            self.assertFalse(Path(address.removeprefix("unix:")).exists())


if __name__ == "__main__":
    unittest.main()
