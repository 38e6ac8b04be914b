using Rollout.Kernels;
using Rollout.Micro;

namespace Rollout.Perf.Tests;

public sealed class SamplingTests
{
    /// <summary>Sampling reads a row's logits, the head's matmul 896 weights for each of them. Peaked logits, and flat ones.</summary>
    [Theory]
    [InlineData(1, Workload.HiddenScale)]
    [InlineData(64, Workload.HiddenScale)]
    [InlineData(1, 0.1f)]
    [InlineData(64, 0.1f)]
    public void Sampling_a_row_costs_less_than_the_heads_matmul(int rows, float hiddenScale)
    {
        using CpuBackend backend = new(threads: 1);
        using Weight head = Workload.RandomWeight(backend, Workload.Vocabulary, Workload.Hidden);
        using Tensor hidden = Workload.RandomTensor(backend, rows, Workload.Hidden, hiddenScale);
        using Tensor logits = backend.AllocateTensor(rows, Workload.Vocabulary);
        (string Name, SampleQuery Query)[] kinds =
        [
            ("greedy", new SampleQuery { TopP = 1 }),
            ("temperature", new SampleQuery { Temperature = 1, TopP = 1 }),
            ("top-k", new SampleQuery { Temperature = 1, TopP = 1, TopK = 50 }),
            ("top-p", new SampleQuery { Temperature = 1, TopP = 0.9f }),
            ("min-p", new SampleQuery { Temperature = 1, TopP = 1, MinP = 0.05f }),
        ];

        // Logits may be overwritten by sampling, so each kind gets fresh ones: the matmul is timed once a kind and round.
        List<Action> variants = [];
        foreach ((_, SampleQuery kind) in kinds)
        {
            StepLayout step = Workload.DecodeStep(rows, context: 16);
            for (int q = 0; q < rows; q++)
                step.Queries[q] = kind with { OutputIndex = q, Target = -1, Position = 16, SampleIndex = (uint)q };
            variants.Add(() => backend.MatMul(hidden, head, null, logits, rows));
            variants.Add(() =>
            {
                backend.BeginStep(step);
                backend.Sample(logits, 0, rows);
            });
        }

        double[] seconds = Rounds.Best(times => !Slow(times).Any(), [.. variants]);
        Assert.True(!Slow(seconds).Any(), string.Join("; ", Slow(seconds)));

        IEnumerable<string> Slow(double[] times)
        {
            double matmul = Enumerable.Range(0, kinds.Length).Min(i => times[2 * i]);
            return kinds.Select((kind, i) => (kind.Name, Ratio: times[2 * i + 1] / matmul)).Where(kind => kind.Ratio > 1)
                .Select(kind => $"{kind.Name} costs {kind.Ratio:F2} times the head");
        }
    }
}
