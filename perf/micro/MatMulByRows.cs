using BenchmarkDotNet.Attributes;
using Rollout.Kernels;

namespace Rollout.Micro;

/// <summary>
/// From which row count is a matmul bound by arithmetic rather than by reading weights, and is any row count much slower?
/// </summary>
public class MatMulByRows : IHasLimit
{
    // More bytes than the caches hold, as in a step, where all other layers run between two uses of a weight.
    private const long WeightBytes = 96L << 20;

    private CpuBackend _backend = null!;
    private Weight[] _weights = [];
    private Tensor _input = null!;
    private Tensor _output = null!;
    private int _next;

    /// <summary>outputs x inputs.</summary>
    [Params("1152x896", "896x896", "9728x896", "896x4864", "32768x896")]
    public string Matrix { get; set; } = "";

    [Params(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 24, 32, 48, 64, 256)]
    public int Rows { get; set; }

    private int Outputs => int.Parse(Matrix.Split('x')[0]);

    private int Inputs => int.Parse(Matrix.Split('x')[1]);

    [GlobalSetup]
    public void Setup()
    {
        _backend = new CpuBackend();
        int copies = (int)Math.Max(1, WeightBytes / (2L * Outputs * Inputs));
        _weights = new Weight[copies];
        _weights[0] = Workload.RandomWeight(_backend, Outputs, Inputs);
        for (int i = 1; i < copies; i++)
        {
            _weights[i] = _backend.AllocateWeight(Outputs, Inputs);
            _backend.CopyWeight(_weights[0], _weights[i]);
        }

        _input = Workload.RandomTensor(_backend, Rows, Inputs);
        _output = _backend.AllocateTensor(Rows, Outputs);
    }

    [Benchmark]
    public void MatMul() => _backend.MatMul(_input, _weights[_next++ % _weights.Length], null, _output, Rows);

    [GlobalCleanup]
    public void Cleanup()
    {
        foreach (Weight weight in _weights) weight.Dispose();
        _input.Dispose();
        _output.Dispose();
        _backend.Dispose();
    }

    Work IHasLimit.WorkOf(string method) => new(2.0 * Rows * Outputs * Inputs, 2.0 * Outputs * Inputs);
}
