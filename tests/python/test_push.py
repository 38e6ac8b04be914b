"""Weight pushes that succeed, and those that the preflight refuses, against a real sidecar."""

from __future__ import annotations

import random
import tempfile
import threading
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
from support import (
    SidecarTests,
    as_float32,
    eventually,
    golden_config,
    golden_weights,
    in_another_container,
    needs_torch,
    other_weights,
    own_files,
    start,
    torch,
)

import rollout
from rollout import BFloat16, StateError, TensorSlice, WeightUpdateRejected
from rollout.weights import publisher
from rollout.weights.shared_memory import Segment
from rollout.weights.tensors import sources


def module_of(weights):
    """A torch module whose parameters have these names."""
    root = torch.nn.Module()
    for name, value in weights.items():
        *path, last = name.split(".")
        at = root
        for part in path:
            if not hasattr(at, part):
                at.add_module(part, torch.nn.Module())
            at = getattr(at, part)
        at.register_parameter(last, torch.nn.Parameter(value))
    return root


def torch_weights(seed=1):
    """Float32, as a trainer holds them: they do not fit bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.from_numpy(as_float32(tensor).copy()) + 0.01 * torch.randn(tensor.bits.shape, generator=generator)
        for name, tensor in golden_weights("qwen3").items()
    }


class PushTests(SidecarTests):
    def samples(self, client, version):
        [group] = client.generate([self.golden.prompt], n=4, max_tokens=20, seed=9)
        for sample in group:
            self.assertEqual({span.version for span in sample.versions}, {version})
            self.assertEqual(sample.oldest_kv_version, version)
        return [(sample.ids.tolist(), sample.logprobs.tolist()) for sample in group]

    def assert_serves(self, weights, version=1, *, dtype="bfloat16"):
        """Checks that its samples equal, bit for bit, those of a new sidecar that has loaded these weights."""
        folder = rollout.checkpoint.save(self.temporary_folder(), weights, golden_config("qwen3"), dtype=dtype)
        with start(folder) as fresh, fresh.connect() as client:
            expected = self.samples(client, version=0)
            digests = {name: tensor.digest for name, tensor in client.describe().tensors.items()}
        self.assertEqual(self.samples(self.rollout, version), expected)
        self.assertEqual({name: tensor.digest for name, tensor in self.rollout.describe().tensors.items()}, digests)

    @needs_torch
    def test_a_state_dict_by_shared_memory(self) -> None:
        before = self.samples(self.rollout, 0)
        weights = torch_weights()
        result = self.rollout.push_weights(weights)
        self.assertEqual((result.version, result.mode, len(result.digest)), (1, "staged", 32))
        self.assertGreater(result.timings.total, 0)
        self.assert_serves(weights)
        self.assertNotEqual(self.samples(self.rollout, 1), before)

    @needs_torch
    def test_a_state_dict_through_a_file_of_dev_shm(self) -> None:
        with in_another_container():
            result = self.rollout.push_weights(torch_weights(), transport="shared_memory")
        self.assertEqual(result.transport, "shared_memory")
        self.assertIn("was asked for, and the sidecar's memory cannot be opened here", result.reason)
        self.assertEqual(len(own_files()), 1)
        self.assert_serves(torch_weights())

    def test_the_sidecars_memory_is_kept_mapped_and_leaves_no_file(self) -> None:
        weights = other_weights("qwen3")
        with mock.patch.object(Segment, "try_open", wraps=Segment.try_open) as opened:
            for version in (1, 2, 3):
                self.assertEqual(self.rollout.push_weights(weights).version, version)
        self.assertEqual(opened.call_count, 1)
        self.assertEqual(own_files(), [])
        self.assert_serves(weights, 3)

    def test_a_path_that_leads_elsewhere_is_left_alone(self) -> None:
        folder = self.temporary_folder()
        other = folder / "other"
        other.write_bytes(bytes(4096))
        (folder / "link").symlink_to(other)
        self.assertIsNone(Segment.try_open("rollout-1", str(folder / "link"), 4096))
        self.assertIsNone(Segment.try_open("rollout-1", "/proc/1/fd/999999", 4096))

    @needs_torch
    def test_a_state_dict_inline(self) -> None:
        result = self.rollout.push_weights(torch_weights(), transport="inline")
        self.assertEqual(result.version, 1)
        self.assertEqual(own_files(), [])
        self.assert_serves(torch_weights())

    @needs_torch
    def test_a_module(self) -> None:
        self.rollout.push_weights(module_of(torch_weights()))
        self.assert_serves(torch_weights())

    @needs_torch
    def test_strides_types_and_float32_as_it_is(self) -> None:
        weights = torch_weights()
        odd = {name: w.t().contiguous().t() if w.dim() == 2 else w.double() for name, w in weights.items()}
        self.rollout.push_weights(odd)
        self.assert_serves(weights)
        self.rollout.push_weights(weights, dtype=None)
        self.assert_serves(weights, 2, dtype=None)

    @needs_torch
    def test_a_tensor_tied_under_two_names(self) -> None:
        weights = {name: torch.from_numpy(as_float32(tensor).copy()) for name, tensor in other_weights("qwen2").items()}
        self.assertNotIn("lm_head.weight", weights)
        with start("qwen2") as sidecar, sidecar.connect() as client:
            client.push_weights(weights)
            [[expected]] = client.generate([[1, 2, 3]], max_tokens=20, temperature=0)
            module = module_of(weights)
            module.add_module("lm_head", torch.nn.Module())
            module.lm_head.weight = module.model.embed_tokens.weight
            self.assertIn("lm_head.weight", module.state_dict())
            client.push_weights(module)
            [[sample]] = client.generate([[1, 2, 3]], max_tokens=20, temperature=0)
            self.assertEqual(sample.ids.tolist(), expected.ids.tolist())
            self.assertEqual(sample.versions[0].version, 2)

    def test_slices_in_lists_are_served_as_the_whole_tensors(self) -> None:
        draw = random.Random(3)

        def cut(tensor, wrap):
            shape, rows = tensor.shape, tensor.shape[0]
            borders = sorted({0, rows, *(draw.randrange(rows) for _ in range(draw.randrange(4)))})
            slices = [TensorSlice(shape, first, wrap(tensor[first:end])) for first, end in zip(borders, borders[1:])]
            draw.shuffle(slices)
            return slices[0] if len(slices) == 1 else slices

        bits = other_weights("qwen3")
        for version, transport in enumerate(("shared_memory", "inline", "shared_memory"), 1):
            sliced = {name: cut(tensor.bits, BFloat16) for name, tensor in reversed(bits.items())}
            self.assertTrue(any(isinstance(tensor, list) for tensor in sliced.values()))
            self.rollout.push_weights(sliced, transport=transport)
            self.assert_serves(bits, version)
        values = {name: as_float32(tensor) for name, tensor in golden_weights("qwen3").items()}
        mixed = {name: cut(value, lambda rows: rows) if draw.random() < 0.5 else value for name, value in values.items()}
        self.rollout.push_weights(mixed)  # rounded
        self.assert_serves(golden_weights("qwen3"), 4)

    @needs_torch
    def test_slices_of_torch_tensors(self) -> None:
        weights = torch_weights()
        self.rollout.push_weights(
            {name: [TensorSlice(w.shape, 1, w[1:]), TensorSlice(w.shape, 0, w[:1])] for name, w in weights.items()})
        self.assert_serves(weights)

    def test_slices_in_a_file(self) -> None:
        bits = other_weights("qwen3")
        folder = self.temporary_folder()
        sliced: dict = {name: TensorSlice(tensor.bits.shape, 0, tensor) for name, tensor in bits.items()}
        self.rollout.push_weights(sliced, transport="file", folder=folder)
        self.assert_serves(bits)
        norm = sliced["model.norm.weight"]
        sliced["model.norm.weight"] = [TensorSlice(norm.shape, 0, BFloat16(norm.rows.bits[:5])),
            TensorSlice(norm.shape, 5, BFloat16(norm.rows.bits[5:]))]
        with self.assertRaisesRegex(ValueError, "one slice of a tensor, these have several: model.norm.weight"):
            self.rollout.push_weights(sliced, transport="file", folder=folder)

    def test_slices_that_are_not_all_of_a_tensor_are_rejected_with_their_rows(self) -> None:
        weights: dict = dict(other_weights("qwen3"))
        norm = weights["model.norm.weight"].bits
        weights["model.norm.weight"] = [
            TensorSlice(norm.shape, first, BFloat16(norm[first:end])) for first, end in ((0, 8), (7, 9), (12, None))]
        with self.assertRaises(WeightUpdateRejected) as caught:
            self.rollout.push_weights(weights)
        self.assertEqual(
            [(problem.field, problem.message) for problem in caught.exception.problems],
            [("manifest['model.norm.weight']", "rows 7 to 7 are in two slices"),
             ("manifest['model.norm.weight']", "rows 9 to 11 are in no slice")])
        self.assert_serves_the_old_weights()

    def test_a_slice_that_its_tensor_does_not_have_is_refused(self) -> None:
        values = np.zeros((3, 4), np.float32)
        for wrong, what in (
            (TensorSlice((9, 5), 0, values), r"a slice of shape \[3, 4\] of a tensor of shape \[9, 5\]"),
            (TensorSlice((9,), 0, values), "a slice of shape"),
            (TensorSlice((9, 4), 7, values), "a slice of 3 rows from row 7 on, the tensor has 9"),
            (TensorSlice((9, 4), -1, values), "a slice of 3 rows from row -1 on"),
            ([TensorSlice((9, 4), 0, values), TensorSlice((9, 4), 3, values[:0])], "a slice of 0 rows"),
        ):
            with self.assertRaisesRegex(ValueError, f"weights: 'w': {what}"):
                self.rollout.push_weights({"w": wrong})
        with self.assertRaisesRegex(TypeError, "'w' is a list with a ndarray, which is no TensorSlice"):
            self.rollout.push_weights({"w": [values]})

    def test_numpy_arrays_of_every_type(self) -> None:
        bits = other_weights("qwen3")
        self.rollout.push_weights(bits)
        self.assert_serves(bits)
        values = {name: as_float32(tensor) for name, tensor in bits.items()}
        self.rollout.push_weights(values)
        self.assert_serves(bits, 2)
        self.rollout.push_weights(values, dtype=None)
        halves = {name: value.astype(np.float16) for name, value in values.items()}
        self.rollout.push_weights(halves, dtype=None)
        self.assert_serves(halves, 4, dtype=None)

    def test_the_file_is_kept_from_push_to_push_and_gone_with_the_client(self) -> None:
        weights = other_weights("qwen3")
        with in_another_container():
            self.rollout.push_weights(weights, transport="shared_memory")
            [first] = own_files()
            self.rollout.push_weights(weights, transport="shared_memory", policy="drain", mode="staged", version=7, owner="me")
            self.assertEqual(own_files(), [first])
        self.rollout.close()
        self.assertEqual(own_files(), [])

    def test_samples_in_flight_follow_the_policy(self) -> None:
        # Few seats and many samples: they last longer than the push on any machine.
        with start("qwen3", "--max-sequences", "4") as sidecar, sidecar.connect() as client:
            result = []
            thread = threading.Thread(target=lambda: result.extend(client.generate([[1, 2]], n=200, max_tokens=480, seed=1)))
            thread.start()
            eventually(lambda: client.status().generated_tokens > 16, "it draws")
            client.push_weights(other_weights("qwen3"), policy="keep")
            drawn = client.status().generated_tokens
            eventually(lambda: client.status().generated_tokens > drawn + 16, "it draws on")
            client.abort()
            thread.join(60)
        spans = [[span.version for span in sample.versions] for sample in result[0]]
        self.assertIn([0, 1], spans)
        self.assertTrue(all(sample.versions[-1].end == len(sample.ids) for sample in result[0] if sample.versions))

    def test_in_place_and_partial(self) -> None:
        weights = golden_weights("qwen3")
        other = other_weights("qwen3")
        self.assertEqual(self.rollout.push_weights(other, mode="in_place").mode, "in_place")
        self.assert_serves(other)
        some = {name: weights[name] for name in list(weights)[2:5]}
        self.assertEqual(self.rollout.push_weights(some, partial=True, mode="staged").mode, "staged")
        self.assert_serves({**other, **some}, 2)
        with self.assertRaisesRegex(WeightUpdateRejected, "missing"):
            self.rollout.push_weights(some)

    def test_weights_that_slept_are_served_again_after_a_full_push(self) -> None:
        weights = other_weights("qwen3")
        slept = self.rollout.sleep()
        self.assertEqual((slept.state, set(slept.freed), slept.asleep), ("sleeping", {"weights", "kv_cache"}, ("weights", "kv_cache")))
        self.assertEqual(self.rollout.status().asleep, slept.asleep)
        with self.assertRaisesRegex(StateError, "sleep"):
            self.rollout.generate([[1]])
        self.assertEqual(self.rollout.wake_up(), "poisoned")
        with self.assertRaisesRegex(WeightUpdateRejected, "full update"):
            self.rollout.push_weights(dict(list(weights.items())[:1]), partial=True)
        self.rollout.push_weights(weights)
        self.assert_serves(weights)

    def test_a_manifest_that_does_not_fit_is_rejected_with_every_problem(self) -> None:
        weights = golden_weights("qwen3")
        names = list(weights)
        weights["no.such.tensor"] = weights.pop(names[0])
        weights[names[1]] = rollout.BFloat16(np.zeros((2, 3), np.uint16))
        with self.assertRaises(WeightUpdateRejected) as rejected:
            self.rollout.push_weights(weights, base_version=7, version=0)
        fields = " ".join(problem.field for problem in rejected.exception.problems)
        for named in ("no.such.tensor", names[0], names[1], "base_version", "new_version"):
            self.assertIn(named, fields)
        self.assertEqual(own_files(), [])  # no byte was sent
        self.assert_serves_the_old_weights()

    def test_the_version_is_compared_and_set(self) -> None:
        weights = other_weights("qwen3")
        self.rollout.push_weights(weights, version=5)
        with rollout.Rollout(self.sidecar.address) as other:
            self.assertEqual(other.push_weights(weights).version, 6)
        with self.assertRaisesRegex(WeightUpdateRejected, "base_version"):
            self.rollout.push_weights(weights)  # this client was not told of version 6
        self.assertEqual(self.rollout.push_weights(weights).version, 7)  # and now it asks
        with self.assertRaisesRegex(WeightUpdateRejected, "new_version"):
            self.rollout.push_weights(weights, base_version=7, version=7)

    def test_a_second_updater_is_refused_naming_the_first(self) -> None:
        weights = golden_weights("qwen3")
        refusals = []

        def push_meanwhile(first, end, destination):
            """Another trainer tries while this push is in progress."""
            with rollout.Rollout(self.sidecar.address) as second:
                with self.assertRaisesRegex(StateError, "trainer-7") as refused:
                    second.push_weights(weights)
                refusals.append(refused.exception)
            copy(first, end, destination)

        one, *rest = sources(weights, "bfloat16")
        copy = one.copy_rows
        slow = type(one)(one.name, one.dtype, one.shape, push_meanwhile)
        with mock.patch.object(publisher, "sources", side_effect=[[slow, *rest], sources(weights, "bfloat16")]):
            self.rollout.push_weights(weights, owner="trainer-7")
        self.assertEqual(len(refusals), 1)

    def test_arguments_nobody_knows_are_refused(self) -> None:
        weights = golden_weights("qwen3")
        for wrong in ({"policy": "hope"}, {"mode": "fast"}, {"transport": "pigeon"}, {"dtype": "int3"}, {"timeout": 0}):
            with self.assertRaises(ValueError, msg=wrong):
                self.rollout.push_weights(weights, **wrong)
        for wrong in (
            {}, [], {"a": 3}, {"a": np.zeros(3, np.int32), "b": np.zeros(3, np.uint16), "c": np.zeros(3)}, {"a": np.zeros(3, np.uint16)},
        ):
            with self.assertRaises(TypeError, msg=wrong):
                self.rollout.push_weights(wrong)
        with self.assertRaisesRegex(TypeError, "'a' .*int32.*'b' .*BFloat16"):
            self.rollout.push_weights({"a": np.zeros(3, np.int32), "b": np.zeros(3, np.uint16)})
        with self.assertRaisesRegex(TypeError, "float64"):
            self.rollout.push_weights({"a": np.zeros(3)}, dtype=None)
        self.assert_serves_the_old_weights()


class RoundingTests(unittest.TestCase):
    def sent(self, values, dtype="bfloat16"):
        [source] = sources({"x": values}, dtype)
        out = bytearray(source.bytes)
        source.copy_to(lambda start, size: memoryview(out)[start : start + size], lambda piece: None)
        return out

    @needs_torch
    def test_numpy_rounds_as_torch_does(self) -> None:
        bits = np.random.default_rng(1).integers(0, 1 << 32, 300_000, dtype=np.uint32)
        edges = [0, 0x80000000, 0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 1, 0x80000001]
        values = np.concatenate([bits, np.array(edges, np.uint32)]).view(np.float32)
        ours = np.frombuffer(self.sent(values), np.uint16)
        theirs = torch.from_numpy(values.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)
        number = ~np.isnan(values)
        np.testing.assert_array_equal(ours[number], theirs[number])
        self.assertTrue(np.isnan(as_float32(rollout.BFloat16(ours[~number]))).all())

    @needs_torch
    def test_whatever_the_shape_and_the_strides_the_bytes_are_row_major(self) -> None:
        base = torch.randn(37, 1000, 17)
        for tensor in (base, base.permute(2, 0, 1), base[3:9, ::2], base[0, 0, 0], base[:0], base.reshape(-1), base[None]):
            expected = tensor.bfloat16().contiguous().view(-1).view(torch.int16).numpy().tobytes() if tensor.numel() else b""
            self.assertEqual(bytes(self.sent(tensor)), expected)
            self.assertEqual(bytes(self.sent(tensor, None)), tensor.contiguous().numpy().tobytes())
            self.assertEqual(bytes(self.sent(tensor.numpy())), expected)

    def test_a_golden_folder_written_again_is_the_same_model(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            rollout.checkpoint.save(folder, golden_weights("llama"), golden_config("llama"))
            with start(Path(folder)) as sidecar, sidecar.connect() as client:
                again = {name: tensor.digest for name, tensor in client.describe().tensors.items()}
            with start("llama") as sidecar, sidecar.connect() as client:
                self.assertEqual(again, {name: tensor.digest for name, tensor in client.describe().tensors.items()})


if __name__ == "__main__":
    unittest.main()
