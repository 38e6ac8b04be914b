using System.Runtime.InteropServices;
using BenchmarkDotNet.Attributes;
using Rollout.Kernels;

namespace Rollout.Micro;

/// <summary>
/// How much slower than a copy is storing a bf16 matrix in the kernels' layout? One thread; the limit counts only the reading.
/// </summary>
public class Pack : IHasLimit
{
    private const int Outputs = 32768;
    private const int Inputs = 896;

    private CpuBackend _backend = null!;
    private Weight _weight = null!;
    private ushort[] _source = [];
    private ushort[] _copy = [];

    [GlobalSetup]
    public void Setup()
    {
        _backend = new CpuBackend();
        _weight = _backend.AllocateWeight(Outputs, Inputs);
        _source = Workload.RandomBFloat16((long)Outputs * Inputs);
        _copy = new ushort[_source.Length];
    }

    [Benchmark(Baseline = true)]
    public void Memcpy() => _source.CopyTo(_copy, 0);

    [Benchmark]
    public void WriteWeight() => _backend.WriteWeight(_weight, 0, MemoryMarshal.AsBytes<ushort>(_source), DType.BFloat16);

    [GlobalCleanup]
    public void Cleanup()
    {
        _weight.Dispose();
        _backend.Dispose();
    }

    Work IHasLimit.WorkOf(string method) => new(0, 2.0 * Outputs * Inputs);
}
