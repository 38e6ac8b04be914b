using BenchmarkDotNet.Attributes;
using Rollout.Kernels;

namespace Rollout.Micro;

/// <summary>What does choosing a token cost, compared with Head, the matmul that computes its logits?</summary>
public class Sampling : IHasLimit
{
    private const int Alternatives = 20;

    private CpuBackend _backend = null!;
    private Weight _head = null!;
    private Tensor _hidden = null!;
    private Tensor _logits = null!;
    private StepLayout _step = null!;

    [Params(32768, 151936)]
    public int Vocabulary { get; set; }

    [Params(1, 64)]
    public int Rows { get; set; }

    [GlobalSetup]
    public void Setup()
    {
        _backend = new CpuBackend();
        _head = Workload.RandomWeight(_backend, Vocabulary, Workload.Hidden);
        _hidden = Workload.RandomTensor(_backend, Rows, Workload.Hidden);
        _logits = _backend.AllocateTensor(Rows, Vocabulary);
        _step = Workload.DecodeStep(Rows, context: 16, alternatives: Alternatives);
        _backend.MatMul(_hidden, _head, null, _logits, Rows);
    }

    [Benchmark(Baseline = true)]
    public void Head() => _backend.MatMul(_hidden, _head, null, _logits, Rows);

    // The logits are not restored between calls, so a kind that overwrites them would see its own output; none of these does.
    [Benchmark]
    public void Greedy() => Sample(new SampleQuery { Target = -1, TopP = 1 });

    [Benchmark]
    public void Temperature() => Sample(new SampleQuery { Target = -1, Temperature = 0.8f, TopP = 1 });

    [Benchmark]
    public void TopK() => Sample(new SampleQuery { Target = -1, Temperature = 1, TopP = 1, TopK = 50 });

    [Benchmark]
    public void TopP() => Sample(new SampleQuery { Target = -1, Temperature = 1, TopP = 0.9f });

    [Benchmark]
    public void MinP() => Sample(new SampleQuery { Target = -1, Temperature = 1, TopP = 1, MinP = 0.05f });

    /// <summary>The log-probability of a given token.</summary>
    [Benchmark]
    public void LogProb() => Sample(new SampleQuery { Target = 7, Temperature = 1, TopP = 1 });

    /// <summary>As above, and those of the 20 most probable.</summary>
    [Benchmark]
    public void LogProbAndTop20() => Sample(new SampleQuery { Target = 7, Temperature = 1, TopP = 1, AlternativesCount = Alternatives });

    [GlobalCleanup]
    public void Cleanup()
    {
        _head.Dispose();
        _hidden.Dispose();
        _logits.Dispose();
        _backend.Dispose();
    }

    Work IHasLimit.WorkOf(string method) => method == nameof(Head)
        ? new(2.0 * Rows * Vocabulary * Workload.Hidden, 2.0 * Vocabulary * Workload.Hidden)
        : new(0, sizeof(float) * (double)Rows * Vocabulary);

    private void Sample(SampleQuery kind)
    {
        for (int q = 0; q < Rows; q++)
        {
            _step.Queries[q] = kind with
            {
                OutputIndex = q,
                Position = 16,
                SampleIndex = (uint)q,
                AlternativesStart = q * kind.AlternativesCount,
            };
        }

        _backend.BeginStep(_step);
        _backend.Sample(_logits, 0, Rows);
    }
}
