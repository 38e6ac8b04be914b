using BenchmarkDotNet.Attributes;
using Rollout.Kernels;

namespace Rollout.Micro;

/// <summary>A decode step's attention in all layers in turn, so that keys and values come from memory as in a step.</summary>
public abstract class Attention : IHasLimit
{
    private const int Layers = 24;

    private CpuBackend _backend = null!;
    private KvCache _cache = null!;
    private Tensor _qkv = null!;
    private Tensor _output = null!;
    private RopeTable _rope = null!;
    private StepLayout _step = null!;
    private int _layer;

    protected abstract int Samples { get; }

    protected abstract int Tokens { get; }

    /// <summary>Leading tokens whose keys and values the samples share.</summary>
    protected abstract int SharedTokens { get; }

    [GlobalSetup]
    public void Setup()
    {
        _backend = new CpuBackend();
        _step = Workload.DecodeStep(Samples, Tokens, SharedTokens);
        _cache = _backend.AllocateKvCache(Samples * Workload.BlocksOf(Tokens), Workload.KvLayouts(Layers));
        _rope = _backend.AllocateRopeTable(new float[Workload.HeadDim / 2], Tokens);
        _qkv = Workload.RandomTensor(_backend, Samples, Workload.QkvOutputs, scale: 1);
        _output = _backend.AllocateTensor(Samples, Workload.Heads * Workload.HeadDim);
        _backend.BeginStep(_step);
    }

    [Benchmark]
    public void Attend() => Workload.Attend(_backend, _qkv, _rope, _cache, _layer++ % Layers, _output);

    [GlobalCleanup]
    public void Cleanup()
    {
        _cache.Dispose();
        _qkv.Dispose();
        _rope.Dispose();
        _output.Dispose();
        _backend.Dispose();
    }

    Work IHasLimit.WorkOf(string method) => new(
        4.0 * Samples * Workload.Heads * Workload.HeadDim * Tokens,
        2.0 * sizeof(float) * Workload.KvHeads * Workload.HeadDim * (SharedTokens + (long)Samples * (Tokens - SharedTokens)));
}

/// <summary>What does a longer context cost?</summary>
public class AttentionByContext : Attention
{
    [Params(1, 8)]
    public int Batch { get; set; }

    [Params(128, 512, 1024, 4096)]
    public int Context { get; set; }

    protected override int Samples => Batch;

    protected override int Tokens => Context;

    protected override int SharedTokens => 0;
}

/// <summary>16 samples of one prompt of 1024 tokens: what does sharing its blocks save?</summary>
public class AttentionBySharing : Attention
{
    [Params(true, false)]
    public bool Shared { get; set; }

    protected override int Samples => 16;

    protected override int Tokens => 1024 + 16;

    protected override int SharedTokens => Shared ? 1024 : 0;
}
