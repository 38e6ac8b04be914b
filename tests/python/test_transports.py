"""The ways a payload takes: which one is chosen, and that what arrives is what was sent, also where it goes wrong."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
from fake_sidecar import FakeSidecar, FakeWeights
from support import SidecarTests, as_float32, golden_weights, in_another_container, needs_torch, other_weights, own_files, start, torch

import rollout
from rollout import PayloadFileError, SharedMemoryError, SparseTensor, UpdateOutcome, WeightUpdateFailed, WeightUpdateRejected
from rollout.address import on_this_machine
from rollout.weights import digest, publisher, senders, tensors
from rollout.weights.call import UpdateCall

SEND = UpdateCall.send
PAYLOAD = 416_896  # bytes of the golden qwen3


def digests(client):
    return {name: tensor.digest for name, tensor in client.describe().tensors.items()}


class TransportTests(SidecarTests):
    """Against a real sidecar."""

    def samples(self):
        [group] = self.rollout.generate([self.golden.prompt], n=4, max_tokens=20, seed=9)
        return [(sample.ids.tolist(), sample.logprobs.tolist()) for sample in group]

    def of_a_full_push(self, weights):
        """Samples and digests of a sidecar that got these weights inline."""
        with start() as sidecar, sidecar.connect() as client:
            client.push_weights(weights, transport="inline")
            [group] = client.generate([self.golden.prompt], n=4, max_tokens=20, seed=9)
            return [(sample.ids.tolist(), sample.logprobs.tolist()) for sample in group], digests(client)

    def test_a_ring_of_any_size_carries_any_weights(self) -> None:
        draw = random.Random(os.environ.get("ROLLOUT_TEST_SEED", 1))
        weights = [other_weights("qwen3"), golden_weights("qwen3")]
        expected = [self.of_a_full_push(one) for one in weights]
        for push in range(16):
            most = draw.choice([draw.randint(2000, 9000), draw.randint(9000, PAYLOAD - 1), PAYLOAD - 1, PAYLOAD // 2, 65_536])
            mode = draw.choice(["staged", "in_place"])
            with self.subTest(most=most, mode=mode), in_another_container() if push % 2 else contextlib.nullcontext():
                result = self.rollout.push_weights(
                    weights[push % 4 // 2], mode=mode, transport="shared_memory", max_shared_memory_bytes=most)
                self.assertEqual((result.transport, result.payload_bytes), ("shared_memory", PAYLOAD))
                self.assertIn(f"{most:,} bytes of it for a payload of 416,896, used as a ring", result.reason)
                self.assertEqual((self.samples(), digests(self.rollout)), expected[push % 4 // 2])

    def test_by_itself_it_takes_the_sidecars_memory_and_else_the_stream(self) -> None:
        weights = other_weights("qwen3")
        near = self.rollout.push_weights(weights)
        self.assertEqual((near.transport, near.reason), ("shared_memory", "the sidecar's memory can be opened here"))
        with in_another_container(), rollout.Rollout(self.sidecar.address) as client:
            apart = client.push_weights(weights)
        self.assertEqual(apart.transport, "inline")
        self.assertIn("another container", apart.reason)
        with mock.patch.object(publisher, "on_this_machine", return_value=False), rollout.Rollout(self.sidecar.address) as client:
            far = client.push_weights(weights)
        self.assertEqual((far.transport, far.reason), ("inline", f"the sidecar at {self.sidecar.address} is on another machine"))
        asked = self.rollout.push_weights(weights, transport="inline", base_version=3)
        self.assertEqual((asked.transport, asked.reason), ("inline", "transport='inline' was asked for"))
        self.assertEqual((own_files(), self.rollout.status().version), ([], 4))
        self.assertEqual((self.samples(), digests(self.rollout)), self.of_a_full_push(weights))

    # ---- Sparse.

    def test_a_sparse_push_gives_the_same_bits_as_a_full_one(self) -> None:
        draw = np.random.default_rng(1)
        old, new = golden_weights("qwen3"), dict(golden_weights("qwen3"))
        sparse = {}
        for name, tensor in old.items():
            count = int(draw.choice([0, 1, tensor.bits.size, draw.integers(0, tensor.bits.size + 1)]))
            indices = np.sort(draw.choice(tensor.bits.size, count, replace=False))
            values = rollout.BFloat16(draw.choice(tensor.bits.reshape(-1), count))
            bits = tensor.bits.reshape(-1).copy()
            bits[indices] = values.bits
            new[name] = rollout.BFloat16(bits.reshape(tensor.bits.shape))
            sparse[name] = SparseTensor(tensor.bits.shape, indices.astype(draw.choice(["int64", "int32", "uint32", "uint64"])), values)
        self.assertGreater(len(sparse), 10)
        full, _ = self.of_a_full_push(new)
        self.assertNotEqual(self.samples(), full)
        names = list(sparse)
        for how in (
            {}, {"transport": "inline"}, {"max_shared_memory_bytes": 9999}, {"max_shared_memory_bytes": 4000, "mode": "in_place"},
            {"partial": True},
        ):
            with self.subTest(how):
                self.rollout.push_weights(old)
                some = {name: sparse[name] for name in names[::2]} if "partial" in how else sparse
                self.rollout.push_weights(some, **how)
                if "partial" in how:
                    self.assertNotEqual(self.samples(), full)
                    whole = {name: new[name] for name in names[3::4]}  # whole tensors and sparse ones in one push
                    self.rollout.push_weights({**{name: sparse[name] for name in names[1::4]}, **whole}, partial=True)
                self.assertEqual(self.samples(), full)
                # Of the whole tensors, also where single elements were sent. Without xxhash there is nothing to compare with.
                described = digests(self.rollout)
                for name in names if digest.xxhash else []:
                    self.assertEqual(described[name], digest_of(new[name]), name)

    @needs_torch
    def test_sparse_tensors_of_torch_and_of_other_types(self) -> None:
        name, tensor = next((name, tensor) for name, tensor in golden_weights("qwen3").items() if tensor.bits.ndim == 2)
        values = as_float32(tensor).reshape(-1)
        indices = np.arange(1, values.size, 3)
        changed = {**golden_weights("qwen3"), name: as_float32(tensor).copy()}
        changed[name].reshape(-1)[indices] = values[indices] * 1.2345
        full, _ = self.of_a_full_push(changed)
        for sent in (
            torch.from_numpy(values[indices] * 1.2345), torch.from_numpy(values[indices] * 1.2345).bfloat16(), values[indices] * 1.2345,
            torch.from_numpy(np.repeat(values[indices] * 1.2345, 2))[::2].requires_grad_(),
        ):
            self.rollout.push_weights(golden_weights("qwen3"))
            sparse = SparseTensor(torch.Size(tensor.bits.shape), torch.from_numpy(indices), sent)
            self.rollout.push_weights({name: sparse}, partial=True)
            self.assertEqual(self.samples(), full)

    def test_indices_that_cannot_be_are_refused_before_anything_is_sent(self) -> None:
        values = {n: rollout.BFloat16(np.zeros(n, np.uint16)) for n in range(5)}
        names = [name for name, tensor in golden_weights("qwen3").items() if tensor.bits.size >= 32][:3]
        shape = golden_weights("qwen3")[names[0]].bits.shape
        elements = int(np.prod(shape))
        for indices, says in (
            ([5, 3, 7], "index 1 is 3 after 5, they must ascend"), ([3, 5, 5], "index 2 is 5 after 5, they must ascend"),
            ([1, elements], f"index 1 is {elements}, the tensor has {elements} elements"), ([-1, 4], "index 0 is -1"),
            ([2, 1 << 32], f"index 1 is {1 << 32}"), ([1, 2, (1 << 32) + 5], "index 2 is"),
        ):
            with self.subTest(indices), self.assertRaisesRegex(ValueError, says):
                sparse = SparseTensor(shape, np.array(indices), values[len(indices)])
                self.rollout.push_weights({names[0]: sparse}, partial=True, mode="in_place")
        with self.assertRaises(ValueError) as every:
            self.rollout.push_weights(
                {names[0]: SparseTensor(shape, np.array([2, 1]), values[2]), names[1]: SparseTensor(shape, np.array([1, 2, 3]), values[2])})
        for says in (f"{names[0]!r}: index 1 is 1 after 2", f"{names[1]!r}: values of shape [2] for indices of shape [3]"):
            self.assertIn(says, str(every.exception))
        for wrong in (np.array([1.0]), np.array([True])):
            with self.assertRaisesRegex(TypeError, "indices of"):
                self.rollout.push_weights({names[0]: SparseTensor(shape, wrong, values[1])})
        with self.assertRaisesRegex(WeightUpdateRejected, "shape is"):  # what only the sidecar can know
            self.rollout.push_weights({names[0]: SparseTensor((2, 3), np.array([1]), values[1])}, partial=True)
        self.assert_serves_the_old_weights()

    def test_indices_that_change_after_they_were_checked_are_found_by_the_sidecar(self) -> None:
        name, tensor = next((name, tensor) for name, tensor in golden_weights("qwen3").items() if tensor.bits.size >= 32)
        for indices, says in (([5, 3, 7], "they must ascend"), ([3, 5, 5], "they must ascend"), ([1, 2, tensor.bits.size], "elements")):
            sparse = SparseTensor(tensor.bits.shape, np.array(indices), rollout.BFloat16(np.zeros(3, np.uint16)))
            for how in ({}, {"transport": "inline"}, {"max_shared_memory_bytes": 10}):
                with self.subTest(indices, how=how), mock.patch.object(tensors, "_check_indices"):
                    with self.assertRaisesRegex(WeightUpdateFailed, f"sparse tensor '{name}': .*{says}") as failed:
                        self.rollout.push_weights({name: sparse}, partial=True, **how)
                    self.assertIs(failed.exception.outcome, UpdateOutcome.NOT_COMMITTED)
        self.assert_serves_the_old_weights()

    # ---- Files.

    def test_a_file_in_a_folder_that_both_see(self) -> None:
        folder = self.temporary_folder()
        weights = other_weights("qwen3")
        for mode in ("staged", "in_place"):
            result = self.rollout.push_weights(weights, transport="file", folder=folder, mode=mode)
            self.assertEqual((result.transport, result.reason, result.mode), ("file", "transport='file' was asked for", mode))
            self.assertEqual(list(folder.iterdir()), [])
            self.assertEqual((self.samples(), digests(self.rollout)), self.of_a_full_push(weights))
            weights = {name: tensor for name, tensor in golden_weights("qwen3").items() if tensor.bits.shape != (0,)}
        some = dict(list(other_weights("qwen3").items())[2:5])
        here = Path.cwd()
        self.addCleanup(os.chdir, here)
        os.chdir(folder)
        self.rollout.push_weights(some, transport="file", folder=".", partial=True)
        self.assertEqual((self.samples(), digests(self.rollout)), self.of_a_full_push({**weights, **some}))

    def test_a_folder_that_is_missing_or_full_is_an_error_before_anything_is_sent(self) -> None:
        weights, folder = other_weights("qwen3"), self.temporary_folder()
        with self.assertRaisesRegex(PayloadFileError, "no file can be made in .*/missing: No such file") as missing:
            self.rollout.push_weights(weights, transport="file", folder=folder / "missing")
        self.assertIsInstance(missing.exception, OSError)
        with mock.patch("os.posix_fallocate", side_effect=OSError(28, "No space left on device")):
            with self.assertRaisesRegex(PayloadFileError, "give another folder, or push with transport='inline'") as full:
                self.rollout.push_weights(weights, transport="file", folder=str(folder))
        self.assertNotIsInstance(full.exception, SharedMemoryError)
        sparse = {"a": SparseTensor((4,), np.array([1]), np.zeros(1, np.float32)), "b": np.zeros(3, np.float32)}
        with self.assertRaisesRegex(ValueError, "whole tensors, these are sparse: a$"):
            self.rollout.push_weights(sparse, transport="file", folder=folder)
        with self.assertRaisesRegex(ValueError, "whole tensors"):
            rollout.checkpoint.save(folder / "new", sparse, {})
        for wrong in ({"transport": "file"}, {"folder": folder}, {"folder": folder, "transport": "inline"}, {"max_shared_memory_bytes": 0}):
            with self.assertRaises(ValueError, msg=wrong):
                self.rollout.push_weights(weights, **wrong)
        self.assertEqual(list(folder.iterdir()), [])
        self.assert_serves_the_old_weights()

    def test_a_file_that_the_sidecar_does_not_see_leaves_the_old_weights(self) -> None:
        folder = self.temporary_folder()

        def unseen(call, **request):
            if "file" in request:
                Path(request["file"].path).unlink()
            SEND(call, **request)

        with mock.patch.object(UpdateCall, "send", unseen), self.assertRaisesRegex(WeightUpdateFailed, "there is no such file") as failed:
            self.rollout.push_weights(other_weights("qwen3"), transport="file", folder=folder)
        self.assertIs(failed.exception.outcome, UpdateOutcome.NOT_COMMITTED)
        self.assertEqual(list(folder.iterdir()), [])
        self.assert_serves_the_old_weights()

    # ---- Failures of all.

    @unittest.skipIf(digest.xxhash is None, "xxhash is not installed")
    def test_a_bit_that_flips_on_any_way_is_not_committed(self) -> None:
        name, tensor = next(iter(golden_weights("qwen3").items()))
        sparse = {name: SparseTensor(tensor.bits.shape, np.arange(9), rollout.BFloat16(np.zeros(9, np.uint16)))}
        folder = self.temporary_folder()
        for weights, how, at in (
            (other_weights("qwen3"), {"max_shared_memory_bytes": 50_000}, 5), (other_weights("qwen3"), {"transport": "inline"}, 1),
            (other_weights("qwen3"), {"transport": "file", "folder": folder}, 1), (sparse, {"partial": True}, 1),
        ):
            messages = []

            def flip(call, messages=messages, at=at, **request):
                """The last bit of the payload message that is number ``at``."""
                [(step, message)] = request.items()
                messages.extend([message] if step in ("chunk", "shared_memory", "file") else [])
                if len(messages) == at and message is messages[-1]:
                    if step == "chunk":
                        message.data = message.data[:-1] + bytes([message.data[-1] ^ 1])
                    else:
                        end = message.offset + message.bytes if step == "shared_memory" else os.path.getsize(message.path)
                        with open(message.path, "r+b") as file:
                            file.seek(end - 1)
                            byte = file.read(1)[0]
                            file.seek(end - 1)
                            file.write(bytes([byte ^ 1]))
                SEND(call, **request)

            with self.subTest(how), mock.patch.object(UpdateCall, "send", flip):
                with self.assertRaisesRegex(WeightUpdateFailed, "digest") as failed:
                    self.rollout.push_weights(weights, **how)
                self.assertIs(failed.exception.outcome, UpdateOutcome.NOT_COMMITTED)
                self.assertGreaterEqual(len(messages), at)
        self.assert_serves_the_old_weights()

    def test_a_sidecar_that_dies_in_the_middle_of_a_ring(self) -> None:
        for mode, outcome in (("staged", UpdateOutcome.NOT_COMMITTED), ("in_place", UpdateOutcome.UNKNOWN)):
            with self.subTest(mode):
                self.setUp()
                windows = []

                def kill_at_the_fifth(call, windows=windows, **request):
                    if "shared_memory" in request:
                        windows.append(request)
                        if len(windows) == 5:
                            self.sidecar.kill()
                    SEND(call, **request)

                self.rollout._publisher.resolve_within = 0.5
                with mock.patch.object(UpdateCall, "send", kill_at_the_fifth), self.assertRaises(WeightUpdateFailed) as failed:
                    self.rollout.push_weights(other_weights("qwen3"), mode=mode, max_shared_memory_bytes=30_000)
                self.assertIs(failed.exception.outcome, outcome)
                self.assertLessEqual(len(windows), 6)

    def test_a_trainer_that_gives_up_in_the_middle_of_a_ring_leaves_the_old_weights(self) -> None:
        windows = []

        def interrupted(call, **request):
            if "shared_memory" in request:
                windows.append(request)
                if len(windows) == 5:
                    raise KeyboardInterrupt
            SEND(call, **request)

        with mock.patch.object(UpdateCall, "send", interrupted), self.assertRaises(KeyboardInterrupt):
            self.rollout.push_weights(other_weights("qwen3"), max_shared_memory_bytes=30_000)
        self.assert_serves_the_old_weights()
        self.assertEqual(self.rollout.push_weights(other_weights("qwen3"), max_shared_memory_bytes=30_000).version, 1)


class RingTests(SidecarTests):
    """Against a fake sidecar, which lends a segment and reads as late as it may."""

    def setUp(self) -> None:
        self.weights = FakeWeights()
        self.fake = FakeSidecar(
            str(self.temporary_folder() / "s"), self.weights.update, status=self.weights.status, describe=self.weights.describe)
        self.addCleanup(self.fake.stop)
        self.client = rollout.Rollout(self.fake.address)
        self.addCleanup(self.client.close)

    def lend(self, capacity: int) -> None:
        name = f"rollout-test-{len(self.weights.begun)}"
        descriptor = os.memfd_create(name)
        self.addCleanup(os.close, descriptor)
        os.ftruncate(descriptor, capacity)
        self.weights.segment = {"path": f"/proc/{os.getpid()}/fd/{descriptor}", "name": name, "bytes": capacity}

    def push(self, sizes: list[int], **how):
        draw = np.random.default_rng(sum(sizes))
        weights = {f"t{i}": rollout.BFloat16(draw.integers(0, 1 << 16, size, np.uint16)) for i, size in enumerate(sizes)}
        self.weights.windows.clear()
        result = self.client.push_weights(weights, **how)
        for name, tensor in weights.items():
            self.assertTrue(self.weights.tensors[name] == tensor.bits.tobytes(), f"{name} of {sizes} arrived as something else")
        return result

    def test_memory_that_the_sidecar_lends_is_used_whatever_its_size(self) -> None:
        """The sidecar reads a window as late as the ring allows: when no other one can be written before. None is overwritten unread."""
        draw = random.Random(os.environ.get("ROLLOUT_TEST_SEED", 1))
        cases = [([1_000_000], 400_000), ([999_999], 999_997), ([30], 14), ([30], 59), ([3], 1), ([12], 4), ([5, 0, 300, 0], 33)]
        for _ in range(40):
            sizes = [draw.choice([0, 1, draw.randint(2, 400), draw.randint(2, 90_000)]) for _ in range(draw.randint(1, 6))]
            cases.append(([*sizes, 9], draw.randint(1, 90_000)))
        for sizes, capacity in cases:
            offset = 0
            for size in sizes:
                offset = -(-offset // 256) * 256 + 2 * size
            if capacity < offset / 500:
                continue  # thousands of windows
            for window, lent in ((64 << 20, True), (draw.randint(1, capacity), True), (draw.randint(1, capacity), False)):
                with self.subTest(sizes, capacity=capacity, window=window), mock.patch.object(senders, "_SMALLEST_WINDOW", window):
                    if max(window, offset // 8) < offset / 500:
                        continue
                    if lent:
                        self.lend(capacity)
                    else:
                        self.weights.segment = None
                    used = min(capacity, offset)
                    self.weights.behind = max(0, used // senders.window_bytes(offset, used) - 1)
                    result = self.push(sizes, transport="shared_memory", max_shared_memory_bytes=None if lent else capacity)
                    self.assertEqual((result.transport, result.payload_bytes), ("shared_memory", offset))
                    self.assertEqual("ring" in result.reason, capacity < offset)
                    end = 0
                    for part in self.weights.windows:
                        self.assertEqual(part.payload_offset, end)
                        self.assertLessEqual(part.offset + part.bytes, used)
                        end += part.bytes
                    self.assertEqual(end, offset)
        self.assertEqual(len(own_files()), 1)

    def test_a_payload_goes_in_windows_so_that_the_sidecar_reads_while_it_is_written(self) -> None:
        self.lend(1 << 20)
        with mock.patch.object(senders, "_SMALLEST_WINDOW", 1000):
            self.assertNotIn("ring", self.push([400_000]).reason)
            self.assertEqual({part.bytes for part in self.weights.windows}, {100_000})
            self.weights.mode = 2  # in place no step runs: all is written before the sidecar is told
            self.push([400_000])
            self.assertEqual([part.bytes for part in self.weights.windows], [800_000])

    def test_what_is_asked_of_the_sidecar_is_what_is_used(self) -> None:
        self.lend(1 << 20)
        for how, asked in (
            ({}, 800_000), ({"max_shared_memory_bytes": 70_000}, 70_000), ({"max_shared_memory_bytes": 1 << 40}, 800_000),
            ({"transport": "inline"}, 0), ({"transport": "file", "folder": self.temporary_folder()}, 0),
        ):
            self.push([400_000], **how)
            self.assertEqual(self.weights.begun[-1].segment_bytes, asked)
            self.assertTrue(all(part.offset + part.bytes <= asked for part in self.weights.windows))
        with mock.patch.object(publisher, "on_this_machine", return_value=False), rollout.Rollout(self.fake.address) as self.client:
            self.assertEqual(self.push([400_000]).transport, "inline")
            self.assertEqual(self.weights.begun[-1].segment_bytes, 0)
            self.assertEqual(self.push([400_000], transport="shared_memory").transport, "shared_memory")

    def test_a_sidecar_without_memory_to_lend_gets_the_payload_in_the_stream(self) -> None:
        result = self.push([400_000])
        self.assertEqual((result.transport, result.reason), ("inline", "the sidecar has no memory to lend"))

    def test_a_dev_shm_that_is_nearly_full_is_a_ring(self) -> None:
        with mock.patch.object(publisher, "free_bytes", return_value=5 << 20):
            result = self.push([4_000_000], transport="shared_memory")
            self.assertIn(f"{(5 << 20) // 4 * 3:,} bytes of it for a payload of 8,000,000, used as a ring", result.reason)
            [first] = own_files()
            self.push([4_000_000], transport="shared_memory")
            self.assertEqual(own_files(), [first])  # though it is smaller than the payload
        self.push([4_000_001], transport="shared_memory")
        [second] = own_files()
        self.assertNotEqual(first, second)
        with mock.patch.object(publisher, "free_bytes", return_value=3 << 20):  # too little for a ring: the error says what to do
            with mock.patch("os.posix_fallocate", side_effect=OSError(28, "No space left on device")):
                with self.assertRaisesRegex(SharedMemoryError, "--shm-size"):
                    self.push([5_000_000], transport="shared_memory")

    def test_sparse_tensors_are_indices_then_values_under_the_count_of_this_push(self) -> None:
        for count in (3, 700_000, 5, 0):
            indices = 3 * np.arange(count)
            values = np.arange(count).astype(np.uint16)
            self.client.push_weights({"s": SparseTensor((1000, 3000), indices, rollout.BFloat16(values))}, partial=True, transport="inline")
            [entry] = self.weights.begun[-1].manifest
            self.assertEqual((entry.sparse_count, entry.HasField("sparse_count"), list(entry.shape)), (count, True, [1000, 3000]))
            self.assertTrue(self.weights.tensors["s"] == indices.astype("<u4").tobytes() + values.astype("<u2").tobytes())

    def test_elements_are_rounded_as_whole_tensors_are(self) -> None:
        values = np.random.default_rng(1).standard_normal(1000).astype(np.float32)
        self.client.push_weights({"s": values}, transport="inline")
        whole = self.weights.tensors["s"]
        self.client.push_weights({"s": SparseTensor((1000,), np.arange(1000), values)}, transport="inline")
        self.assertEqual(self.weights.tensors["s"][4000:], whole)
        self.client.push_weights({"s": SparseTensor((1000,), np.arange(1000), values)}, transport="inline", dtype=None)
        self.assertEqual(self.weights.tensors["s"], struct.pack("<1000I", *range(1000)) + values.tobytes())


class AddressTests(unittest.TestCase):
    def test_which_addresses_are_of_this_machine(self) -> None:
        self.assertTrue(on_this_machine("unix:/tmp/rollout.sock"))
        self.assertTrue(on_this_machine("127.0.0.1:5000"))
        self.assertTrue(on_this_machine("http://localhost:5000/"))
        self.assertFalse(on_this_machine("192.0.2.1:5000"))  # of documentation: nobody's
        with mock.patch("socket.getaddrinfo", side_effect=socket.gaierror):
            self.assertFalse(on_this_machine("nowhere:5000"))


def digest_of(tensor: rollout.BFloat16) -> str:
    whole = digest.TensorDigest()
    whole.update(memoryview(tensor.bits.tobytes()))
    return whole.digest().hex()


if __name__ == "__main__":
    unittest.main()
