using Rollout.Kernels;
using Rollout.Micro;

namespace Rollout.Perf.Tests;

/// <summary>
/// Steps of all row counts are efficient: none is much slower than its neighbours. The weights come from memory, as in a step.
/// </summary>
public sealed class MatMulTests
{
    private const int MostRows = 64;

    // More than the last-level cache holds, in copies used in turn, like layers.
    private const long WeightBytes = 64 << 20;

    // From memory all small row counts cost the same. From a cache, one row was measured at up to 1.25 times two.
    private const double MostForFewer = 1.3;

    // A row more may need one tile more: the same weights are then unpacked once more, by tiles that are a little lower.
    private const double MostPerRow = 1.25;

    [Theory]
    [InlineData(Workload.QkvOutputs, Workload.Hidden)]
    [InlineData(Workload.Hidden, Workload.Intermediate)]
    public void No_row_count_costs_more_than_its_neighbours(int outputs, int inputs)
    {
        using CpuBackend backend = new(threads: 1);
        // An odd number of copies: over the rounds every row count uses each of them, also one in faster memory.
        Weight[] weights = new Weight[(WeightBytes / (2L * outputs * inputs)) | 1];
        weights[0] = Workload.RandomWeight(backend, outputs, inputs);
        for (int i = 1; i < weights.Length; i++)
        {
            weights[i] = backend.AllocateWeight(outputs, inputs);
            backend.CopyWeight(weights[0], weights[i]);
        }

        using Tensor input = Workload.RandomTensor(backend, MostRows, inputs);
        using Tensor output = backend.AllocateTensor(MostRows, outputs);
        int next = 0;
        double[] seconds = Rounds.Best(times => Cliffs(times).Count == 0, [.. Enumerable.Range(1, MostRows)
            .Select(rows => (Action)(() => backend.MatMul(input, weights[next++ % weights.Length], null, output, rows)))]);
        foreach (Weight weight in weights) weight.Dispose();

        List<string> found = Cliffs(seconds);
        Assert.True(found.Count == 0, string.Join("; ", found));
    }

    private static List<string> Cliffs(double[] seconds)
    {
        List<string> cliffs = [];
        for (int rows = 1; rows < MostRows; rows++)
        {
            double fewer = seconds[rows - 1];
            double more = seconds[rows];
            if (fewer > MostForFewer * more) cliffs.Add($"{rows} rows take {fewer * 1e6:F0} us, {rows + 1} take {more * 1e6:F0}");
            double perRow = more / (rows + 1) / (fewer / rows);
            if (perRow > MostPerRow) cliffs.Add($"a row of {rows + 1} costs {perRow:F2} times a row of {rows}");
        }

        return cliffs;
    }
}
