using Rollout.Engine;
using Rollout.Kernels;
using Rollout.Micro;

namespace Rollout.Perf.Tests;

public sealed class StepTests
{
    private const int Layers = 2;
    private const int Context = 128;
    private const int Most = 8;
    private const double Factor = 0.5;

    /// <summary>
    /// Eight sequences in one step read the weights once. On a machine where one sequence is bound by reading, the gain is nearly
    /// eightfold; twofold is the minimum required where arithmetic is slow and memory fast.
    /// </summary>
    [Fact]
    public void A_step_of_eight_costs_less_than_half_of_eight_steps_of_one()
    {
        ModelSpec spec = ModelSpec.Parse(TinyModel.Config(Layers, Workload.Hidden, Workload.Intermediate, Workload.Heads, Workload.KvHeads,
            vocabulary: 8192));
        using CpuBackend backend = new(threads: 1);
        Transformer transformer = new(spec);
        using WeightSet weights = WeightSet.Allocate(backend, transformer.Weights);
        foreach (Weight weight in weights.All) Workload.Fill(backend, weight);
        using KvCache kv = backend.AllocateKvCache(Most * Workload.BlocksOf(Context), transformer.Kv);
        using Workspace workspace = transformer.AllocateWorkspace(backend, maxRows: Most, maxContext: Context);
        StepLayout one = Workload.DecodeStep(1, Context);
        StepLayout eight = Workload.DecodeStep(Most, Context);
        double[] seconds = Rounds.Best(times => times[1] < Factor * Most * times[0], () => Run(one), () => Run(eight));
        Assert.True(seconds[1] < Factor * Most * seconds[0], $"{seconds[0] * 1e3:F2} ms for one, {seconds[1] * 1e3:F2} ms for eight");

        void Run(StepLayout step)
        {
            transformer.Forward(step, weights, kv, workspace);
            transformer.Sample(step, weights, workspace);
        }
    }
}
