using System.Runtime.InteropServices;
using Rollout.Engine;
using Rollout.Kernels;
using Rollout.Kernels.Cuda;
using Rollout.Micro;
using Rollout.Native;

namespace Rollout.Gpu;

/// <summary>
/// Random weights of a model's shape, made without a file: matrices are filled on the device with pieces of one random pattern, uniform in
/// ±0.035, which is a standard deviation of 0.02; norms are 1.
/// </summary>
internal sealed class RandomWeights : IDisposable
{
    private readonly CudaBackend _backend;
    private readonly DeviceBuffer _pattern;
    private readonly int _elements;
    private long _next;

    public RandomWeights(CudaBackend backend, bool isSmall)
    {
        _backend = backend;
        _elements = isSmall ? 10_007 : 16_777_213; // primes, so that weights are not equal
        _pattern = backend.Device.Allocate((long)_elements * sizeof(ushort));
        backend.Device.Upload(_pattern.Pointer, MemoryMarshal.AsBytes<ushort>(Workload.RandomBFloat16(_elements)));
    }

    /// <summary>All weights of a model.</summary>
    public static WeightSet Of(CudaBackend backend, ModelSpec model, bool isSmall)
    {
        LoadPlan plan = LoadPlan.Compile(model);
        WeightSet weights = WeightSet.Allocate(backend, plan);
        using RandomWeights random = new(backend, isSmall);
        foreach ((PlannedWeight planned, Weight weight) in plan.Weights.Zip(weights.All))
        {
            if (planned.Name.EndsWith("norm", StringComparison.Ordinal)) random.FillOnes(weight);
            else random.Fill(weight);
        }

        return weights;
    }

    public void Fill(Weight weight)
    {
        long elements = (long)weight.Outputs * weight.Inputs;
        DeviceBytes pattern = new(_pattern);
        for (long at = 0; at < elements;)
        {
            int from = (int)(_next % _elements), count = (int)Math.Min(_elements - from, elements - at);
            WeightRange store = new(0, count, weight, at);
            _backend.Peers.Apply(
                [new DeviceTensor(pattern, from * (long)sizeof(ushort), count * (long)sizeof(ushort), DType.BFloat16, [store])]);
            at += count;
            _next += count;
        }
    }

    public void FillOnes(Weight weight)
    {
        float[] ones = new float[weight.Outputs * weight.Inputs];
        Array.Fill(ones, 1f);
        _backend.WriteWeight(weight, 0, MemoryMarshal.AsBytes<float>(ones), DType.Float32);
    }

    public void Dispose() => _pattern.Dispose();
}
