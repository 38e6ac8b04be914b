"""Weights that go to a sidecar on another GPU, simulated, by NCCL."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
import simulated_cuda
from fake_sidecar import FakeSidecar, FakeWeights
from simulated_cuda import Array, Tensor, needs_it
from support import PACKAGE, as_float32, eventually, golden_weights, other_weights, start
from test_cuda_ipc import SEND, UUID, DeviceTests, of, packed

import rollout
from rollout import CudaError, RolloutError, UpdateOutcome, WeightUpdateFailed
from rollout.weights import broadcast, cuda, digest, nccl
from rollout.weights.call import UpdateCall

HERE, THERE = UUID, UUID[:15] + b"n"  # the first device, and the second
APART = f"the tensors are on {cuda.name(HERE)}, the sidecar on {cuda.name(THERE)}"
PIECE = digest.PIECE_BYTES

setUpModule = simulated_cuda.set_up_module  # noqa: N816  unittest's name


def start_there(*arguments: str) -> rollout.Sidecar:
    return start("qwen3", "--device", "cuda:1", "--max-sequences", "4", "--kv-cache", "4MiB", *arguments)


def communicators() -> int:
    """Of this process, not freed."""
    return int(nccl._library().cuSimCommunicators())


def buckets(most: int):
    return mock.patch.object(broadcast, "_MOST_BUCKET_BYTES", most)


class Messages:
    """What pushes tell the sidecar."""

    def __init__(self, test: unittest.TestCase) -> None:
        self.sent: list = []
        self.segments: list[int] = []  # asked for
        patched = mock.patch.object(UpdateCall, "send", lambda call, **step: self.seen(call, step))
        patched.start()
        test.addCleanup(patched.stop)

    def seen(self, call: UpdateCall, step: dict) -> None:
        self.sent += [step["nccl"]] if "nccl" in step else []
        self.segments += [step["begin"].segment_bytes] if "begin" in step else []
        SEND(call, **step)


@needs_it
class AnotherGpuTests(DeviceTests):
    """A sidecar on the second GPU, one for all tests; this process has the first."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.sidecar = start_there()
        cls.addClassCleanup(cls.sidecar.stop)
        cls.model = {"golden": golden_weights("qwen3"), "other": other_weights("qwen3")}
        with cls.sidecar.connect() as client:
            cls.expected = {}
            for which, weights in cls.model.items():
                client.push_weights(weights, transport="shared_memory")
                cls.expected[which] = cls.served(client)
        assert cls.expected["golden"] != cls.expected["other"]
        cls.bytes = sum(tensor.bits.nbytes for tensor in cls.model["golden"].values())

    def setUp(self) -> None:
        super().setUp()
        self.rollout = self.sidecar.connect()
        self.addCleanup(self.rollout.close)
        self.rollout.push_weights(self.model["golden"], transport="shared_memory")
        self.assertEqual(communicators(), 0)

    @staticmethod
    def served(client):
        """Samples, their log-probabilities and the digests."""
        [group] = client.generate([[1, 2, 3]], n=2, max_tokens=8, seed=9)
        digests = {name: tensor.digest for name, tensor in client.describe().tensors.items()}
        return [(sample.ids.tolist(), sample.logprobs.tolist()) for sample in group], digests

    def assert_serves(self, which: str) -> None:
        self.assertEqual(self.served(self.rollout), self.expected[which])

    def restore(self) -> None:
        with self.sidecar.connect() as client:
            client.push_weights(self.model["golden"], transport="shared_memory")

    def test_what_is_served_equals_a_push_through_the_host_and_the_group_is_kept(self) -> None:
        counts, messages = self.counts(), Messages(self)
        for mode, most in (("staged", 256 << 20), ("in_place", 150_000), ("staged", PIECE)):
            with self.subTest(mode, most=most), buckets(most), self.sidecar.connect() as client:
                messages.sent.clear()
                for way in (of, packed, of):
                    result = client.push_weights(way(self.model["other"]), mode=mode)
                    self.assertEqual((result.transport, result.reason, result.mode), ("nccl", APART, mode))
                    self.assertEqual((counts[-1].host_bytes, counts[-1].device_bytes), (0, self.bytes))
                    self.assertEqual(communicators(), 1)
                    self.assertGreater(client.status().memory.nccl, 0)
                    self.assert_serves("other")
                    client.push_weights(self.model["golden"], transport="shared_memory")
                self.assertEqual(len({message.unique_id for message in messages.sent}), 1)
                self.assertEqual([len(message.buckets) > 2 for message in messages.sent], [most < 256 << 20] * 3)
            self.assertEqual(communicators(), 0)
            eventually(lambda: self.rollout.status().memory.nccl == 0, "the sidecar leaves the group with the connection")

    def test_a_trainer_goes_on_in_the_same_memory(self) -> None:
        weights = packed(self.model["golden"])
        self.rollout.push_weights(weights)
        self.assert_serves("golden")
        for name, tensor in weights.items():
            tensor.memory.write(self.model["other"][name].bits.tobytes(), tensor.data_ptr() - tensor.memory.pointer)
        self.rollout.push_weights(weights)
        self.assert_serves("other")

    def test_what_the_stream_still_writes_is_waited_for(self) -> None:
        stream = simulated_cuda.stream()
        weights = of(self.model["golden"])
        with mock.patch.object(cuda.Device, "stream", return_value=stream):
            kept = [tensor.memory.write(self.model["other"][name].bits.tobytes(), 512, stream) for name, tensor in weights.items()]
            self.assertEqual(self.rollout.push_weights(weights).transport, "nccl")
        self.assert_serves("other")
        del kept

    def test_other_types_views_and_arrays(self) -> None:
        bits = self.model["other"]
        matrices = [name for name, tensor in bits.items() if tensor.bits.ndim == 2]
        cases = {
            "expandable": of(bits, expandable=True),
            "float32": {name: Tensor.of(as_float32(tensor), "float32") for name, tensor in bits.items()},
            "transposed": {**of(bits), **{name: Tensor.of(bits[name].bits.T, "bfloat16").t() for name in matrices}},
            "arrays": {name: rollout.BFloat16(Array(tensor)) for name, tensor in of(bits).items()},
        }
        for case, weights in cases.items():
            with self.subTest(case), buckets(200_000):
                self.assertEqual(self.rollout.push_weights(weights).transport, "nccl")
                self.assert_serves("other")
                self.rollout.push_weights(self.model["golden"], transport="shared_memory")
        halves = {name: Tensor.of(as_float32(tensor).astype(np.float16), "float16") for name, tensor in bits.items()}
        sent = self.rollout.push_weights(halves, dtype=None, transport="nccl")
        host = self.rollout.push_weights({name: tensor.numpy() for name, tensor in halves.items()}, dtype=None)
        self.assertEqual(sent.digest, host.digest)

    def test_slices(self) -> None:
        bits = self.model["other"]
        tensors, name = of(bits), next(name for name, tensor in bits.items() if tensor.bits.ndim == 2)
        rows = bits[name].bits.shape[0]
        tensors[name] = [
            rollout.TensorSlice(bits[name].bits.shape, first, tensors[name][first:end])
            for first, end in ((rows // 3, rows), (0, rows // 3))]
        with buckets(150_000):
            self.assertEqual(self.rollout.push_weights(tensors).transport, "nccl")
        self.assert_serves("other")

    def test_some_tensors_of_the_model(self) -> None:
        golden, other = self.model["golden"], self.model["other"]
        some = list(other)[2:5]
        self.rollout.push_weights(of(other))
        self.rollout.push_weights(of({name: golden[name] for name in some}), partial=True)
        samples, _ = self.served(self.rollout)
        self.rollout.push_weights({**other, **{name: golden[name] for name in some}}, transport="shared_memory")
        self.assertEqual(self.served(self.rollout)[0], samples)

    @unittest.skipIf(digest.xxhash is None, "xxhash is not installed")
    def test_verify_hashes_what_is_broadcast(self) -> None:
        commits = []

        def seen(call, **step):
            commits.extend([step["commit"].digest] if "commit" in step else [])
            SEND(call, **step)

        with buckets(150_000), mock.patch.object(UpdateCall, "send", seen):
            self.rollout.push_weights(of(self.model["other"]))
            result = self.rollout.push_weights(of(self.model["other"]), verify=True)
        self.assertEqual(commits, [b"", bytes.fromhex(result.digest)])
        queue = broadcast.Group.broadcast

        def flips(group, bucket, size, after):
            simulated_cuda.call("cuMemsetD8Async", simulated_cuda.c_void_p(bucket), simulated_cuda.ctypes.c_ubyte(0x55),
                                simulated_cuda.c_size_t(2), simulated_cuda.c_void_p(after))
            queue(group, bucket, size, after)

        with mock.patch.object(broadcast.Group, "broadcast", flips), self.assertRaisesRegex(WeightUpdateFailed, "digest"):
            self.rollout.push_weights(of(self.model["golden"]), verify=True)
        self.assertEqual(communicators(), 0)
        self.assert_serves("other")

    def test_no_host_memory_is_asked_for_once_it_is_known_where_the_sidecar_is(self) -> None:
        messages = Messages(self)
        with self.sidecar.connect() as client:
            for _ in range(3):
                client.push_weights(of(self.model["other"]))
        self.assertEqual([bytes > 0 for bytes in messages.segments], [True, False, False])

    def test_a_group_that_the_sidecar_has_left_is_joined_anew(self) -> None:
        messages = Messages(self)
        self.rollout.push_weights(of(self.model["other"]))
        self.rollout._publisher._release(10)  # as if it had been another's
        self.assertEqual(self.rollout.status().memory.nccl, 0)
        self.rollout.push_weights(of(self.model["other"]))
        self.assertEqual(communicators(), 1)
        self.rollout.release_memory()
        self.assertEqual((communicators(), self.rollout.status().memory.nccl), (0, 0))
        self.rollout.push_weights(of(self.model["other"]))
        self.assert_serves("other")
        self.assertEqual(len({message.unique_id for message in messages.sent}), 3)

    def test_a_push_that_fails_leaves_the_group_and_the_next_one_joins(self) -> None:
        for way in ("ours", "theirs"):
            with self.subTest(way):
                self.rollout.push_weights(of(self.model["golden"]))
                wrong = dict(list(of(self.model["other"]).items())[1:])
                copies = mock.patch.object(cuda.Device, "copy", side_effect=CudaError("cuMemcpyDtoDAsync_v2: CUDA_ERROR_ILLEGAL_ADDRESS"))
                if way == "ours":
                    with copies, self.assertRaisesRegex(CudaError, "ILLEGAL_ADDRESS"):
                        self.rollout.push_weights(of(self.model["other"]))
                else:
                    with self.assertRaises(rollout.WeightUpdateRejected):
                        self.rollout.push_weights(wrong)
                self.assertEqual(communicators(), 0)
                eventually(lambda: not self.rollout.status().updating, "the update has ended")
                self.assert_serves("golden")
                self.rollout.push_weights(of(self.model["other"]))
                self.assert_serves("other")
                self.assertEqual(communicators(), 1)

    def test_little_memory_for_buckets_is_enough(self) -> None:
        allocate = cuda.Device.allocate

        def scarce(device, size):
            if size > 2 * PIECE:
                raise CudaError("cuMemAlloc_v2: CUDA_ERROR_OUT_OF_MEMORY")
            return allocate(device, size)

        messages = Messages(self)
        with mock.patch.object(cuda.Device, "allocate", scarce):
            self.rollout.push_weights(of(self.model["other"]))
            self.rollout.push_weights(of(self.model["other"]))
        self.assert_serves("other")
        self.assertLessEqual(max(bucket.bytes for message in messages.sent for bucket in message.buckets), 2 * PIECE)
        self.restore()
        with self.sidecar.connect() as client, mock.patch.object(
                cuda.Device, "allocate", side_effect=CudaError("cuMemAlloc_v2: CUDA_ERROR_OUT_OF_MEMORY")):
            with self.assertRaisesRegex(CudaError, "OUT_OF_MEMORY"):
                client.push_weights(of(self.model["other"]))
        self.assert_serves("golden")

    def test_which_way_and_why(self) -> None:
        bits = self.model["other"]
        self.assertEqual(self.rollout.push_weights(of(bits), transport="nccl").reason, APART)
        with self.assertRaisesRegex(RolloutError, f"transport='cuda_ipc' was asked for, but {APART}$"):
            self.rollout.push_weights(of(bits), transport="cuda_ipc")
        with self.assertRaisesRegex(ValueError, "transport='nccl': .* is not on a GPU"):
            self.rollout.push_weights(bits, transport="nccl")
        same = f"^transport='nccl' was asked for, but sidecar and tensors are both on {cuda.name(THERE)}: use cuda_ipc$"
        with self.assertRaisesRegex(RolloutError, same):
            self.rollout.push_weights(of(bits, device=1), transport="nccl")
        self.assertEqual(self.rollout.push_weights(of(bits, device=1)).transport, "cuda_ipc")
        missing = CudaError("CUDA needs libnccl.so.2")
        with mock.patch.object(nccl, "_library", side_effect=missing), self.sidecar.connect() as client:
            result = client.push_weights(of(bits))
            self.assertEqual(result.transport, "shared_memory")
            self.assertTrue(result.reason.startswith(f"{APART}, and CUDA needs libnccl.so.2: copied to the host; "), result.reason)
            with self.assertRaisesRegex(RolloutError, f"transport='nccl' was asked for, but {APART}, and CUDA needs libnccl"):
                client.push_weights(of(bits), transport="nccl")
        self.rollout.push_weights(of(bits), base_version=self.rollout.status().version)
        self.assert_serves("other")
        self.assertEqual(communicators(), 1)

    def test_a_trainer_that_is_killed_in_the_middle_leaves_the_old_weights(self) -> None:
        for mode, state in (("staged", "running"), ("in_place", "poisoned")):
            with self.subTest(mode):
                trainer = subprocess.Popen(
                    [sys.executable, str(Path(__file__).with_name("killed_gpu_trainer.py")), self.sidecar.address, mode, "nccl"],
                    stdout=subprocess.PIPE, text=True)
                self.addCleanup(trainer.stdout.close)
                self.assertEqual(trainer.stdout.readline(), "midway\n")
                self.assertTrue(self.rollout.status().updating)
                trainer.kill()
                trainer.wait()
                eventually(lambda: not self.rollout.status().updating, "the update's seat is given back")
                eventually(lambda: self.rollout.status().memory.nccl == 0, "the group is left")
                self.assertEqual(self.rollout.status().state, state)
                if mode == "staged":
                    self.assert_serves("golden")
        self.rollout.push_weights(of(self.model["other"]))
        self.assert_serves("other")


@needs_it
class SidecarGoneTests(DeviceTests):
    """A trainer is not left waiting, and keeps nothing."""

    def signalled(self, sidecar: rollout.Sidecar, number: int):
        """The sidecar gets the signal before the third broadcast."""
        queue, calls = broadcast.Group.broadcast, []

        def broadcasts(group, *how):
            calls.append(how)
            if len(calls) == 3:
                os.kill(sidecar.pid, number)
            queue(group, *how)

        return calls, mock.patch.object(broadcast.Group, "broadcast", broadcasts)

    def test_a_sidecar_that_is_killed(self) -> None:
        for mode in ("staged", "in_place"):
            sidecar = start_there()
            self.addCleanup(sidecar.stop)
            with self.subTest(mode), sidecar.connect() as client, buckets(150_000):
                client._publisher.resolve_within = 0.5
                calls, killed = self.signalled(sidecar, signal.SIGKILL)
                started = time.monotonic()
                with killed, self.assertRaises(WeightUpdateFailed) as failed:
                    client.push_weights(of(other_weights("qwen3")), mode=mode, timeout=60)
                self.assertLess(time.monotonic() - started, 20)
                self.assertIn(len(calls), (3, 4))
                self.assertEqual(communicators(), 0)
                expected = UpdateOutcome.NOT_COMMITTED if mode == "staged" else UpdateOutcome.UNKNOWN
                self.assertIs(failed.exception.outcome, expected)

    def test_a_sidecar_that_stops_is_given_up_and_serves_the_old_weights_when_it_goes_on(self) -> None:
        sidecar = start_there()
        self.addCleanup(sidecar.stop)
        self.addCleanup(os.kill, sidecar.pid, signal.SIGCONT)
        with sidecar.connect() as client, buckets(150_000):
            expected = AnotherGpuTests.served(client)
            calls, stopped = self.signalled(sidecar, signal.SIGSTOP)
            started = time.monotonic()
            with stopped, self.assertRaisesRegex(WeightUpdateFailed, "took longer than its timeout") as failed:
                client.push_weights(of(other_weights("qwen3")), timeout=3)
            self.assertLess(time.monotonic() - started, 15)
            self.assertIn(len(calls), (3, 4, 5))
            self.assertEqual((communicators(), failed.exception.outcome), (0, UpdateOutcome.NOT_COMMITTED))
            os.kill(sidecar.pid, signal.SIGCONT)
            eventually(lambda: not client.status().updating and client.status().memory.nccl == 0, "it has given up too")
            self.assertEqual((AnotherGpuTests.served(client), client.status().version), (expected, 0))
            client.push_weights(of(other_weights("qwen3")), timeout=30)
            self.assertEqual((communicators(), client.status().version), (1, 1))

    def test_a_sidecar_without_nccl_says_so(self) -> None:
        folder = Path(tempfile.mkdtemp(prefix="rollout-test-"))
        self.addCleanup(shutil.rmtree, folder)
        for file in Path(os.environ[cuda.PATH_VARIABLE]).glob("*.so*"):
            if "nccl" not in file.name:
                (folder / file.name).symlink_to(file.resolve())
        with mock.patch.dict(os.environ, {cuda.PATH_VARIABLE: str(folder)}):
            sidecar = start_there()
        self.addCleanup(sidecar.stop)
        with sidecar.connect() as client:
            with self.assertRaisesRegex(WeightUpdateFailed, "nccl: CUDA needs libnccl.so.2"):
                client.push_weights(of(other_weights("qwen3")))
            self.assertEqual(communicators(), 0)
            self.assertEqual(client.push_weights(of(other_weights("qwen3")), transport="shared_memory").version, 1)


@needs_it
class FakeSidecarTests(DeviceTests):
    """A sidecar that takes its time."""

    def setUp(self) -> None:
        super().setUp()
        self.weights = FakeWeights()
        self.weights.device_uuid = THERE
        self.fake = FakeSidecar(
            str(self.temporary_folder() / "s"), self.weights.update, status=self.weights.status, describe=self.weights.describe)
        self.addCleanup(self.fake.stop)

    def receive(self, message, payload: bytearray) -> None:
        """The buckets, each some time after the one before."""
        self.assertEqual((message.rank, message.root, message.world_size, message.device_uuid), (1, 0, 2, HERE))
        device = cuda.device(1)
        with device.current():
            stream = device.create_stream()
            memory = device.allocate(max(bucket.bytes for bucket in message.buckets))
            communicator = nccl.Communicator(message.unique_id, 2, 1, lambda: None)
            for bucket in message.buckets:
                time.sleep(0.05)
                communicator.broadcast(memory, bucket.bytes, message.root, stream)
                communicator.wait(stream)
                device.read(memory, memoryview(payload)[bucket.payload_offset : bucket.payload_offset + bucket.bytes], stream)
            communicator.close()
            device.destroy_stream(stream)
            device.free(memory)

    def test_a_bucket_is_not_filled_again_before_it_has_been_sent(self) -> None:
        self.weights.receive = self.receive
        numbers = np.random.default_rng(1)
        bits = {f"t{i}": numbers.integers(0, 1 << 16, shape, np.uint16) for i, shape in enumerate([(3, 2_000_000), (5_000_000,), (7,)])}
        copy = cuda.Device.copy

        def at_once(device, destination, source, size, stream):
            copy(device, destination, source, size, stream)
            device.wait(stream)

        # Buckets of more than the sockets in between hold.
        with rollout.Rollout(self.fake.address) as client, buckets(4 << 20), mock.patch.object(cuda.Device, "copy", at_once):
            client.push_weights({name: Tensor.of(content, "bfloat16") for name, content in bits.items()})
        self.assertEqual(communicators(), 0)
        for name, content in bits.items():
            self.assertTrue(self.weights.tensors[name] == content.tobytes(), f"{name} arrived as something else")

    def test_a_sidecar_that_never_joins(self) -> None:
        with rollout.Rollout(self.fake.address) as client, mock.patch.object(nccl, "_JOIN_WITHIN", 0.5):
            with self.assertRaisesRegex(CudaError, "^NCCL: not all of 2 ranks joined within 0.5 s$"):
                client.push_weights(of(other_weights("qwen3")))
            self.assertEqual(communicators(), 0)
        with rollout.Rollout(self.fake.address) as client:
            started = time.monotonic()
            with self.assertRaisesRegex(WeightUpdateFailed, "took longer than its timeout"):
                client.push_weights(of(other_weights("qwen3")), timeout=0.5, base_version=self.weights.version)
            self.assertLess(time.monotonic() - started, 10)
            self.assertEqual(communicators(), 0)


class CutTests(unittest.TestCase):
    def test_buckets_are_cut_between_tensors_or_between_pieces(self) -> None:
        draw = random.Random(os.environ.get("ROLLOUT_TEST_SEED", 1))
        for trial in range(500):
            places, end = [], 0
            for _ in range(draw.randint(1, 12)):
                size = draw.choice([0, draw.randint(1, 2000), draw.randint(0, 5 * PIECE), draw.randint(0, 4) * PIECE])
                places.append((end, size))
                end = -(-(end + size) // 256) * 256
            capacity = draw.randint(PIECE, 6 * PIECE)
            found = list(broadcast.cuts(places, capacity))
            with self.subTest(trial=trial, places=places, capacity=capacity):
                self.assertEqual(found, sorted(found))
                for start, end_of in found:
                    self.assertTrue(0 < end_of - start <= capacity)
                for offset, size in places:
                    covered = offset
                    for start, end_of in found:
                        if start < offset + size and end_of > offset:
                            self.assertEqual(max(start, offset), covered)
                            self.assertTrue(start <= offset or (start - offset) % PIECE == 0, "a piece is cut")
                            covered = min(end_of, offset + size)
                    self.assertEqual(covered, offset + size)


@needs_it
class LibraryTests(unittest.TestCase):
    def ran(self, code: str, **environment: str) -> str:
        ran = subprocess.run(
            [sys.executable, "-c", f"from rollout.weights import nccl\n{code}"], cwd=PACKAGE, env={**os.environ, **environment},
            capture_output=True, text=True)
        self.assertEqual(ran.returncode, 0, ran.stderr)
        return ran.stdout.strip()

    def test_it_is_found_beside_the_packages_that_bring_it(self) -> None:
        library = next(Path(os.environ[cuda.PATH_VARIABLE]).glob("libnccl.so.2")).resolve()
        for package, inside in (("nvidia/nccl", "lib"), ("torch", "lib")):
            with self.subTest(package), tempfile.TemporaryDirectory() as folder:
                place = Path(folder, package)
                (place / inside).mkdir(parents=True)
                (place / "__init__.py").write_text("raise SystemExit('imported')" if package == "torch" else "")
                (place / inside / "libnccl-of-a-test.so.2").symlink_to(library)
                code = "nccl._FILE = 'libnccl-of-a-test.so.2'; print(nccl.why_none(), len(nccl.new_id()))"
                self.assertEqual(self.ran(code, PYTHONPATH=folder), "None 128")

    def test_one_that_is_missing_or_too_old_is_named(self) -> None:
        self.assertEqual(
            self.ran("nccl._FILE = 'libnccl-none.so.2'; print(nccl.why_none())"),
            "CUDA needs libnccl-none.so.2, which the system's loader does not know; set ROLLOUT_CUDA_PATH to the folder that has it")
        self.assertRegex(
            self.ran("nccl._FILE = 'libc.so.6'; print(nccl.why_none())"), "^libc.so.6 is older than NCCL 2.14: .*ncclGetUniqueId")

    def test_an_error_has_its_name(self) -> None:
        with cuda.device(0).current():
            with self.assertRaisesRegex(CudaError, "^ncclCommInitRankConfig: invalid argument$"):
                nccl.Communicator(nccl.new_id(), 2, 5, lambda: None)
            with self.assertRaisesRegex(CudaError, "^NCCL: internal error$|^ncclCommInitRankConfig: internal error$"):
                nccl.Communicator(nccl.new_id(), 2000, 0, lambda: None)  # refused by the simulator after the communicator was made
        self.assertEqual(communicators(), 0)


if __name__ == "__main__":
    unittest.main()
