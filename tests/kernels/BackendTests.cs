using CsCheck;

[assembly: Xunit.v3.Parallelization(Mode = Xunit.Sdk.ParallelMode.None)]

namespace Rollout.Kernels.Tests;

/// <summary>What every backend promises. One sealed subclass per backend and configuration.</summary>
public abstract partial class BackendTests : IDisposable
{
    private readonly List<Backend> _backends = [];

    protected abstract Backend Create();

    /// <summary>How it stores matrices.</summary>
    protected virtual WeightFormat Format => WeightFormat.BFloat16;

    /// <summary>The largest relative error of one rounding, for a backend that rounds between operations.</summary>
    protected virtual double Rounding => 0;

    /// <summary>Tokens drawn in tests of the distribution.</summary>
    protected virtual int Draws => 20000;

    /// <summary>Whether values may have another width than keys.</summary>
    protected virtual bool HasOwnValueWidths => true;

    /// <summary>The reference allocates as it likes.</summary>
    protected virtual bool AllocatesNothing => true;

    private Bench New(int seed = 1)
    {
        Backend backend = Create();
        _backends.Add(backend);
        return new Bench(backend, seed);
    }

    public void Dispose()
    {
        foreach (Backend backend in _backends)
            backend.Dispose();
        GC.SuppressFinalize(this);
    }

    /// <summary>Runs the same work on the reference and on this backend, same inputs, and compares.</summary>
    /// <param name="subject">The work on this backend.</param>
    /// <param name="seed">Seed of the inputs.</param>
    /// <param name="tolerance">For a backend that does not round between operations.</param>
    /// <param name="work">Returns what is compared.</param>
    /// <param name="roundings">Roundings that a value may have passed through, times the factors on them.</param>
    private void Compare(Bench subject, int seed, double tolerance, Func<Bench, float[]> work, int roundings = 2)
    {
        if (subject.Backend is ReferenceBackend)
            return; // nothing to compare it with

        using ReferenceBackend reference = new(Format);
        float[] expected = work(new Bench(reference, seed));
        double largest = expected.Max(value => Math.Abs((double)value));
        Bench.Close(expected, work(new Bench(subject.Backend, seed)), tolerance + (roundings * Rounding * largest));
    }

    // ---- Against the reference.

    [Fact]
    public void Embed_copies_rows_of_the_table()
    {
        Compare(New(), 3, 0, bench =>
        {
            StepLayout step = Bench.Step(3, 1, s => (0, s + 1), (s, b) => 0);
            for (int i = 0; i < step.RowCount; i++)
                step.TokenIds[i] = (i * 17) % 70;
            bench.Backend.BeginStep(step);
            Tensor output = bench.Backend.AllocateTensor(8, 45);
            bench.Backend.Embed(bench.Weight(70, 45), output);
            return Bench.Read(output, step.RowCount);
        });
    }

    [Fact]
    public void MatMul_equals_the_reference()
    {
        Bench subject = New();
        Gen.Select(Gen.Int[1, 40], Gen.Int[1, 150], Gen.Int[2, 140], Gen.Int[0, 1 << 30]).Sample(
            (rows, inputs, outputs, seed) => Compare(subject, seed, inputs * 4e-7, bench =>
                {
                    using Tensor x = bench.Tensor(rows + 2, inputs);
                    using Tensor y = bench.Tensor(rows + 2, outputs), z = bench.Tensor(rows + 2, outputs);
                    using Weight w = bench.Weight(outputs, inputs), b = bench.Weight(1, outputs);
                    bench.Backend.MatMul(x, w, seed % 2 == 0 ? b : null, y, rows);
                    bench.Backend.MatMulAdd(x, w, seed % 3 == 0 ? b : null, z, rows);
                    return [.. Bench.Read(y, rows + 2), .. Bench.Read(z, rows + 2)];
                }),
            iter: 60,
            threads: 1);
    }

    [Fact]
    public void RmsNorm_equals_the_reference()
    {
        Bench subject = New();
        Gen.Select(Gen.Int[1, 9], Gen.Int[1, 200], Gen.Int[0, 2], Gen.Int[0, 1 << 30]).Sample(
            (rows, columns, kind, seed) => Compare(subject, seed, 3e-6, bench =>
            {
                // For small values epsilon dominates, and for zeros it is the divisor.
                using Tensor x = bench.Tensor(rows, columns, kind switch { 0 => 1f, 1 => 2e-3f, _ => 0f }), y = bench.Tensor(rows, columns);
                bench.Backend.RmsNorm(x, bench.Weight(1, columns), 1e-5f, y, rows);
                bench.Backend.RmsNorm(x, bench.Weight(1, columns), 1e-6f, x, rows);
                return [.. Bench.Read(y, rows), .. Bench.Read(x, rows)];
            }),
            iter: 60,
            threads: 1);
    }

    [Fact]
    public void RmsNormAdd_equals_the_reference()
    {
        Bench subject = New();
        Gen.Select(Gen.Int[1, 9], Gen.Int[1, 200], Gen.Int[0, 2], Gen.Int[0, 1 << 30]).Sample(
            (rows, columns, kind, seed) => Compare(subject, seed, 4e-6, bench =>
            {
                using Tensor x = bench.Tensor(rows + 1, columns, kind switch { 0 => 1f, 1 => 2e-3f, _ => 0f });
                using Tensor y = bench.Tensor(rows + 1, columns);
                bench.Backend.RmsNormAdd(x, bench.Weight(1, columns), 1e-5f, y, rows);
                return Bench.Read(y, rows + 1); // the last row stays as it was
            }),
            iter: 60,
            threads: 1);
    }

    [Fact]
    public void GatedSilu_equals_the_reference()
    {
        Bench subject = New();
        Gen.Select(Gen.Int[1, 9], Gen.Int[1, 100], Gen.Float[0.1f, 60f], Gen.Int[0, 1 << 30]).Sample(
            (rows, width, scale, seed) => Compare(subject, seed, scale * scale * 4e-7, bench =>
            {
                using Tensor x = bench.Tensor(rows, 2 * width, scale), y = bench.Tensor(rows, width);
                bench.Backend.GatedSilu(x, y, rows);
                return Bench.Read(y, rows);
            }, roundings: 4), // gate, whose error silu multiplies by up to 1.3, up, and their product
            iter: 60,
            threads: 1);
    }

    [Theory]
    [InlineData(2, 4, 2)]
    [InlineData(10, 3, 1)]
    [InlineData(16, 4, 2)]
    [InlineData(32, 14, 2)]
    [InlineData(64, 7, 1)]
    [InlineData(80, 2, 2)]
    [InlineData(96, 9, 1)]
    [InlineData(128, 8, 8)]
    public void Rope_and_attention_equal_the_reference(int headDim, int heads, int kvHeads)
    {
        foreach (int normed in (int[])[0, 1, int.MaxValue]) // heads that are normalised together, or none
        {
            Compare(New(), headDim, 2e-5, bench =>
            {
                // Three sequences; the second begins in the middle of a block, after a step that stored its context.
                int[] lengths = [5, 37, 16];
                KvCache cache = bench.Cache(2, 20, kvHeads, headDim);
                RopeTable rope = bench.Rope(headDim, 40);
                Weight? queryNorm = normed == 0 ? null : bench.Weight(1, Math.Min(normed, heads) * headDim);
                Weight? keyNorm = normed == 0 ? null : bench.Weight(1, Math.Min(normed, kvHeads) * headDim);
                int columns = (heads + (2 * kvHeads)) * headDim;
                List<float> results = [];
                for (int turn = 0; turn < 3; turn++) // the third is of single rows
                {
                    StepLayout step = Bench.Step(
                        3,
                        4,
                        s => turn switch
                        {
                            0 => (0, s == 1 ? 21 : 0),
                            1 => (s == 1 ? 21 : 0, lengths[s]),
                            _ => (lengths[s], lengths[s] + 1),
                        },
                        (s, b) => ((s * 4) + b) * 7 % 20);
                    bench.Backend.BeginStep(step);
                    Tensor qkv = bench.Tensor(step.RowCount, columns);
                    Tensor output = bench.Backend.AllocateTensor(step.RowCount, heads * headDim);
                    bench.Attend(qkv, heads, rope, cache, 1, output, 0.3f, queryNorm, keyNorm, 1e-6f);
                    results.AddRange(Bench.Read(output, step.RowCount));
                }

                return [.. results];
            });
        }
    }

    [Fact]
    public void GatherRows_takes_the_steps_output_rows()
    {
        Compare(New(), 4, 0, bench =>
        {
            StepLayout step = Bench.Step(1, 1, _ => (0, 10), (_, _) => 0);
            int[] rows = [1, 4, 5, 9];
            rows.CopyTo(step.OutputRows, 0);
            step.OutputCount = 4;
            bench.Backend.BeginStep(step);
            Tensor output = bench.Backend.AllocateTensor(3, 21);
            bench.Backend.GatherRows(bench.Tensor(10, 21), 1, 3, output);
            return Bench.Read(output, 3);
        });
    }

    // ---- A row's bits depend on the row alone.

    [Fact]
    public void Rows_do_not_depend_on_how_many_there_are()
    {
        Bench bench = New();
        const int Rows = 70, Inputs = 75, Outputs = 74;
        Tensor x = bench.Tensor(Rows, Inputs), y = bench.Backend.AllocateTensor(Rows, Outputs);
        Tensor n = bench.Backend.AllocateTensor(Rows, Inputs), g = bench.Backend.AllocateTensor(Rows, Outputs / 2);
        Tensor z = bench.Backend.AllocateTensor(Rows, Outputs);
        Weight ofOutputs = bench.Weight(1, Outputs);
        Weight w = bench.Weight(Outputs, Inputs), b = bench.Weight(1, Outputs), scale = bench.Weight(1, Inputs);
        float[] start = bench.Values(Rows * Outputs);

        float[][] Run(int rows)
        {
            bench.Backend.RmsNorm(x, scale, 1e-6f, n, rows);
            bench.Backend.MatMul(n, w, b, y, rows);
            float[] product = Bench.Read(y, rows);
            y.Write(Rows, start);
            bench.Backend.MatMulAdd(n, w, null, y, rows);
            bench.Backend.GatedSilu(y, g, rows);
            float[] sums = Bench.Read(y, rows), gated = Bench.Read(g, rows);
            bench.Backend.MatMul(n, w, null, z, rows);
            bench.Backend.RmsNormAdd(z, ofOutputs, 1e-6f, y, rows);
            return [Bench.Read(n, rows), product, sums, gated, Bench.Read(y, rows)];
        }

        float[][] whole = Run(Rows);
        for (int rows = 1; rows <= Rows; rows++)
        {
            float[][] some = Run(rows);
            for (int i = 0; i < whole.Length; i++)
                Bench.SameBits(whole[i].AsSpan(0, some[i].Length).ToArray(), some[i], $"{rows} rows, result {i}");
        }
    }

    [Theory]
    [InlineData(32, 32)]
    [InlineData(24, 16)]
    [InlineData(16, 40)]
    public void Attention_of_a_row_does_not_depend_on_the_batch(int keyDim, int valueDim)
    {
        Assert.SkipUnless(keyDim == valueDim || HasOwnValueWidths, "Keys and values have one width.");
        Bench bench = New();
        const int Sequences = 70, Heads = 6, KvHeads = 2;
        KvLayout layout = new(KvHeads, keyDim, valueDim);
        int columns = Bench.Columns(Heads, layout), width = Heads * valueDim;
        KvCache cache = bench.Cache(1, Sequences * 4, layout);
        RopeTable rope = bench.Rope(keyDim, 64);
        int Length(int s) => 1 + (s * 37 % 60);
        int Block(int s, int b) => ((s * 4) + b) * 11 % (Sequences * 4 - 1);
        bench.Backend.BeginStep(Bench.Step(Sequences, 4, s => (0, Length(s)), Block));
        bench.Store(bench.Tensor(Enumerable.Range(0, Sequences).Sum(Length), columns), Heads, rope, cache, 0);

        float[] rows = bench.Values(Sequences * columns);
        float[] Attend(int first, int count)
        {
            StepLayout step = Bench.Step(count, 4, s => (Length(first + s) - 1, Length(first + s)), (s, b) => Block(first + s, b));
            bench.Backend.BeginStep(step);
            using Tensor qkv = bench.Tensor(columns, rows.AsSpan(first * columns, count * columns).ToArray());
            using Tensor output = bench.Backend.AllocateTensor(count, width);
            bench.Attend(qkv, Heads, rope, cache, 0, output, 0.2f);
            return Bench.Read(output, count);
        }

        float[] whole = Attend(0, Sequences);
        for (int count = 1; count <= Sequences; count++)
        {
            Bench.SameBits(whole.AsSpan(0, count * width).ToArray(), Attend(0, count), $"{count} rows");
            float[] last = whole.AsSpan((Sequences - count) * width).ToArray();
            Bench.SameBits(last, Attend(Sequences - count, count), $"last {count}");
        }
    }

    [Theory]
    [InlineData(16, 16, 4, 2)]
    [InlineData(64, 64, 14, 2)]
    [InlineData(10, 10, 3, 3)]
    [InlineData(24, 16, 4, 2)]
    [InlineData(16, 40, 3, 1)]
    public void Prefill_in_chunks_and_at_once_have_the_same_bits(int keyDim, int valueDim, int heads, int kvHeads)
    {
        Assert.SkipUnless(keyDim == valueDim || HasOwnValueWidths, "Keys and values have one width.");
        Bench bench = New();
        const int Tokens = 75;
        KvLayout layout = new(kvHeads, keyDim, valueDim);
        int columns = Bench.Columns(heads, layout);
        float[] qkv = bench.Values(Tokens * columns);
        RopeTable rope = bench.Rope(keyDim, Tokens);

        float[] Prefill(int[] chunks, int shift)
        {
            using KvCache cache = bench.Cache(1, 11, layout);
            List<float> all = [];
            int start = 0;
            foreach (int chunk in chunks)
            {
                int end = Math.Min(Tokens, start + chunk);
                StepLayout step = Bench.Step(1, 5, _ => (start, end), (_, b) => ((b * 3) + shift) % 11);
                bench.Backend.BeginStep(step);
                using Tensor x = bench.Tensor(columns, qkv.AsSpan(start * columns, (end - start) * columns).ToArray());
                using Tensor output = bench.Backend.AllocateTensor(end - start, heads * valueDim);
                bench.Attend(x, heads, rope, cache, 0, output, 0.2f);
                all.AddRange(Bench.Read(output, end - start));
                start = end;
            }

            return [.. all];
        }

        float[] whole = Prefill([Tokens], 0);
        Bench.SameBits(whole, Prefill([Tokens], 5), "other blocks");
        Bench.SameBits(whole, Prefill(Enumerable.Repeat(1, Tokens).ToArray(), 1), "token by token");
        Bench.SameBits(whole, Prefill([17, 16, 1, 40, 1], 2), "chunks");
        Bench.SameBits(whole, Prefill([7, 7, 7, 7, 47], 3), "chunks");
    }

    [Fact]
    public void A_shared_prefix_and_copies_of_it_have_the_same_bits()
    {
        Bench bench = New();
        const int HeadDim = 32, Heads = 4, KvHeads = 1, Samples = 20, Prefix = 3;
        int columns = (Heads + (2 * KvHeads)) * HeadDim;
        KvCache cache = bench.Cache(2, 4 + (Samples * 4), KvHeads, HeadDim);
        RopeTable rope = bench.Rope(HeadDim, 64);
        float[][] results = [[], []];
        float[] suffix = bench.Values(Samples * 5 * columns);
        bench.Backend.BeginStep(Bench.Step(1, 4, _ => (0, Prefix * 16), (_, b) => b));
        bench.Store(bench.Tensor(Prefix * 16, columns), Heads, rope, cache, 1);
        for (int s = 0; s < Samples; s++)
        {
            for (int b = 0; b < Prefix; b++)
                bench.Backend.CopyBlock(cache, b, 4 + (s * 4) + b);
        }

        for (int copied = 0; copied < 2; copied++)
        {
            StepLayout step = Bench.Step(
                Samples, 4, _ => (Prefix * 16, (Prefix * 16) + 5), (s, b) => b < Prefix && copied == 0 ? b : 4 + (s * 4) + b);
            bench.Backend.BeginStep(step);
            Tensor qkv = bench.Tensor(columns, suffix), output = bench.Backend.AllocateTensor(Samples * 5, Heads * HeadDim);
            bench.Attend(qkv, Heads, rope, cache, 1, output, 0.2f);
            results[copied] = Bench.Read(output, Samples * 5);
        }

        Bench.SameBits(results[0], results[1], "shared and copied");
    }

    [Fact]
    public void Attention_does_not_see_what_lies_beyond_its_position()
    {
        Bench bench = New();
        const int HeadDim = 16;
        KvCache cache = bench.Cache(1, 1, 1, HeadDim);
        RopeTable rope = bench.Rope(HeadDim, 16);

        // A failed sequence leaves its values in a block that is then reused.
        bench.Backend.BeginStep(Bench.Step(1, 1, _ => (0, 16), (_, _) => 0));
        bench.Store(bench.Tensor(3 * HeadDim, Enumerable.Repeat(float.NaN, 16 * 3 * HeadDim).ToArray()), 1, rope, cache, 0);
        bench.Backend.BeginStep(Bench.Step(1, 1, _ => (0, 3), (_, _) => 0));
        Tensor qkv = bench.Tensor(3, 3 * HeadDim), output = bench.Backend.AllocateTensor(3, HeadDim);
        bench.Attend(qkv, 1, rope, cache, 0, output);
        Assert.All(Bench.Read(output, 3), v => Assert.True(float.IsFinite(v)));
    }
}
