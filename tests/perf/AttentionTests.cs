using Rollout.Kernels;
using Rollout.Micro;

namespace Rollout.Perf.Tests;

public sealed class AttentionTests
{
    // Where a core computes attention more slowly than memory delivers keys and values, as on the development machine, sharing gains little
    // (ratios of 0.78 to 0.99 with both cores). The test is that it costs nothing.
    private const double Slack = 1.1;

    /// <summary>16 samples of one prompt of 1024 tokens, whose keys and values are stored once.</summary>
    [Fact]
    public void A_shared_prefix_costs_no_more_than_copies_of_it()
    {
        const int Samples = 16;
        const int Prompt = 1024;
        const int Context = Prompt + 16;
        const int Layers = 6;
        using CpuBackend backend = new(threads: 1);
        StepLayout apart = Workload.DecodeStep(Samples, Context);
        StepLayout shared = Workload.DecodeStep(Samples, Context, Prompt);
        using KvCache cache = backend.AllocateKvCache(Samples * Workload.BlocksOf(Context), Workload.KvLayouts(Layers));
        using RopeTable rope = backend.AllocateRopeTable(new float[Workload.HeadDim / 2], Context);
        using Tensor qkv = Workload.RandomTensor(backend, Samples, Workload.QkvOutputs, scale: 1);
        using Tensor output = backend.AllocateTensor(Samples, Workload.Heads * Workload.HeadDim);
        double[] seconds = Rounds.Best(times => times[0] < Slack * times[1], () => Attend(shared), () => Attend(apart));
        Assert.True(seconds[0] < Slack * seconds[1], $"{seconds[0] * 1e6:F0} us shared, {seconds[1] * 1e6:F0} us apart");

        void Attend(StepLayout step)
        {
            backend.BeginStep(step);
            for (int layer = 0; layer < Layers; layer++) Workload.Attend(backend, qkv, rope, cache, layer, output);
        }
    }
}
