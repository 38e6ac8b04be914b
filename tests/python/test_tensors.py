"""For any strides, type and shape, the bytes sent are those of a C-ordered copy."""

from __future__ import annotations

import itertools
import json
import random
import struct
import tempfile
import unittest
from pathlib import Path

import numpy as np
from support import torch

import rollout
from rollout.weights.digest import TensorDigest, combine, xxhash
from rollout.weights.layout import PayloadLayout
from rollout.weights.tensors import TensorSource, sources

VIEWS = {
    "as it is": lambda a: a,
    "in Fortran's order": np.asfortranarray,
    "transposed": lambda a: a.T,
    "permuted": lambda a: a.transpose(1, 2, 0),
    "a transposed matrix": lambda a: a[2].T,
    "negative strides": lambda a: a[::-1, :, ::-1],
    "every second": lambda a: a[::2, 1::3],
    "a slice of the middle": lambda a: a[1:6, 2:, 1:3],
    "a column": lambda a: a[:, 3, 2],
    "a row backwards": lambda a: a[2, 1, ::-1],
    "broadcast": lambda a: np.broadcast_to(a[:, :1], (7, 4, 5)),
    "broadcast in front": lambda a: np.broadcast_to(a[0], (3, 6, 5)),
    "0-d": lambda a: a[4:5, 3, 2].reshape(()),
    "0-d of a view": lambda a: a[::-1][4, 3, 2:3].reshape(()),
    "one element": lambda a: a[4:5, 3:4, 2:3],
    "none": lambda a: a[:, :0],
    "one row more": lambda a: a[None],
    "read only": lambda a: _read_only(a.T),
}

TORCH_VIEWS = {
    "as it is": lambda t: t,
    "transposed": lambda t: t.transpose(0, 2),
    "permuted": lambda t: t.permute(1, 2, 0),
    "a transposed matrix": lambda t: t[2].t(),
    "rows behind the start": lambda t: t[3:5],
    "every second": lambda t: t[::2, 1::3],
    "a column": lambda t: t[:, 3, 2],
    "broadcast": lambda t: t[:, :1].expand(7, 4, 5),
    "a diagonal": lambda t: t[0, :5, :5].diagonal(),
    "0-d": lambda t: t[4, 3, 2],
    "none": lambda t: t[:, :0],
    "a window": lambda t: t.reshape(-1).as_strided((4, 3), (5, 2), 7),
}


def _read_only(array):
    array.flags.writeable = False
    return array


def plain(array) -> list:
    """The elements in C order, by index, independently of strides."""
    return [array[index] for index in np.ndindex(array.shape)]


def bfloat16(value: float) -> bytes:
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    return struct.pack("<H", (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)


def sent(values, dtype="bfloat16") -> tuple[TensorSource, bytes]:
    [source] = sources({"x": values}, dtype)
    out, end = bytearray(source.bytes), 0

    def place(start, size):
        nonlocal end
        assert (start, 0 < size <= source.piece_bytes) == (end, True), (start, size, end, source.piece_bytes)
        end += size
        return memoryview(out)[start:end]

    source.copy_to(place, lambda piece: None)
    assert end == source.bytes
    return source, bytes(out)


class LooksLikeMlDtypes(np.ndarray):
    """An array as ml_dtypes makes them: of a type called bfloat16 that views as uint16. NumPy takes new types from C alone."""

    class DType:
        name, kind = "bfloat16", "V"

    dtype = property(lambda self: self.DType())

    def view(self, dtype):
        return np.ndarray.view(self, np.ndarray).view(dtype)


class ArrayTests(unittest.TestCase):
    def assert_sends(self, what, values, shape, kind, expected, dtype="bfloat16") -> None:
        with self.subTest(what, kind=kind, dtype=dtype):
            source, content = sent(values, dtype)
            self.assertEqual((source.shape, source.dtype, source.bytes), (tuple(shape), kind, len(expected)))
            self.assertTrue(content == expected, "other bytes than those of a C-ordered copy")

    def test_arrays_of_every_type_and_order(self) -> None:
        numbers = (np.arange(7 * 6 * 5) - 100.3).reshape(7, 6, 5)
        for what, view in VIEWS.items():
            single, half, double = view(numbers.astype(np.float32)), view(numbers.astype(np.float16)), view(numbers)
            bits = view((numbers.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16))
            of_bits = b"".join(struct.pack("<H", b) for b in plain(bits))
            self.assert_sends(what, rollout.BFloat16(bits), bits.shape, "BF16", of_bits)
            self.assert_sends(what, rollout.BFloat16(bits), bits.shape, "BF16", of_bits, None)
            self.assert_sends(what, bits.view(LooksLikeMlDtypes), bits.shape, "BF16", of_bits)
            self.assert_sends(what, single, single.shape, "F32", b"".join(struct.pack("<f", x) for x in plain(single)), None)
            self.assert_sends(what, half, half.shape, "F16", b"".join(struct.pack("<e", x) for x in plain(half)), None)
            for values in (single, half, double):
                self.assert_sends(what, values, values.shape, "BF16", b"".join(map(bfloat16, plain(values))))

    def test_arrays_of_ml_dtypes(self) -> None:
        try:
            from ml_dtypes import bfloat16 as ml_bfloat16
        except ImportError:
            self.skipTest("ml_dtypes is not installed")
        values = np.arange(210).reshape(7, 6, 5).astype(ml_bfloat16)
        for what, view in VIEWS.items():
            array = view(values)
            self.assert_sends(what, array, array.shape, "BF16", b"".join(bfloat16(float(x)) for x in plain(array)))

    def test_rows_longer_and_shorter_than_a_piece(self) -> None:
        for shape in ((3, 700_000), (2_100_000,), (5, 524_288), (4, 524_287), (524_289, 4), (1, 1, 600_000)):
            values = np.arange(np.prod(shape), dtype=np.uint32).astype(np.uint16).reshape(shape)
            for order in (values, np.asfortranarray(values)):
                self.assert_sends(f"{shape}", rollout.BFloat16(order), shape, "BF16", values.astype("<u2").tobytes())

    def test_rounding_is_to_nearest_ties_to_even(self) -> None:
        edges = [0, 1 << 31, 0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7FFFFF, 0x7F7F7FFF, 0x7F800000, 0xFF800000, 1, 0x80000001]
        bits = np.concatenate([np.array(edges, np.uint32), np.random.default_rng(1).integers(0, 0x7F800000, 5000, dtype=np.uint32)])
        values = bits.view(np.float32)
        self.assertEqual(sent(values)[1], b"".join(bfloat16(x) for x in values))
        for nan in (0x7F800001, 0xFFFFFFFF, 0x7FC00000, 0xFF808000):
            content = np.frombuffer(sent(np.array([nan, 0x3F800000], np.uint32).view(np.float32))[1], np.uint16)
            self.assertGreater(content[0] & 0x7FFF, 0x7F80)
            self.assertEqual(content[1], 0x3F80)

    def test_bits_of_another_type_are_refused(self) -> None:
        for wrong in (np.int16, np.uint32, np.float16, ">u2"):
            with self.assertRaises(TypeError):
                rollout.BFloat16(np.zeros(3, wrong))


@unittest.skipIf(torch is None, "torch is not installed")
class TorchTests(unittest.TestCase):
    def test_tensors_of_every_type_order_and_with_gradients(self) -> None:
        numbers = torch.arange(7 * 6 * 5, dtype=torch.float64).reshape(7, 6, 5) - 100.3
        kinds = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
        for (what, view), dtype, gradient in itertools.product(TORCH_VIEWS.items(), [*kinds, torch.float64], (False, True)):
            with self.subTest(what, dtype=dtype, gradient=gradient):
                tensor = view(numbers.to(dtype).clone().requires_grad_(gradient))
                # Through Python numbers, independently of strides.
                copy = torch.tensor(tensor.tolist(), dtype=torch.float64).reshape(tensor.shape).to(dtype)
                for asked, kind in (("bfloat16", torch.bfloat16), (None, dtype)):
                    if kind not in kinds:
                        continue
                    source, content = sent(tensor, asked)
                    expected = b"".join(
                        struct.pack("<f", x) if kind is torch.float32 else struct.pack("<e", x) if kind is torch.float16 else bfloat16(x)
                        for x in copy.to(kind).reshape(-1).tolist())
                    self.assertEqual((source.shape, source.dtype), (tuple(tensor.shape), kinds[kind]))
                    self.assertTrue(content == expected, "other bytes than those of a C-ordered copy")

    def test_a_module_is_its_parameters_and_persistent_buffers_by_their_full_names(self) -> None:
        class Inner(torch.nn.Module):
            def __init__(self):
                super().__init__()
                fused = torch.arange(12.0).reshape(4, 3)
                self.gate, self.up = torch.nn.Parameter(fused[:2]), torch.nn.Parameter(fused[2:], requires_grad=False)
                self.register_buffer("kept", torch.full((2,), 7.0))
                self.register_buffer("scratch", torch.zeros(9), persistent=False)

        module = torch.nn.Module()
        module.embed, module.layers = torch.nn.Embedding(4, 2), torch.nn.ModuleList([Inner(), Inner()])
        module.head = torch.nn.Linear(2, 4, bias=False)
        module.head.weight = module.embed.weight
        found = {source.name: source for source in sources(module, None)}
        inner = ["gate", "up", "kept"]
        self.assertEqual(sorted(found), sorted(["embed.weight", "head.weight", *(f"layers.{i}.{name}" for i in (0, 1) for name in inner)]))
        # Parameters that share a storage are read each from its own place.
        self.assertEqual(sent(module.layers[0].gate, None)[1], struct.pack("<6f", *range(6)))
        self.assertEqual(sent(module.layers[0].up, None)[1], struct.pack("<6f", *range(6, 12)))
        self.assertEqual(sent(module.embed.weight)[1], sent(module.head.weight)[1])

    def test_what_a_push_reads_is_what_the_tensor_holds_then(self) -> None:
        tensor = torch.zeros(3)
        [source] = sources({"x": tensor}, None)
        tensor += 2
        out = bytearray(12)
        source.copy_to(lambda start, size: memoryview(out)[start : start + size], lambda piece: None)
        self.assertEqual(out, struct.pack("<3f", 2, 2, 2))


class LayoutTests(unittest.TestCase):
    def test_tensors_never_overlap_and_gaps_are_smaller_than_the_alignment(self) -> None:
        draw = random.Random(1)
        for _ in range(200):
            counts = [draw.choice([draw.randint(0, 3), draw.randint(125, 131), draw.randint(253, 259)]) for _ in range(draw.randint(1, 8))]
            tensors = [TensorSource(f"t{i}", draw.choice(["BF16", "F16", "F32"]), (count, 1), None) for i, count in enumerate(counts)]
            layout, end = PayloadLayout(tensors), 0
            for tensor, entry, offset in zip(tensors, layout.manifest, layout.offsets, strict=True):
                self.assertEqual((entry.offset, entry.name, tuple(entry.shape), offset % 256), (offset, tensor.name, tensor.shape, 0))
                self.assertTrue(end <= offset < end + 256)
                end = offset + tensor.bytes
            self.assertEqual(layout.payload_bytes, end)

    def test_a_layout_fits_the_same_names_types_and_shapes_in_the_same_order_only(self) -> None:
        def tensors(*more):
            return [TensorSource(name, dtype, shape, None) for name, dtype, shape in [("a", "BF16", (4, 2)), *more]]

        layout = PayloadLayout(tensors(("b", "F32", (3,))))
        self.assertTrue(layout.fits(tensors(("b", "F32", (3,)))))
        for other in (
            [("c", "F32", (3,))], [("b", "BF16", (3,))], [("b", "F32", (3, 1))], [("b", "F32", (4,))], [], [("b", "F32", (3,))] * 2,
        ):
            self.assertFalse(layout.fits(tensors(*other)), other)
        self.assertFalse(layout.fits(tensors(("b", "F32", (3,)))[::-1]))

        def of_slices(*cuts):
            return [TensorSource("a", "BF16", (9, 2), None, first_row=first, rows=rows) for first, rows in cuts]

        layout = PayloadLayout(of_slices((0, 4), (4, 5)))
        self.assertEqual([tensor.bytes for tensor in of_slices((0, 4), (4, 5))], [16, 20])
        self.assertEqual([(entry.first_row, entry.rows) for entry in layout.manifest], [(0, 4), (4, 5)])
        self.assertTrue(layout.fits(of_slices((0, 4), (4, 5))))
        for other in (((4, 5), (0, 4)), ((0, 4), (5, 5)), ((0, 5), (5, 4))):
            self.assertFalse(layout.fits(of_slices(*other)), other)

    @unittest.skipIf(xxhash is None, "xxhash is not installed")
    def test_digests_have_the_canonical_byte_order(self) -> None:
        """The values that xxHash's own test vectors give."""
        self.assertEqual(xxhash.xxh3_128_digest(b"abc").hex(), "06b05ab6733a618578af5f94892f3950")
        digest = TensorDigest()
        self.assertEqual(digest.digest(), combine([]))
        digest.update(memoryview(b"a"))
        digest.update(memoryview(b"bc"))
        self.assertEqual(digest.digest(), xxhash.xxh3_128_digest(xxhash.xxh3_128_digest(b"abc")))
        self.assertEqual(combine([digest.digest()] * 2), xxhash.xxh3_128_digest(digest.digest() * 2))
        self.assertEqual(combine([digest.digest(), b""]), b"")

    @unittest.skipIf(xxhash is None, "xxhash is not installed")
    def test_the_digest_of_a_tensor_is_as_defined(self) -> None:
        """The test vectors of DEFINITIONS.md."""
        for length, expected in (
            (0, "99aa06d3014798d86001c324468d497f"),
            (1, "d4bb14079dface434a09d02574c507f7"),
            (131_072, "7b8c03a20d3d9943c5e068d15eab05ae"),
            (131_073, "69ace5a8cdf84f681035e1c21cbc9d3a"),
            (1_000_003, "0248dbd5dc7476f99f672cc9bf9ef022"),
        ):
            tensor = memoryview(((np.arange(length, dtype=np.int64) * 31 + 7) % 251).astype(np.uint8).tobytes())
            for cut in (1 << 20, 131_072, 99_991, 240):
                digest = TensorDigest()
                for at in range(0, length, cut):
                    digest.update(tensor[at : at + cut])
                self.assertEqual(digest.digest().hex(), expected, (length, cut))


class CheckpointTests(unittest.TestCase):
    def test_a_folder_holds_what_a_push_would_send(self) -> None:
        numbers = (np.arange(7 * 6 * 5) - 100.3).reshape(7, 6, 5).astype(np.float32)
        weights = {what: np.array(view(numbers), copy=False) for what, view in VIEWS.items()}
        weights["bits"] = rollout.BFloat16(np.arange(6, dtype=np.uint16).reshape(2, 3).T)
        for dtype in ("bfloat16", None):
            with self.subTest(dtype=dtype), tempfile.TemporaryDirectory() as folder:
                made = rollout.checkpoint.save(Path(folder, "new"), weights, {"model_type": "qwen3"}, dtype=dtype)
                self.assertEqual(json.loads((made / "config.json").read_text()), {"model_type": "qwen3"})
                data = (made / "model.safetensors").read_bytes()
                start = 8 + int.from_bytes(data[:8], "little")
                self.assertEqual(start % 8, 0)
                header, end = json.loads(data[8:start]), 0
                self.assertEqual(list(header), ["__metadata__", *weights])
                for name, values in weights.items():
                    source, content = sent(values, dtype)
                    entry = header[name]
                    self.assertEqual((entry["dtype"], tuple(entry["shape"]), entry["data_offsets"][0]), (source.dtype, source.shape, end))
                    end = entry["data_offsets"][1]
                    self.assertEqual(data[start + entry["data_offsets"][0] : start + end], content, name)
                self.assertEqual(len(data), start + end)


if __name__ == "__main__":
    unittest.main()
