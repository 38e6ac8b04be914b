using System.IO.Hashing;
using System.Runtime.InteropServices;
using CsCheck;
using Rollout.Kernels.Cuda;

namespace Rollout.Kernels.Tests.Cuda;

/// <summary>
/// Tensors in device memory are stored as from the host, and their pieces have the host's digests: of any type, length, address and place.
/// </summary>
public sealed class CudaApplyTests
{
    private const int PieceBytes = TensorDigest.PieceBytes;

    // ---- Digests.

    [Fact]
    public void Digests_of_every_short_length_are_those_of_the_host()
    {
        using Bench bench = new();
        int[] lengths = [.. Enumerable.Range(1, 300), .. AroundMultiples(1024, 1, 2, 3, 16, 127), .. AroundMultiples(64, 17, 31, 33)];
        Gen.Select(Gen.Int[0, 15], Gen.Int).Sample(
            (shift, seed) => bench.DigestsAreTheHosts([.. lengths.Select(length => (length, shift))], seed), iter: 4, threads: 1);

        static IEnumerable<int> AroundMultiples(int unit, params int[] multiples)
            => multiples.SelectMany(multiple => Enumerable.Range((multiple * unit) - 2, 5));
    }

    [Fact]
    public void Digests_of_tensors_of_many_pieces_are_those_of_the_host()
    {
        using Bench bench = new();
        bench.DigestsAreTheHosts(
            [(PieceBytes, 0), (PieceBytes - 1, 8), (PieceBytes + 1, 1), ((3 * PieceBytes) + 240, 2), (2 * PieceBytes, 4)], seed: 3);
    }

    /// <summary>An element is read once, whatever is done with it. Besides, each thread reads its piece's entries of the table.</summary>
    [Fact]
    public void Bytes_are_read_once()
    {
        SimulatedDevice.RequireSimulated();
        using Bench bench = new();
        const int Bytes = PieceBytes + 5000, Pieces = 2, Threads = 256, Entry = 24;
        using DeviceBuffer source = bench.Backend.Device.AllocateZeroed(Bytes), destination = bench.Backend.Device.AllocateZeroed(Bytes);
        long hashed = Read([]), stored = Read([new CudaApply.Range(0, Bytes / 2, destination.Pointer, false, 2)]);
        Assert.Equal(Bytes + (Pieces * Threads * Entry), hashed);
        Assert.InRange(stored, Bytes, hashed + (Pieces * Threads * Entry));

        long Read(CudaApply.Range[] ranges)
        {
            SimulatedDevice.Counters before = SimulatedDevice.Count();
            _ = bench.Run(apply => apply.Add(source.Pointer, Bytes, DType.BFloat16, ranges));
            return (SimulatedDevice.Count() - before).ReadBytes;
        }
    }

    // ---- Stores.

    /// <summary>Where one tensor's elements go: to parts of weights, which other tensors fill around them.</summary>
    private sealed record Place(int First, int Count, bool IsVector, int Before, int After);

    private static readonly Gen<Place[]> s_places =
        Gen.Select(Gen.Int[0, 3], Gen.Int[1, 3000], Gen.Bool, Gen.Int[0, 20], Gen.Int[0, 20]).Array[1, 4].Select(places =>
        {
            int next = 0;
            return places.Select(place =>
            {
                (int gap, int count, bool isVector, int before, int after) = place;
                Place found = new(next + gap, count, isVector, before, after);
                next += gap + count;
                return found;
            }).ToArray();
        });

    [Theory]
    [InlineData(WeightFormat.BFloat16)]
    [InlineData(WeightFormat.Float32)]
    public void Elements_are_stored_as_from_the_host(WeightFormat format)
    {
        using Bench bench = new(format);
        Gen.Select(Gen.Select(s_places, Gen.Enum<DType>(), Gen.Int[0, 15], Gen.Int[0, 40]).Array[1, 6], Gen.Int).Sample(
            (tensors, seed) =>
            {
                Random random = new(seed);
                List<byte[]> expected = [];
                List<Action> checks = [];
                List<IDisposable> owned = [];
                byte[] digests = bench.Run(apply =>
                {
                    foreach ((Place[] places, DType type, int shift, int after) in tensors)
                    {
                        // Now and then across a piece's border, which no place need respect.
                        int skipped = random.Next(3) == 0 ? (PieceBytes / type.Size()) - 100 : 0;
                        byte[] values = Values(random, type, skipped + places[^1].First + places[^1].Count + after);
                        DeviceBuffer source = bench.Backend.Device.Allocate(shift + values.Length);
                        owned.Add(source);
                        bench.Backend.Device.Upload(source.Pointer + (nuint)shift, values);
                        for (int at = 0; at < values.Length; at += PieceBytes)
                            expected.Add(XxHash128.Hash(values.AsSpan(at, Math.Min(PieceBytes, values.Length - at))));
                        CudaApply.Range[] ranges = [.. places.Select(place => bench.Place(place, skipped, values, type, checks, owned))];
                        apply.Add(source.Pointer + (nuint)shift, values.Length, type, ranges);
                    }
                });
                Assert.Equal(expected.SelectMany(digest => digest), digests);
                checks.ForEach(check => check());
                owned.ForEach(one => one.Dispose());
            },
            iter: 40,
            threads: 1);
    }

    /// <summary>As many as the experts of a large model, and weights of one: each with a place of its own.</summary>
    [Fact]
    public void Eighteen_thousand_tensors_are_one_launch_and_later_ones_take_no_memory()
    {
        SimulatedDevice.RequireSimulated();
        const int Tensors = 18_000, Elements = 48;
        using Bench bench = new();
        byte[] values = Values(new Random(8), DType.Float32, Tensors * Elements);
        using DeviceBuffer source = bench.Backend.Device.Allocate(values.Length);
        bench.Backend.Device.Upload(source.Pointer, values);
        using Weight written = bench.Backend.AllocateWeight(Tensors, Elements), expected = bench.Backend.AllocateWeight(Tensors, Elements);
        SimulatedDevice.Counters cost = default;
        for (int time = 0; time < 2; time++)
        {
            SimulatedDevice.Counters before = SimulatedDevice.Count();
            byte[] digests = bench.Run(apply =>
            {
                for (int t = 0; t < Tensors; t++)
                {
                    nuint to = ((CudaWeight)written).Pointer + (nuint)(t * Elements * sizeof(ushort));
                    apply.Add(source.Pointer + (nuint)(t * Elements * sizeof(float)), Elements * sizeof(float), DType.Float32,
                        [new CudaApply.Range(0, Elements, to, false, sizeof(ushort))]);
                }
            });
            cost = SimulatedDevice.Count() - before;
            Assert.Equal(XxHash128.Hash(values.AsSpan(^(Elements * sizeof(float))..)), digests[^16..]);
        }

        Assert.Equal((1, 0, 1), (cost.Launches, cost.Allocations, cost.Synchronisations));
        bench.Backend.WriteWeight(expected, 0, values, DType.Float32);
        Assert.Equal(Bench.Read(bench.Backend, expected), Bench.Read(bench.Backend, written));
    }

    private static byte[] Values(Random random, DType type, int elements)
    {
        byte[] bytes = new byte[elements * type.Size()];
        random.NextBytes(bytes); // infinities and not-a-numbers among them
        return bytes;
    }

    private sealed class Bench : IDisposable
    {
        private readonly CudaKernels _kernels;
        private readonly CudaApply _apply;

        public Bench(WeightFormat format = WeightFormat.BFloat16)
        {
            SimulatedDevice.Require();
            Backend = new CudaBackend(0, format);
            _kernels = new CudaKernels(Backend.Device, Backend.StoresFp32);
            _apply = new CudaApply(Backend.Device, _kernels);
        }

        public CudaBackend Backend { get; }

        public byte[] Run(Action<CudaApply> add)
        {
            _apply.Clear();
            Backend.Device.MakeCurrent();
            add(_apply);
            lock (Backend.Device.Copies)
                return _apply.Run();
        }

        public void DigestsAreTheHosts((int Length, int Shift)[] tensors, int seed)
        {
            byte[] bytes = Values(new Random(seed), DType.BFloat16, (tensors.Max(tensor => tensor.Length) + 17) / 2);
            using DeviceBuffer memory = Backend.Device.Allocate(bytes.Length);
            Backend.Device.Upload(memory.Pointer, bytes);
            byte[] digests = Run(apply =>
            {
                foreach ((int length, int shift) in tensors)
                    apply.Add(memory.Pointer + (nuint)shift, length, DType.BFloat16, []);
            });
            byte[][] expected = [.. tensors.SelectMany(tensor => bytes.AsSpan(tensor.Shift, tensor.Length).ToArray().Chunk(PieceBytes))
                .Select(piece => XxHash128.Hash(piece))];
            Assert.Equal(expected.Length * 16, digests.Length);
            for (int i = 0; i < expected.Length; i++)
                Assert.True(expected[i].AsSpan().SequenceEqual(digests.AsSpan(16 * i, 16)), $"tensor or piece {i}, seed {seed}");
        }

        /// <summary>A weight with the place in it, and its twin, which the host writes: both are equal in the end, all of them.</summary>
        public CudaApply.Range Place(
            Place place, int skipped, byte[] values, DType type, List<Action> checks, List<IDisposable> owned)
        {
            int elements = place.Before + place.Count + place.After;
            // A matrix has at least two rows; the rows' lengths do not matter here.
            int outputs = place.IsVector ? 1 : 2, inputs = place.IsVector ? elements : (elements + 1) / 2;
            Weight written = Backend.AllocateWeight(outputs, inputs), expected = Backend.AllocateWeight(outputs, inputs);
            owned.AddRange([written, expected]);
            float[] before = new float[outputs * inputs];
            Array.Fill(before, 3.5f);
            foreach (Weight weight in (Weight[])[written, expected])
                Backend.WriteWeight(weight, 0, MemoryMarshal.AsBytes<float>(before), DType.Float32);
            int first = (skipped + place.First) * type.Size();
            Write(expected, place.Before, values.AsSpan(first, place.Count * type.Size()), type);
            checks.Add(() => Assert.Equal(Bits(Read(Backend, expected), type), Bits(Read(Backend, written), type)));
            CudaWeight to = (CudaWeight)written;
            int stored = to.IsVector ? sizeof(float) : Backend.StoredBytes;
            return new CudaApply.Range(
                skipped + place.First, place.Count, to.Pointer + (nuint)(place.Before * stored), to.IsVector, stored);
        }

        /// <summary>From any element on, where <see cref="Kernels.Backend.WriteWeight"/> takes whole rows.</summary>
        private void Write(Weight weight, int element, ReadOnlySpan<byte> values, DType type)
        {
            uint[] indices = [.. Enumerable.Range(0, values.Length / type.Size()).Select(i => (uint)i)];
            if (type == DType.BFloat16 || weight.IsVector || Backend.StoresFp32)
                WriteRaw(weight, element, values, type);
            else
                Backend.WriteWeightElements(weight, element, indices, values, type);
        }

        /// <summary>Values that are stored without rounding keep their bits, a not-a-number's too.</summary>
        private void WriteRaw(Weight weight, int element, ReadOnlySpan<byte> values, DType type)
        {
            CudaWeight to = (CudaWeight)weight;
            int stored = to.IsVector ? sizeof(float) : Backend.StoredBytes;
            byte[] bytes = values.ToArray();
            if (stored == sizeof(float) && type != DType.Float32)
            {
                ushort[] halves = MemoryMarshal.Cast<byte, ushort>(bytes).ToArray();
                float[] wide = [.. halves.Select(half => type == DType.BFloat16
                    ? BitConverter.UInt32BitsToSingle((uint)half << 16)
                    : (float)BitConverter.UInt16BitsToHalf(half))];
                bytes = MemoryMarshal.AsBytes<float>(wide).ToArray();
            }

            Backend.Device.Upload(to.Pointer + (nuint)(element * stored), bytes);
        }

        public static float[] Read(CudaBackend backend, Weight weight)
        {
            float[] values = new float[weight.Outputs * weight.Inputs];
            backend.ReadWeight(weight, 0, values);
            return values;
        }

        /// <summary>A not-a-number of fp16 becomes one of fp32, with which bits is not promised.</summary>
        private static uint[] Bits(float[] values, DType type) => [.. values.Select(
            value => float.IsNaN(value) && type == DType.Float16 ? 0x7fc00000u : BitConverter.SingleToUInt32Bits(value))];

        public void Dispose()
        {
            _apply.Dispose();
            _kernels.Dispose();
            Backend.Dispose();
        }
    }
}
