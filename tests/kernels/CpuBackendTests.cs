namespace Rollout.Kernels.Tests;

public sealed class ReferenceBackendTests : BackendTests
{
    protected override bool AllocatesNothing => false;

    protected override IBackend Create() => new ReferenceBackend();
}

public abstract class CpuBackendTests(int threads, int vectorBits) : BackendTests
{
    protected override IBackend Create()
    {
        Assert.SkipUnless(CpuBackend.IsAccelerated(vectorBits), $"This machine has no {vectorBits}-bit vectors.");
        return new CpuBackend(threads, vectorBits);
    }
}

public sealed class Cpu512OneThreadTests() : CpuBackendTests(1, 512);

public sealed class Cpu512TwoThreadTests() : CpuBackendTests(2, 512);

public sealed class Cpu256OneThreadTests() : CpuBackendTests(1, 256);

public sealed class Cpu256TwoThreadTests() : CpuBackendTests(2, 256);

public sealed class Cpu128OneThreadTests() : CpuBackendTests(1, 128);

public sealed class Cpu128TwoThreadTests() : CpuBackendTests(2, 128);

/// <summary>Every path of the CPU backend gives the same bits.</summary>
public sealed class CpuPathTests
{
    [Theory]
    [InlineData(512, 1)]
    [InlineData(512, 3)]
    [InlineData(256, 1)]
    [InlineData(256, 2)]
    [InlineData(128, 2)]
    public void Every_width_and_thread_count_gives_the_same_bits(int vectorBits, int threads)
    {
        Assert.SkipUnless(CpuBackend.IsAccelerated(vectorBits), $"This machine has no {vectorBits}-bit vectors.");
        foreach ((int rows, int headDim) in new[] { (1, 64), (7, 10), (29, 80), (64, 32) })
        {
            float[] expected = Run(1, 128, rows, headDim);
            Bench.SameBits(expected, Run(threads, vectorBits, rows, headDim), $"{rows} rows, heads of {headDim}");
        }
    }

    /// <summary>One step through every operation; all that it wrote.</summary>
    private static float[] Run(int threads, int vectorBits, int rows, int headDim)
    {
        using var backend = new CpuBackend(threads, vectorBits);
        var bench = new Bench(backend, 5);
        const int Heads = 6, KvHeads = 2, Hidden = 200, Vocabulary = 5003;
        int columns = (Heads + (2 * KvHeads)) * headDim;
        StepLayout step = new(rows, 2, 5, 4 * rows, 40 * rows, 3)
        {
            SequenceCount = rows == 1 ? 1 : 2,
            OutputCount = rows,
            QueryCount = 4 * rows,
        };
        step.RowStart[1] = (rows + 1) / 2;
        step.RowStart[step.SequenceCount] = rows;
        (step.BiasIds[0], step.BiasIds[1], step.BiasIds[2]) = (3, 1000, 5002);
        (step.BiasValues[0], step.BiasValues[1], step.BiasValues[2]) = (1f, float.NegativeInfinity, -2f);
        for (int row = 0; row < rows; row++)
        {
            step.Positions[row] = row < step.RowStart[1] ? row : row - step.RowStart[1];
            step.TokenIds[row] = row * 71;
            step.OutputRows[row] = row;
            step.Queries[4 * row] = Bench.Query(row) with { Position = row, AlternativesCount = 40, AlternativesStart = 40 * row };
            step.Queries[(4 * row) + 1] = Bench.Query(row, 0.7f, topK: 30 * row, topP: 0.9f, minP: 0.01f) with { BiasCount = 3 };
            step.Queries[(4 * row) + 2] = Bench.Query(row, 1.3f, topP: 0.5f);
            step.Queries[(4 * row) + 3] = Bench.Query(row, row % 2, target: row % 3 == 0 ? row : -1);
        }

        for (int b = 0; b < step.BlockTables.Length; b++)
            step.BlockTables[b] = b;
        List<float> all = [];
        Weight table = bench.Weight(Vocabulary, Hidden), norm = bench.Weight(1, headDim);
        Tensor hidden = backend.AllocateTensor(rows, Hidden), normed = backend.AllocateTensor(rows, Hidden);
        Tensor qkv = backend.AllocateTensor(rows, columns), attended = backend.AllocateTensor(rows, Heads * headDim);
        Tensor gated = backend.AllocateTensor(rows, columns / 2), logits = backend.AllocateTensor(rows, Vocabulary);
        KvCache cache = backend.AllocateKvCache(2, 10, KvHeads, headDim);
        backend.BeginStep(step);
        backend.Embed(table, hidden);
        backend.RmsNorm(hidden, bench.Weight(1, Hidden), 1e-6f, normed, rows);
        backend.MatMul(normed, bench.Weight(columns, Hidden), bench.Weight(1, columns), qkv, rows);
        backend.RopeStoreKv(qkv, Heads, norm, norm, 1e-6f, bench.Rope(headDim, 64), cache, 1);
        backend.Attend(qkv, Heads, 0.2f, cache, 1, attended);
        backend.MatMulAdd(attended, bench.Weight(Hidden, Heads * headDim), null, hidden, rows);
        backend.GatedSilu(qkv, gated, rows);
        backend.GatherRows(hidden, 0, rows, normed);
        backend.MatMul(normed, table, null, logits, rows);
        foreach (Tensor tensor in new[] { hidden, normed, qkv, attended, gated, logits })
            all.AddRange(Bench.Read(tensor, rows));
        backend.Sample(logits, 0, rows);
        foreach (SampleResult result in step.Results)
            all.AddRange([result.Token, result.LogProb, result.SamplingLogProb]);
        all.AddRange(step.AlternativeIds.Select(id => (float)id));
        all.AddRange(step.AlternativeLogProbs);
        return [.. all];
    }

    [Fact]
    public void Every_row_tile_and_width_of_a_matmul_gives_the_same_bits()
    {
        const int Rows = 26, Inputs = 301, Outputs = 70;
        float[]? expected = null;
        foreach (int bits in new[] { 128, 256, 512 }.Where(CpuBackend.IsAccelerated))
        {
            using var backend = new CpuBackend(2, bits);
            var bench = new Bench(backend);
            Weight w = bench.Weight(Outputs, Inputs);
            Tensor x = bench.Tensor(Rows, Inputs), y = backend.AllocateTensor(Rows, Outputs);
            for (int rows = Rows; rows > 0; rows--)
            {
                backend.MatMul(x, w, null, y, rows);
                float[] actual = Bench.Read(y, rows);
                expected ??= actual;
                Bench.SameBits(expected[..actual.Length], actual, $"{bits} bits, {rows} rows");
            }
        }
    }

    [Fact]
    public void Names_say_what_runs() => Assert.Equal("cpu 128-bit vectors, 2 threads", Named(2, 128));

    [Theory]
    [InlineData(-1, 0, "threads")]
    [InlineData(1, 100, "vectorBits")]
    public void Wrong_configurations_are_refused(int threads, int vectorBits, string name) =>
        Assert.Equal(name, Assert.ThrowsAny<ArgumentException>(() => Named(threads, vectorBits)).ParamName);

    [Fact]
    public void A_disposed_backend_says_so()
    {
        var backend = new CpuBackend(2);
        backend.Dispose();
        backend.Dispose();
        Assert.Throws<ObjectDisposedException>(() => backend.AllocateTensor(1, 1));
    }

    [Fact]
    public void Measured_limits_are_positive()
    {
        Assert.InRange(MachineLimits.MeasureFmaGflops(1), 0.01, 1e6);
        Assert.InRange(MachineLimits.MeasureReadGBps(2), 0.01, 1e5);
    }

    private static string Named(int threads, int vectorBits)
    {
        using var backend = new CpuBackend(threads, vectorBits);
        return backend.Name;
    }
}
