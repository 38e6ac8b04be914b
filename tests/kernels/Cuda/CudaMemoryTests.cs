using Rollout.Kernels.Cuda;

namespace Rollout.Kernels.Tests.Cuda;

/// <summary>Memory of the device apart from its addresses: given back and taken again, it is where it was.</summary>
public sealed class CudaMemoryTests
{
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

    /// <summary>Keys and values, and activations in both their forms, sleep like weights.</summary>
    [Fact]
    public void Every_kind_of_memory_comes_back_where_it_was()
    {
        SimulatedDevice.Require();
        using CudaBackend backend = new(0);
        using CudaKvCache cache = (CudaKvCache)backend.AllocateKvCache(2, 3, 1, 16);
        using CudaTensor tensor = (CudaTensor)backend.AllocateTensor(5, 7);
        using CudaRopeTable rope = (CudaRopeTable)backend.AllocateRopeTable([1f, 0.5f], 9, 1f);
        nuint[] Places() => [cache.Keys(0), cache.Values(1), tensor.Fp32, tensor.Rounded, rope.Pointer];
        nuint[] before = Places();
        foreach (DeviceMemory memory in (DeviceMemory[])[cache, tensor, rope])
            memory.Discard();
        foreach (DeviceMemory memory in (DeviceMemory[])[rope, tensor, cache])
            memory.Restore();
        Assert.Equal(before, Places());
    }
}
