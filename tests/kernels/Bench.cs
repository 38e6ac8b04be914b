using System.Runtime.InteropServices;

namespace Rollout.Kernels.Tests;

/// <summary>Makes inputs and reads outputs, for any backend.</summary>
internal sealed class Bench(Backend backend, int seed = 1)
{
    private readonly Random _random = new(seed);

    public Backend Backend { get; } = backend;

    public float[] Values(int count, float scale = 1f) =>
        Enumerable.Range(0, count).Select(_ => ((float)_random.NextDouble() - 0.5f) * 2f * scale).ToArray();

    public Tensor Tensor(int rows, int columns, float scale = 1f)
    {
        Tensor tensor = Backend.AllocateTensor(rows, columns);
        tensor.Write(rows, Values(rows * columns, scale));
        return tensor;
    }

    public Tensor Tensor(int columns, float[] values)
    {
        Tensor tensor = Backend.AllocateTensor(values.Length / columns, columns);
        tensor.Write(values.Length / columns, values);
        return tensor;
    }

    public Weight Weight(int outputs, int inputs)
    {
        Weight weight = Backend.AllocateWeight(outputs, inputs);
        Backend.WriteWeight(weight, 0, MemoryMarshal.AsBytes<float>(Values(outputs * inputs)), DType.Float32);
        return weight;
    }

    public RopeTable Rope(int headDim, int positions)
    {
        float[] frequencies = Enumerable.Range(0, headDim / 2).Select(i => (float)Math.Pow(10000, -2.0 * i / headDim)).ToArray();
        return Backend.AllocateRopeTable(frequencies, positions);
    }

    /// <summary>Keys and values of one width, alike in all layers.</summary>
    public KvCache Cache(int layers, int blocks, int kvHeads, int headDim) =>
        Cache(layers, blocks, new KvLayout(kvHeads, headDim, headDim));

    public KvCache Cache(int layers, int blocks, KvLayout layout) =>
        Backend.AllocateKvCache(blocks, [.. Enumerable.Repeat(layout, layers)]);

    public void Attend(
        Tensor qkv,
        int heads,
        RopeTable rope,
        KvCache cache,
        int layer,
        Tensor output,
        float scale = 1f,
        Weight? queryNorm = null,
        Weight? keyNorm = null,
        float epsilon = 0f) =>
        Backend.Attention(new AttentionCall
        {
            Qkv = qkv,
            Heads = heads,
            QueryNorm = queryNorm,
            KeyNorm = keyNorm,
            Epsilon = epsilon,
            Rope = rope,
            Scale = scale,
            Cache = cache,
            Layer = layer,
            Output = output,
        });

    /// <summary>Stores the rows' keys and values in the cache; the attention's output is discarded.</summary>
    public void Store(Tensor qkv, int heads, RopeTable rope, KvCache cache, int layer)
    {
        using Tensor output = Backend.AllocateTensor(qkv.Rows, heads * cache.Layout(layer).ValueDim);
        Attend(qkv, heads, rope, cache, layer, output);
    }

    /// <summary>
    /// Stores whole blocks, 16 rows each, each as the beginning of another sequence: each sees only its own block, which makes it cheap to
    /// fill a long context. Keys are rotated by their places in the blocks.
    /// </summary>
    public void StoreBlocks(int[] blocks, Tensor qkv, int heads, RopeTable rope, KvCache cache, int layer)
    {
        int[] places = [.. Enumerable.Range(0, KvCache.BlockTokens)];
        Backend.BeginStep(Step(1, [.. blocks.Select(_ => places)], [.. blocks.Select(block => new[] { block })]));
        Store(qkv, heads, rope, cache, layer);
    }

    public static float[] Read(Tensor tensor, int rows)
    {
        float[] values = new float[rows * tensor.Columns];
        tensor.Read(rows, values);
        return values;
    }

    public static float[] Row(float[] values, int columns, int row) => values.AsSpan(row * columns, columns).ToArray();

    /// <summary>Rows of one sequence each, or, with several lengths, a step over several sequences.</summary>
    public static StepLayout Step(int sequences, int maxBlocks, Func<int, (int Start, int End)> positions, Func<int, int, int> block)
    {
        int rows = Enumerable.Range(0, sequences).Sum(s => positions(s).End - positions(s).Start);
        StepLayout step = new(Math.Max(1, rows), sequences, maxBlocks, 1, 0, 0) { SequenceCount = sequences };
        int row = 0;
        for (int s = 0; s < sequences; s++)
        {
            step.RowStart[s] = row;
            (int start, int end) = positions(s);
            for (int p = start; p < end; p++)
                step.Positions[row++] = p;
            for (int b = 0; b < maxBlocks; b++)
                step.BlockTables[(s * maxBlocks) + b] = block(s, b);
        }

        step.RowStart[sequences] = row;
        return step;
    }

    /// <summary>A step of any positions over any tables. Entries that a table does not set are no blocks.</summary>
    public static StepLayout Step(int maxBlocks, int[][] positions, int[][] tables)
    {
        StepLayout step = new(Math.Max(1, positions.Sum(p => p.Length)), positions.Length, maxBlocks, 1, 0, 0)
        {
            SequenceCount = positions.Length,
        };
        Array.Fill(step.BlockTables, -1);
        for (int s = 0; s < positions.Length; s++)
        {
            positions[s].CopyTo(step.Positions, step.RowStart[s]);
            step.RowStart[s + 1] = step.RowStart[s] + positions[s].Length;
            tables[s].CopyTo(step.BlockTables, s * maxBlocks);
        }

        return step;
    }

    /// <summary>Fills every slot of a layer with values that a failed sequence would have left there.</summary>
    public void Soil(KvCache cache, int layer)
    {
        KvLayout layout = cache.Layout(layer);
        int tokens = cache.Blocks * KvCache.BlockTokens, columns = Columns(layout.KvHeads, layout);
        using Tensor garbage = Tensor(columns, [.. Enumerable.Repeat(float.NaN, tokens * columns)]);
        using RopeTable rope = Rope(layout.KeyDim, KvCache.BlockTokens);
        StoreBlocks([.. Enumerable.Range(0, cache.Blocks)], garbage, layout.KvHeads, rope, cache, layer);
    }

    /// <summary>Width of a row of queries, keys and values.</summary>
    public static int Columns(int heads, KvLayout layout) =>
        (heads * layout.KeyDim) + (layout.KvHeads * (layout.KeyDim + layout.ValueDim));

    /// <summary>One output row and query for every entry.</summary>
    public static StepLayout Queries(params SampleQuery[] queries) => Queries(queries, []);

    public static StepLayout Queries(SampleQuery[] queries, (int Id, float Value)[] biases, int alternatives = 0)
    {
        int outputs = queries.Length == 0 ? 1 : queries.Max(q => q.OutputIndex) + 1;
        StepLayout step = new(outputs, outputs, 1, queries.Length, alternatives, biases.Length)
        {
            SequenceCount = outputs,
            OutputCount = outputs,
            QueryCount = queries.Length,
        };
        for (int o = 0; o <= outputs; o++)
        {
            step.RowStart[o] = o;
            if (o < outputs)
                step.OutputRows[o] = o;
        }

        queries.CopyTo(step.Queries, 0);
        for (int i = 0; i < biases.Length; i++)
            (step.BiasIds[i], step.BiasValues[i]) = biases[i];
        return step;
    }

    public static SampleQuery Query(
        int output = 0, float temperature = 1f, int topK = 0, float topP = 1f, float minP = 0f, int target = -1) =>
        new()
        {
            OutputIndex = output,
            Target = target,
            Temperature = temperature,
            TopK = topK,
            TopP = topP,
            MinP = minP,
            Seed = 1234567890123,
        };

    public static void Close(float[] expected, float[] actual, double tolerance)
    {
        Assert.Equal(expected.Length, actual.Length);
        for (int i = 0; i < expected.Length; i++)
        {
            if (!(Math.Abs(expected[i] - actual[i]) <= tolerance))
                Assert.Fail($"Element {i}: expected {expected[i]:R}, found {actual[i]:R}, tolerance {tolerance:R}.");
        }
    }

    public static void SameBits(float[] expected, float[] actual, string what)
    {
        Assert.Equal(expected.Length, actual.Length);
        for (int i = 0; i < expected.Length; i++)
        {
            if (BitConverter.SingleToInt32Bits(expected[i]) != BitConverter.SingleToInt32Bits(actual[i]))
                Assert.Fail($"{what}, element {i}: {expected[i]:R} and {actual[i]:R}.");
        }
    }
}
