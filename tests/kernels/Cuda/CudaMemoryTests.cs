using Rollout.Kernels.Cuda;

namespace Rollout.Kernels.Tests.Cuda;

/// <summary>Tests that check the device's free memory run alone: others allocate from it.</summary>
[CollectionDefinition(nameof(AloneOnTheDevice), DisableParallelization = true)]
public sealed class AloneOnTheDevice;

/// <summary>Device memory that is discarded and restored keeps its addresses.</summary>
[Collection(nameof(AloneOnTheDevice))]
public sealed class CudaMemoryTests
{
    /// <summary>Frees now what earlier tests left to finalizers, not between two checks of the free memory.</summary>
    public CudaMemoryTests()
    {
        GC.Collect();
        GC.WaitForPendingFinalizers();
    }

    [Theory]
    [InlineData(WeightFormat.BFloat16)]
    [InlineData(WeightFormat.Float32)]
    public void Weights_of_an_arena_lie_in_one_range_that_stays_when_the_memory_goes(WeightFormat format)
    {
        SimulatedDevice.Require();
        using CudaBackend backend = new(0, format);
        long free = backend.Device.FreeBytes;
        using WeightArena arena = backend.AllocateWeights([(100, 33), (1, 77), (3, 5), (1, 1), (257, 64)]);
        CudaWeight[] weights = [.. arena.Weights.Cast<CudaWeight>()];
        nuint[] places = [.. weights.Select(weight => weight.Pointer)];
        for (int i = 0; i < weights.Length; i++)
        {
            Assert.Equal(0u, places[i] % 256);
            nuint end = i + 1 < weights.Length ? places[i + 1] : places[0] + (nuint)arena.Bytes;
            Assert.InRange(places[i] + (nuint)weights[i].Bytes, places[i], end);
        }

        float[] values = [.. Enumerable.Range(0, 77).Select(i => (float)i)], read = new float[77];
        backend.WriteWeight(weights[1], 0, System.Runtime.InteropServices.MemoryMarshal.AsBytes<float>(values), DType.Float32);
        backend.ReadWeight(weights[1], 0, read);
        Assert.Equal(values, read);
        Assert.InRange(backend.Device.FreeBytes, 0, free - arena.Bytes);

        arena.Discard();
        Assert.Equal(free, backend.Device.FreeBytes);
        Assert.Throws<ArgumentException>(() => backend.ReadWeight(weights[1], 0, read));
        arena.Restore();
        Assert.Equal(places, weights.Select(weight => weight.Pointer));
        backend.ReadWeight(weights[1], 0, read);
        Assert.Equal(new float[77], read);
        Assert.Throws<InvalidOperationException>(weights[0].Discard);
    }

    [Fact]
    public void Memory_that_the_device_has_not_got_is_refused_and_none_is_held()
    {
        SimulatedDevice.Require();
        using CudaBackend backend = new(0);
        long free = backend.Device.FreeBytes;
        Assert.Throws<OutOfMemoryException>(() => backend.AllocateWeights([(1 << 20, 1 << 20), (8, 8)]));
        Assert.Equal(free, backend.Device.FreeBytes);

        using WeightArena arena = backend.AllocateWeights([(1 << 12, 1 << 10)]);
        arena.Discard();
        CUmemAllocationProp prop = new()
        {
            type = CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED,
            location = new() { type = CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE },
        };
        nuint others = (nuint)((backend.Device.FreeBytes - (1 << 20)) / (2 << 20) * (2 << 20));
        Driver.cuMemCreate(out ulong taken, others, prop, 0).ThrowIfFailed();
        Assert.Throws<OutOfMemoryException>(arena.Restore);
        Driver.cuMemRelease(taken).ThrowIfFailed();
        arena.Restore();
    }

    /// <summary>
    /// Keys and values, and activations in both forms, are discarded like weights: no memory stays allocated, and all but the rope table
    /// are zero when restored.
    /// </summary>
    [Fact]
    public void Every_kind_of_memory_comes_back_where_it_was()
    {
        SimulatedDevice.Require();
        using CudaBackend backend = new(0);
        long free = backend.Device.FreeBytes;
        using CudaKvCache cache = (CudaKvCache)new Bench(backend).Cache(2, 3, 1, 16);
        using CudaTensor tensor = (CudaTensor)backend.AllocateTensor(5, 7);
        using CudaRopeTable rope = (CudaRopeTable)backend.AllocateRopeTable([1f, 0.5f], 9);
        nuint[] Places() => [cache.Keys(0), cache.Values(1), tensor.Fp32, tensor.Rounded, rope.Pointer];
        nuint[] before = Places();
        byte[] angles = Bytes(rope.Pointer, rope.Bytes), ones = new byte[cache.Bytes];
        Array.Fill(ones, (byte)1);
        tensor.Write(5, [.. Enumerable.Repeat(1f, 35)]);
        backend.Device.Upload(tensor.Rounded, ones.AsSpan(0, 70));
        backend.Device.Upload(cache.Keys(0), ones);
        for (int i = 0; i < 2; i++)
        {
            foreach (DeviceMemory memory in (DeviceMemory[])[cache, tensor, rope])
                memory.Discard();
            Assert.Equal(free, backend.Device.FreeBytes);
            foreach (DeviceMemory memory in (DeviceMemory[])[rope, tensor, cache])
                memory.Restore();
            Assert.Equal(before, Places());
            Assert.Equal(angles, Bytes(rope.Pointer, rope.Bytes));
            Assert.All(Bytes(cache.Keys(0), cache.Bytes), value => Assert.Equal(0, value));
            Assert.All(Bytes(tensor.Rounded, 70), value => Assert.Equal(0, value));
            Assert.All(Bench.Read(tensor, 5), value => Assert.Equal(0f, value));
        }

        foreach (DeviceMemory memory in (DeviceMemory[])[cache, tensor, rope])
            memory.Dispose();
        Assert.Equal(free, backend.Device.FreeBytes);

        byte[] Bytes(nuint place, long count)
        {
            byte[] read = new byte[count];
            backend.Device.Download(place, read);
            return read;
        }
    }

    /// <summary>An operation may leave a tensor in another form than a write from the host.</summary>
    [Fact]
    public void What_is_written_into_a_tensor_is_read_whatever_was_in_it()
    {
        SimulatedDevice.Require();
        using CudaBackend backend = new(0);
        Bench bench = new(backend);
        Tensor tensor = backend.AllocateTensor(2, 16), next = backend.AllocateTensor(2, 16);
        Weight scale = bench.Weight(1, 16);
        backend.RmsNorm(bench.Tensor(2, 16), scale, 1e-6f, tensor, 2);
        float[] values = bench.Values(32), expected = new float[32];
        tensor.Write(2, values);
        Assert.Equal(values, Bench.Read(tensor, 2));
        backend.RmsNorm(bench.Tensor(16, values), scale, 1e-6f, next, 2);
        next.Read(2, expected);
        backend.RmsNorm(bench.Tensor(2, 16), scale, 1e-6f, tensor, 2);
        tensor.Write(2, values);
        backend.RmsNorm(tensor, scale, 1e-6f, next, 2);
        Assert.Equal(expected, Bench.Read(next, 2));
    }

    /// <summary>All numbers of fp16, and roundings of fp32 to bf16 around every kind of number: ties, infinities and NaN.</summary>
    [Theory]
    [InlineData(WeightFormat.BFloat16)]
    [InlineData(WeightFormat.Float32)]
    public void Every_number_of_fp16_and_every_border_of_bf16_is_converted_as_the_host_does(WeightFormat format)
    {
        SimulatedDevice.Require();
        using CudaBackend backend = new(0, format);
        ushort[] halves = [.. Enumerable.Range(0, 1 << 16).Select(i => (ushort)i)];
        float[] numbers =
        [
            .. from upper in Enumerable.Range(0, 1 << 9)
               from lower in (uint[])[0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x10000, 0x17FFF, 0x18000, 0x18001, 0x7FFFFF]
               select BitConverter.UInt32BitsToSingle(((uint)upper << 23) | lower),
        ];
        foreach ((byte[] source, float[] values, DType type) in ((byte[], float[], DType)[])
        [
            (System.Runtime.InteropServices.MemoryMarshal.AsBytes<ushort>(halves).ToArray(),
            [.. halves.Select(bits => (float)BitConverter.UInt16BitsToHalf(bits))], DType.Float16),
            (System.Runtime.InteropServices.MemoryMarshal.AsBytes<float>(numbers).ToArray(), numbers, DType.Float32),
        ])
        {
            foreach (int outputs in (int[])[1, 2])
            {
                using Weight weight = backend.AllocateWeight(outputs, values.Length / outputs);
                float[] read = new float[values.Length];
                backend.WriteWeight(weight, 0, source, type);
                backend.ReadWeight(weight, 0, read);
                for (int i = 0; i < values.Length; i++)
                    Check(values[i], outputs > 1 && format == WeightFormat.BFloat16, read[i]);
            }
        }

        static void Check(float value, bool rounded, float found)
        {
            uint bits = BitConverter.SingleToUInt32Bits(value);
            if (rounded && !float.IsNaN(value))
                bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000;
            if (float.IsNaN(value) ? !float.IsNaN(found) : bits != BitConverter.SingleToUInt32Bits(found))
                Assert.Fail($"{value:R} became {found:R}.");
        }
    }
}
