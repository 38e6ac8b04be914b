"""Weights on a GPU, simulated: read there by a sidecar on the same one, copied to the host where they cannot be."""

from __future__ import annotations

import contextlib
import math
import os
import random
import subprocess
import sys
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
import simulated_cuda
from fake_sidecar import FakeSidecar, FakeWeights
from simulated_cuda import Array, Memory, Tensor, needs_it, rounded
from support import SidecarTests, as_float32, eventually, golden_weights, other_weights, start

import rollout
from rollout import SparseTensor, UpdateOutcome, WeightUpdateFailed
from rollout import _wire as wire
from rollout.weights import cuda, cuda_ipc, device_tensors, digest, nccl
from rollout.weights.call import UpdateCall

SEND, UNTIL = UpdateCall.send, UpdateCall.until
UUID = b"rollout-cuda-sim"


setUpModule = simulated_cuda.set_up_module  # noqa: N816  unittest's name


def of(weights, **where):
    """Each tensor in an allocation of its own."""
    return {name: Tensor.of(tensor.bits, "bfloat16", **where) for name, tensor in weights.items()}


def packed(weights, device=0):
    """All in one allocation, as PyTorch's allocator places small ones: at multiples of 512 bytes."""
    memory = Memory(sum(-(-tensor.bits.nbytes // 512) * 512 for tensor in weights.values()), device)
    Tensor.kept.append(memory)
    found, offset = {}, 0
    for name, tensor in weights.items():
        found[name] = Tensor.of(tensor.bits, "bfloat16", memory, offset)
        offset += -(-tensor.bits.nbytes // 512) * 512
    return found


@contextlib.contextmanager
def buckets(most: int, least: int = 131_072):
    with mock.patch.object(cuda_ipc, "_MOST_BUCKET_BYTES", most), mock.patch.object(cuda_ipc, "_LEAST_BUCKET_BYTES", least):
        yield


class DeviceTests(SidecarTests):
    """Frees what a test has put on the GPU."""

    def setUp(self) -> None:
        self.addCleanup(self.free)

    @staticmethod
    def free() -> None:
        for memory in Tensor.kept:
            with contextlib.suppress(Exception):  # expandable ones stay
                memory.free()
        Tensor.kept.clear()

    def counts(self):
        """Collects what the sidecar counts in every push."""
        found = []

        def seen(call, step):
            reply = UNTIL(call, step)
            if step == "committed":
                found.append(reply.counts)
            return reply

        patched = mock.patch.object(UpdateCall, "until", seen)
        patched.start()
        self.addCleanup(patched.stop)
        return found


@needs_it
class SameGpuTests(DeviceTests):
    """A sidecar on the GPU that has the tensors, one for all tests."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.sidecar = start("qwen3", "--device", "cuda", "--max-sequences", "4", "--kv-cache", "4MiB")
        cls.addClassCleanup(cls.sidecar.stop)
        cls.model = {"golden": golden_weights("qwen3"), "other": other_weights("qwen3")}
        with cls.sidecar.connect() as client:
            cls.expected = {}
            for which, weights in cls.model.items():
                client.push_weights(weights, transport="shared_memory")
                cls.expected[which] = cls.served(client)
        assert cls.expected["golden"] != cls.expected["other"]

    def setUp(self) -> None:
        super().setUp()
        self.rollout = self.sidecar.connect()
        self.addCleanup(self.rollout.close)
        self.rollout.push_weights(golden_weights("qwen3"), transport="shared_memory")

    @staticmethod
    def served(client):
        """Samples and digests."""
        [group] = client.generate([[1, 2, 3]], n=2, max_tokens=8, seed=9)
        digests = {name: tensor.digest for name, tensor in client.describe().tensors.items()}
        return [(sample.ids.tolist(), sample.logprobs.tolist()) for sample in group], digests

    def assert_serves(self, which: str) -> None:
        self.assertEqual(self.served(self.rollout), self.expected[which])

    def test_tensors_are_read_where_they_are(self) -> None:
        counts = self.counts()
        for way in (of, packed):
            weights = way(self.model["other"])
            result = self.rollout.push_weights(weights)
            self.assertEqual((result.transport, result.payload_bytes, len(result.digest)), ("cuda_ipc", 416_896, 32))
            self.assertEqual(result.reason, "all tensors are on the sidecar's GPU-726f6c6c-6f75-742d-6375-64612d73696d")
            self.assert_serves("other")
            allocations = len({tensor.memory.pointer for tensor in weights.values()})
            self.assertEqual((counts[-1].handles_opened, counts[-1].launches, counts[-1].host_bytes), (allocations, 1, 0))
            self.rollout.push_weights(weights)
            self.assertEqual((counts[-1].handles_opened, counts[-1].launches, counts[-1].host_bytes), (0, 1, 0))
            self.rollout.push_weights(golden_weights("qwen3"), transport="shared_memory")
        self.assertEqual(allocations, 1)

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
        for through_buckets in (False, True):
            weights = of(self.model["golden"], expandable=through_buckets)
            with mock.patch.object(cuda.Device, "stream", return_value=stream):
                kept = [
                    tensor.memory.write(self.model["other"][name].bits.tobytes(), 512, stream) for name, tensor in weights.items()
                ]
                self.assertEqual(self.rollout.push_weights(weights).transport, "cuda_ipc")
            self.assert_serves("other")
            self.rollout.push_weights(golden_weights("qwen3"), transport="shared_memory")
            del kept

    def test_expandable_segments_views_and_other_types_go_through_buckets(self) -> None:
        bits = self.model["other"]
        matrices = [name for name, tensor in bits.items() if tensor.bits.ndim == 2]
        cases = {
            "expandable": of(bits, expandable=True),
            "float32": {name: Tensor.of(as_float32(tensor), "float32") for name, tensor in bits.items()},
            "float64": {name: Tensor.of(as_float32(tensor), "float64") for name, tensor in bits.items()},
            "transposed": {**of(bits), **{name: Tensor.of(bits[name].bits.T, "bfloat16").t() for name in matrices}},
            "every second": {
                **of(bits), **{name: Tensor.of(np.repeat(bits[name].bits, 2, axis=0), "bfloat16")[::2] for name in matrices}},
        }
        for i, name in enumerate(bits):  # and all of them in turn, beside tensors that are named
            cases.setdefault("mixed", {})[name] = [*cases.values()][i % 5][name] if i % 3 else of({name: bits[name]})[name]
        counts = self.counts()
        for case, weights in cases.items():
            for bucket in (2 << 20, 131_072):
                with self.subTest(case, bucket=bucket), buckets(bucket), rollout.Rollout(self.sidecar.address) as client:
                    for _ in range(2):
                        result = client.push_weights(weights, base_version=client.status().version)
                        self.assertEqual((result.transport, counts[-1].host_bytes), ("cuda_ipc", 0))
                        self.assertRegex(result.reason, "; [0-9,]+ bytes of [0-9]+ tensors are copied there first$")
                        if bucket == 131_072 and case in ("expandable", "float32"):
                            self.assertGreater(counts[-1].launches, 3)
                        self.assert_serves("other")
                        self.rollout.push_weights(golden_weights("qwen3"), transport="shared_memory", base_version=client.status().version)

    def test_arrays_of_other_libraries(self) -> None:
        bits = self.model["other"]
        tensors = of(bits)
        halves = {name: Tensor.of(as_float32(tensor).astype(np.float16), "float16") for name, tensor in bits.items()}
        arrays = {name: rollout.BFloat16(Array(tensor)) for name, tensor in tensors.items()}
        self.assertEqual(self.rollout.push_weights(arrays).transport, "cuda_ipc")
        self.assert_serves("other")
        as_they_are = {name: Array(tensor) for name, tensor in halves.items()}
        ipc = self.rollout.push_weights(as_they_are, dtype=None)
        self.assertEqual(ipc.transport, "cuda_ipc")
        host = self.rollout.push_weights({name: tensor.numpy() for name, tensor in halves.items()}, dtype=None)
        self.assertEqual(ipc.digest, host.digest)
        # Rounding takes PyTorch: without it that is done on the host.
        singles = {name: Array(Tensor.of(as_float32(tensor), "float32")) for name, tensor in bits.items()}
        result = self.rollout.push_weights(singles)
        self.assertEqual(result.transport, "shared_memory")
        self.assertRegex(result.reason, "must be converted, and is not a tensor of PyTorch: copied to the host; the sidecar's memory can")
        self.assert_serves("other")
        name = next(name for name, tensor in bits.items() if tensor.bits.ndim == 2)
        with self.assertRaisesRegex(TypeError, f"{name!r} is an array on a GPU that is not in C order"):
            self.rollout.push_weights({name: Array(Tensor.of(as_float32(bits[name]), "float32").t())}, partial=True)

    def test_an_array_that_another_stream_writes_is_waited_for(self) -> None:
        stream = simulated_cuda.stream()
        tensors = of(self.model["golden"])
        kept = [tensor.memory.write(self.model["other"][name].bits.tobytes(), 512, stream) for name, tensor in tensors.items()]
        arrays = {name: rollout.BFloat16(Array(tensor, stream=stream)) for name, tensor in tensors.items()}
        self.rollout.push_weights(arrays)
        self.assert_serves("other")
        del kept

    def test_in_place_partial_and_tied(self) -> None:
        golden, other = self.model["golden"], self.model["other"]
        result = self.rollout.push_weights(of(other), mode="in_place")
        self.assertEqual((result.transport, result.mode), ("cuda_ipc", "in_place"))
        self.assert_serves("other")
        some = list(other)[2:5]
        self.rollout.push_weights(of({name: golden[name] for name in some}), partial=True)
        samples, _ = self.served(self.rollout)
        self.rollout.push_weights({**other, **{name: golden[name] for name in some}}, transport="shared_memory")
        self.assertEqual(self.served(self.rollout)[0], samples)

    def test_verify_hashes_what_the_gpu_holds(self) -> None:
        if digest.xxhash is None:
            with self.assertRaisesRegex(ValueError, "xxhash"):
                self.rollout.push_weights(self.model["other"], verify=True)
            self.skipTest("xxhash is not installed")
        commits = []

        def seen(call, **step):
            commits.extend([step["commit"].digest] if "commit" in step else [])
            SEND(call, **step)

        weights = {**of(self.model["other"]), **of(dict(list(self.model["other"].items())[3:6]), expandable=True)}
        with mock.patch.object(UpdateCall, "send", seen):
            self.rollout.push_weights(weights)
            result = self.rollout.push_weights(weights, verify=True)
            self.rollout.push_weights(self.model["other"], verify=False)
        self.assertEqual(commits, [b"", bytes.fromhex(result.digest), b""])
        self.assert_serves("other")

        def flips(call, **step):
            if "cuda_ipc" in step:
                one.memory.write(b"\x55\x55", one.data_ptr() - one.memory.pointer)
            SEND(call, **step)

        for how, committed in (({"verify": True}, False), ({}, True)):
            weights = of(self.model["golden"])
            one = next(iter(weights.values()))
            with self.subTest(how), mock.patch.object(UpdateCall, "send", flips):
                if committed:
                    self.rollout.push_weights(weights, **how)
                    continue
                with self.assertRaisesRegex(WeightUpdateFailed, "digest") as failed:
                    self.rollout.push_weights(weights, **how)
                self.assertIs(failed.exception.outcome, UpdateOutcome.NOT_COMMITTED)
                self.assert_serves("other")

    def test_memory_that_was_freed_and_given_again_is_named_anew(self) -> None:
        weights = of(self.model["golden"])
        name, tensor = next(iter(weights.items()))
        counts = self.counts()
        self.rollout.push_weights(weights)
        # The same address, another allocation: the sidecar has the old one open.
        before = tensor.memory.pointer
        tensor.memory.free()
        Tensor.kept.remove(tensor.memory)
        again = Tensor.of(self.model["golden"][name].bits, "bfloat16")
        self.assertEqual(again.memory.pointer, before)
        weights[name] = again
        for other, tensor in weights.items():
            tensor.memory.write(self.model["other"][other].bits.tobytes(), 512)
        self.rollout.push_weights(weights)
        self.assert_serves("other")
        self.assertEqual(counts[-1].handles_opened, len(weights))
        # One that is still there, and not pushed this time, stays open.
        self.rollout.push_weights({name: again}, partial=True)
        self.rollout.push_weights(weights)
        self.assertEqual(counts[-1].handles_opened, 0)

    def test_memory_is_given_back(self) -> None:
        weights = {**of(self.model["other"]), **of(dict(list(self.model["other"].items())[3:6]), expandable=True)}
        self.rollout.push_weights(weights)
        self.assertEqual(self.rollout.release_memory(), len(weights) - 3 + 1)  # and the bucket
        self.assertEqual(self.rollout.release_memory(), 0)
        self.rollout.push_weights(weights)
        self.assert_serves("other")

    def test_a_bucket_grows_where_more_is_converted(self) -> None:
        weights = self.model["other"]
        with buckets(256 << 20):
            for names in (list(weights)[3:5], list(weights), list(weights)[3:5], list(weights)):
                self.rollout.push_weights(of({name: weights[name] for name in names}, expandable=True), partial=True)
        self.assert_serves("other")

    def test_little_memory_for_buckets_is_enough(self) -> None:
        allocate = cuda.Device.allocate

        def scarce(device, size):
            if size > 131_072:
                raise rollout.CudaError("cuMemAlloc_v2: CUDA_ERROR_OUT_OF_MEMORY")
            return allocate(device, size)

        weights = of(self.model["other"], expandable=True)
        with buckets(256 << 20), mock.patch.object(cuda.Device, "allocate", scarce):
            self.rollout.push_weights(weights)
            self.assert_serves("other")
            self.rollout.push_weights(of(self.model["golden"], expandable=True))
            self.assert_serves("golden")
        with rollout.Rollout(self.sidecar.address) as client, mock.patch.object(
                cuda.Device, "allocate", side_effect=rollout.CudaError("cuMemAlloc_v2: CUDA_ERROR_OUT_OF_MEMORY")):
            with self.assertRaisesRegex(rollout.CudaError, "OUT_OF_MEMORY"):
                client.push_weights(weights)
        self.assert_serves("golden")

    def test_which_way_tensors_take_that_are_not_on_the_sidecars_gpu(self) -> None:
        bits = self.model["other"]
        [first, *_], [*_, last] = bits, bits
        elsewhere = of(bits, device=1)
        sparse = SparseTensor(bits[last].bits.shape, np.arange(bits[last].bits.size), rollout.BFloat16(bits[last].bits.reshape(-1)))
        for case, weights, says in (
            ("several", {**of(bits), first: elsewhere[first]}, "the tensors are on several GPUs"),
            ("the host too", {**of(bits), last: bits[last]}, f"{last!r} is not on a GPU"),
            ("sparse", {**of(bits), last: sparse}, f"{last!r} is sparse"),
        ):
            with self.subTest(case), rollout.Rollout(self.sidecar.address) as client:
                for _ in range(2):
                    result = client.push_weights(weights, base_version=client.status().version)
                    self.assertEqual(result.transport, "shared_memory")
                    self.assertEqual(result.reason, f"{says}: copied to the host; the sidecar's memory can be opened here")
                    self.assertEqual(self.served(client)[0], self.expected["other"][0])
                    self.rollout.push_weights(golden_weights("qwen3"), base_version=client.status().version)
                with self.assertRaisesRegex(ValueError, "transport='cuda_ipc': " + says):
                    client.push_weights(weights, transport="cuda_ipc", base_version=client.status().version)
        for transport in ("shared_memory", "inline"):
            result = self.rollout.push_weights(of(bits), transport=transport, base_version=self.rollout.status().version)
            self.assertTrue(result.reason.startswith(f"transport={transport!r} was asked for"), result.reason)
            self.assert_serves("other")
        with self.assertRaisesRegex(ValueError, "transport='cuda_ipc': .* is not on a GPU"):
            self.rollout.push_weights(bits, transport="cuda_ipc")
        self.assertEqual(self.rollout.push_weights(of(bits), transport="cuda_ipc").transport, "cuda_ipc")

    def test_a_trainer_that_is_killed_in_the_middle_leaves_the_old_weights(self) -> None:
        for mode, state in (("staged", "running"), ("in_place", "poisoned")):
            with self.subTest(mode):
                trainer = subprocess.Popen(
                    [sys.executable, str(Path(__file__).with_name("killed_gpu_trainer.py")), self.sidecar.address, mode, "cuda_ipc"],
                    stdout=subprocess.PIPE, text=True)
                self.addCleanup(trainer.stdout.close)
                self.assertEqual(trainer.stdout.readline(), "midway\n")
                self.assertTrue(self.rollout.status().updating)
                trainer.kill()
                trainer.wait()
                eventually(lambda: not self.rollout.status().updating, "the update's seat is given back")
                self.assertEqual(self.rollout.status().state, state)
                if mode == "staged":
                    self.assert_serves("golden")
        self.rollout.push_weights(of(self.model["other"]))
        self.assert_serves("other")


@needs_it
class HostSidecarTests(DeviceTests):
    def test_a_sidecar_without_a_gpu_gets_the_weights_through_the_host(self) -> None:
        sidecar = start()
        self.addCleanup(sidecar.stop)
        with sidecar.connect() as client:
            result = client.push_weights(of(other_weights("qwen3")))
            self.assertEqual(result.transport, "shared_memory")
            self.assertRegex(result.reason, "^the tensors are on GPU-.*, the sidecar has none: copied to the host; ")
            expected = client.push_weights(other_weights("qwen3")).digest
            self.assertEqual(result.digest, expected)
            self.assertEqual(client.release_memory(), 0)


@needs_it
class MessageTests(DeviceTests):
    """What a sidecar is told, and when: one that reads as late as it may."""

    def setUp(self) -> None:
        super().setUp()
        self.handles = {}
        handle = cuda.Device.handle

        def known(device, pointer):
            made = handle(device, pointer)
            self.handles[made] = (device, pointer)
            return made

        patched = mock.patch.object(cuda.Device, "handle", known)
        patched.start()
        self.addCleanup(patched.stop)
        self.weights = FakeWeights()
        self.weights.device_uuid = UUID
        self.weights.read_device = self.read
        self.fake = FakeSidecar(
            str(self.temporary_folder() / "s"), self.weights.update, status=self.weights.status, describe=self.weights.describe)
        self.addCleanup(self.fake.stop)
        self.client = rollout.Rollout(self.fake.address)
        self.addCleanup(self.client.close)

    def read(self, allocation, offset: int, size: int) -> bytes:
        device, pointer = self.handles[allocation.handle]
        self.assertEqual(allocation.device_uuid, device.uuid)
        content = bytearray(size)
        with device.current():
            start = device.allocation_of(pointer)
            assert start.start == pointer and offset + size <= start.bytes
            device.read(pointer + offset, memoryview(content), 0)
        return bytes(content)

    def test_any_mixture_arrives_however_small_the_buckets(self) -> None:
        draw = random.Random(os.environ.get("ROLLOUT_TEST_SEED", 1))
        for trial in range(25):
            numbers = np.random.default_rng(draw.randrange(1 << 30))
            bucket = draw.choice([1, 2, 3]) * 131_072 + draw.choice([0, 256, 1000])
            weights, expected = {}, {}
            for i in range(draw.randint(1, 7)):
                shape = draw.choice([(), (1,), (0, 3), (7,), (300, 500), (70_000,), (3, 200, 300), (2, 65_536), (2, 100_001)])
                how = draw.choice(["named", "expandable", "converted", "strided"])
                bits = numbers.integers(0, 1 << 16, shape, np.uint16)
                if how == "strided" and shape and 0 not in shape:
                    tensor = Tensor.of(np.repeat(bits, 3, axis=0), "bfloat16")[::3]
                elif how == "converted":
                    values = numbers.standard_normal(shape).astype(np.float32)
                    tensor, bits = Tensor.of(values, "float32"), rounded(np.asarray(values))
                else:
                    tensor = Tensor.of(bits, "bfloat16", expandable=how == "expandable")
                weights[f"t{i}"], expected[f"t{i}"] = tensor, bits.tobytes()
            temporary = mock.patch.object(device_tensors, "_TEMPORARY_ELEMENTS", draw.choice([997, 70_000, 1 << 24]))
            with self.subTest(trial=trial, bucket=bucket), buckets(bucket, bucket), temporary:
                self.client.close()
                self.client = rollout.Rollout(self.fake.address)
                self.weights.behind = 1
                for _ in range(2):
                    self.weights.ipc.clear()
                    result = self.client.push_weights(weights, base_version=self.weights.version)
                    self.assertEqual(result.transport, "cuda_ipc")
                    for name, content in expected.items():
                        self.assertTrue(self.weights.tensors[name] == content, f"{name} arrived as something else")
                    self.check_ranges()
                    self.weights.tensors.clear()
            self.free()

    def check_ranges(self) -> None:
        """Ascending, within their tensors, and cut only where a tensor's digest is."""
        end = 0
        borders = {}
        for tensor in self.weights.begun[-1].manifest:
            size = 2 * math.prod(tensor.shape)
            borders[tensor.offset] = borders[tensor.offset + size] = None
            borders.update({tensor.offset + at: None for at in range(0, size, 131_072)})
        for message in self.weights.ipc:
            self.assertEqual(len({allocation.handle for allocation in message.allocations}), len(message.allocations))
            self.assertEqual(len(message.ready_event), 64)
            for part in message.ranges:
                self.assertGreaterEqual(part.payload_offset, end)
                self.assertLess(part.payload_offset - end, 256)
                end = part.payload_offset + part.bytes
                self.assertTrue(part.payload_offset in borders and end in borders, (part.payload_offset, end))

    def test_no_host_memory_is_asked_for_where_the_weights_stay_on_the_gpu(self) -> None:
        weights = {"a": Tensor.of(np.zeros((70, 1 << 20), np.uint16), "bfloat16")}
        for _ in range(2):
            self.client.push_weights(weights)
        self.weights.device_uuid = UUID[:15] + b"z"  # it was restarted on another GPU
        with mock.patch.object(nccl, "_library", side_effect=rollout.CudaError("none")):
            for _ in range(2):
                self.client.push_weights(weights, base_version=self.weights.version)
        # At first it is not known which GPU the sidecar is on: enough for a ring.
        self.assertEqual([begin.segment_bytes for begin in self.weights.begun], [64 << 20, 0, 0, 140 << 20])

    def test_a_push_that_fails_between_two_messages_aborts_the_update(self) -> None:
        def fails(*_):
            raise rollout.CudaError("cuMemcpyDtoDAsync_v2: CUDA_ERROR_ILLEGAL_ADDRESS")

        numbers = np.zeros(70_000, np.uint16)
        weights = {"a": Tensor.of(numbers, "bfloat16"), "b": Tensor.of(numbers, "bfloat16", expandable=True)}
        with mock.patch.object(cuda.Device, "copy", fails), self.assertRaisesRegex(rollout.CudaError, "ILLEGAL_ADDRESS"):
            self.client.push_weights(weights)
        eventually(lambda: not self.weights.updating, "the update has ended")
        self.assertEqual(self.weights.version, 7)
        self.assertEqual(self.client.push_weights(weights).version, 8)

    def test_a_thread_keeps_its_context(self) -> None:
        second = cuda.device(1)
        with second.current():
            before = simulated_cuda.context()
            self.assertEqual(self.client.push_weights({"a": Tensor.of(np.zeros(9, np.uint16), "bfloat16")}).transport, "cuda_ipc")
            self.assertEqual(simulated_cuda.context(), before)
        self.assertNotEqual(simulated_cuda.context(), before)

    def test_tensors_whose_driver_is_gone_are_an_error_and_not_garbage(self) -> None:
        weights = {"a": Tensor.of(np.arange(9).astype(np.uint16), "bfloat16")}
        with mock.patch.object(cuda, "_devices", {}), mock.patch.object(cuda, "_driver", side_effect=rollout.CudaError("no libcuda.so.1")):
            with self.assertRaisesRegex(rollout.CudaError, "no libcuda"):
                self.client.push_weights(weights)


@needs_it
class DriverTests(unittest.TestCase):
    def test_a_driver_that_is_missing_is_named(self) -> None:
        code = "import support; from rollout.weights import cuda; cuda._FILE = 'libcuda-none.so.1'; cuda.device(0)"
        ran = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
        self.assertIn("CUDA needs libcuda-none.so.1, which the system's loader does not know; set ROLLOUT_CUDA_PATH to", ran.stderr)

    def test_an_error_of_the_driver_has_its_name(self) -> None:
        with self.assertRaisesRegex(rollout.CudaError, "cuDevicePrimaryCtxRetain: CUDA_ERROR_INVALID_DEVICE"):
            cuda.Device(7)
        with cuda.device(0).current(), self.assertRaisesRegex(rollout.CudaError, "cuMemAlloc_v2: CUDA_ERROR_OUT_OF_MEMORY"):
            cuda.device(0).allocate(1 << 50)


if __name__ == "__main__":
    unittest.main()
