namespace Rollout.Kernels.Tests;

public sealed class ReferenceBackendTests : BackendTests
{
    protected override bool AllocatesNothing => false;

    protected override Backend Create() => new ReferenceBackend();
}

public abstract class CpuBackendTests(int threads, int vectorBits) : BackendTests
{
    protected override Backend Create()
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
        (int, int, int)[] shapes = [(1, 64, 64), (7, 10, 10), (29, 80, 80), (64, 32, 32), (29, 24, 16), (33, 16, 40)];
        foreach ((int rows, int keyDim, int valueDim) in shapes)
        {
            float[] expected = Run(1, 128, rows, keyDim, valueDim);
            Bench.SameBits(expected, Run(threads, vectorBits, rows, keyDim, valueDim), $"{rows} rows, {keyDim} and {valueDim}");
        }
    }

    /// <summary>Runs one step through every operation and returns all outputs.</summary>
    private static float[] Run(int threads, int vectorBits, int rows, int keyDim, int valueDim)
    {
        using CpuBackend backend = new(threads, vectorBits);
        Bench bench = new(backend, 5);
        const int Heads = 6, KvHeads = 2, Hidden = 200, Vocabulary = 5003;
        KvLayout layout = new(KvHeads, keyDim, valueDim);
        int columns = Bench.Columns(Heads, layout);
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
        Weight table = bench.Weight(Vocabulary, Hidden), norm = bench.Weight(1, keyDim);
        Tensor hidden = backend.AllocateTensor(rows, Hidden), normed = backend.AllocateTensor(rows, Hidden);
        Tensor qkv = backend.AllocateTensor(rows, columns), attended = backend.AllocateTensor(rows, Heads * valueDim);
        Tensor gated = backend.AllocateTensor(rows, columns / 2), logits = backend.AllocateTensor(rows, Vocabulary);
        KvCache cache = bench.Cache(2, 10, layout);
        backend.BeginStep(step);
        backend.Embed(table, hidden);
        backend.RmsNorm(hidden, bench.Weight(1, Hidden), 1e-6f, normed, rows);
        backend.MatMul(normed, bench.Weight(columns, Hidden), bench.Weight(1, columns), qkv, rows);
        bench.Attend(qkv, Heads, bench.Rope(keyDim, 64), cache, 1, attended, 0.2f, norm, norm, 1e-6f);
        backend.MatMulAdd(attended, bench.Weight(Hidden, Heads * valueDim), null, hidden, rows);
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

    /// <summary>As Hugging Face's models do: the angle is a product of fp32 numbers, despite the rounding error.</summary>
    [Fact]
    public void Angles_are_products_rounded_to_fp32_at_every_position_to_the_bit()
    {
        using CpuBackend backend = new(1);
        Bench bench = new(backend);
        const int HeadDim = 128, Half = HeadDim / 2, MaxBlocks = 131072 / KvCache.BlockTokens;
        int[] positions = [0, 1, 63, 64, 2047, 4095, 4096, 32767, 65535, 65536, 99_999, 100_000, 100_001, 131_070, 131_071];
        float[] frequencies = [.. Enumerable.Range(0, Half).Select(i => (float)Math.Pow(10000, -2.0 * i / HeadDim))];
        using RopeTable rope = backend.AllocateRopeTable(frequencies, 131_072);
        using KvCache cache = bench.Cache(1, 1, 1, HeadDim);

        // Ones in the first half of a query and zeros in the second: cosines, then sines. The CPU rotates queries in place.
        float[] rows = [.. Enumerable.Range(0, positions.Length * 3 * HeadDim).Select(i => i % HeadDim < Half ? 1f : 0f)];
        using Tensor qkv = bench.Tensor(3 * HeadDim, rows);
        backend.BeginStep(Bench.Step(MaxBlocks, [positions], [new int[MaxBlocks]]));
        bench.Store(qkv, 1, rope, cache, 0);
        float[] read = Bench.Read(qkv, positions.Length);
        for (int row = 0; row < positions.Length; row++)
        {
            float[] angles = [.. frequencies.Select(frequency => (float)positions[row] * frequency)];
            float[] expected = [.. angles.Select(angle => (float)Math.Cos(angle)), .. angles.Select(angle => (float)Math.Sin(angle))];
            Bench.SameBits(expected, Bench.Row(read, 3 * HeadDim, row)[..HeadDim], $"position {positions[row]}");
        }
    }

    [Fact]
    public void Every_row_tile_and_width_of_a_matmul_gives_the_same_bits()
    {
        const int Rows = 26, Inputs = 301, Outputs = 70;
        float[]? expected = null;
        foreach (int bits in new[] { 128, 256, 512 }.Where(CpuBackend.IsAccelerated))
        {
            using CpuBackend backend = new(2, bits);
            Bench bench = new(backend);
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
        CpuBackend backend = new(2);
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
        using CpuBackend backend = new(threads, vectorBits);
        return backend.Name;
    }
}
