using System.Runtime.InteropServices;

namespace Rollout.Kernels.Tests;

/// <summary>The plainest arithmetic that fits the contract: scalar, float64, loops. Every other backend is compared to it.</summary>
/// <param name="format">bf16, or fp32: how matrices are rounded.</param>
public sealed partial class ReferenceBackend(WeightFormat format = WeightFormat.BFloat16) : IBackend
{
    private StepLayout? _step;

    public string Name => "reference";

    public int WriteRows => 1;

    public long AvailableBytes => long.MaxValue;

    public long HeldBytes => 0;

    public int KvElementBytes => sizeof(double);

    public long KvCacheBudget => 0;

    public int LogitRows => 64;

    private StepLayout Step => _step ?? throw new InvalidOperationException("BeginStep comes first.");

    public WeightFormat WeightFormat => format;

    public void Dispose()
    {
    }

    public Tensor AllocateTensor(int rows, int columns, bool rounded = false)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(rows, 1);
        ArgumentOutOfRangeException.ThrowIfLessThan(columns, 1);
        return new RefTensor(rows, columns) { Maker = this };
    }

    public Weight AllocateWeight(int outputs, int inputs)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(outputs, 1);
        ArgumentOutOfRangeException.ThrowIfLessThan(inputs, 1);
        return new RefWeight(outputs, inputs) { Maker = this };
    }

    public KvCache AllocateKvCache(int layers, int blocks, int kvHeads, int headDim)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(layers, 1);
        if (headDim < 2 || headDim % 2 != 0)
            throw new ArgumentException("Odd.", nameof(headDim));
        return new RefCache(layers, blocks, kvHeads, headDim) { Maker = this };
    }

    public RopeTable AllocateRopeTable(ReadOnlySpan<float> inverseFrequencies, int positions, float scale)
    {
        var table = new RefRope(positions, inverseFrequencies.Length * 2) { Maker = this };
        for (int p = 0; p < positions; p++)
        {
            for (int i = 0; i < inverseFrequencies.Length; i++)
            {
                float angle = p * inverseFrequencies[i];
                table.Cos[p, i] = Math.Cos(angle) * scale;
                table.Sin[p, i] = Math.Sin(angle) * scale;
            }
        }

        return table;
    }

    public void WriteWeight(Weight destination, long element, ReadOnlySpan<byte> source, DType type)
    {
        var weight = (RefWeight)Own(destination, nameof(destination));
        if (source.Length % type.Size() != 0)
            throw new ArgumentException("Half an element.", nameof(source));
        int count = source.Length / type.Size();
        if (element < 0 || element > weight.Data.Length)
            throw new ArgumentOutOfRangeException(nameof(element));
        if (element + count > weight.Data.Length)
            throw new ArgumentException("Too many.", nameof(source));
        if (!weight.IsVector && (element % weight.Inputs != 0 || count % weight.Inputs != 0))
            throw new ArgumentException("Part of a row.", nameof(source));
        Store(weight, element, source, type);
    }

    private void Store(RefWeight weight, long element, ReadOnlySpan<byte> source, DType type)
    {
        for (int i = 0; i < source.Length / type.Size(); i++)
        {
            float value = type switch
            {
                DType.BFloat16 => BitConverter.UInt32BitsToSingle((uint)MemoryMarshal.Cast<byte, ushort>(source)[i] << 16),
                DType.Float16 => (float)MemoryMarshal.Cast<byte, Half>(source)[i],
                _ => MemoryMarshal.Cast<byte, float>(source)[i],
            };
            weight.Data[element + i] = weight.IsVector || format == WeightFormat.Float32 ? value : Round(value);
        }
    }

    public void WriteWeightElements(Weight destination, long element, ReadOnlySpan<uint> indices, ReadOnlySpan<byte> values, DType type)
    {
        long elements = ((RefWeight)Own(destination, nameof(destination))).Data.Length;
        if (values.Length != indices.Length * type.Size())
            throw new ArgumentException("Not a value for every index.", nameof(values));
        if (element < 0 || element > elements)
            throw new ArgumentOutOfRangeException(nameof(element));
        foreach (uint index in indices)
        {
            if (element + index >= elements)
                throw new ArgumentException("Past the end.", nameof(indices));
        }

        for (int i = 0; i < indices.Length; i++)
            Store((RefWeight)destination, element + indices[i], values.Slice(i * type.Size(), type.Size()), type);
    }

    public void CopyWeight(Weight source, Weight destination)
    {
        var from = (RefWeight)Own(source, nameof(source));
        var to = (RefWeight)Own(destination, nameof(destination));
        if (from.Outputs != to.Outputs || from.Inputs != to.Inputs)
            throw new ArgumentException("Another shape.", nameof(destination));
        from.Data.CopyTo(to.Data, 0);
    }

    public void ReadWeight(Weight source, long element, Span<float> destination)
    {
        var weight = (RefWeight)Own(source, nameof(source));
        if (element < 0 || element > weight.Data.Length)
            throw new ArgumentOutOfRangeException(nameof(element));
        if (element + destination.Length > weight.Data.Length)
            throw new ArgumentException("Too many.", nameof(destination));
        weight.Data.AsSpan((int)element, destination.Length).CopyTo(destination);
    }

    /// <summary>To the nearest bfloat16, ties to even, by trying both neighbours.</summary>
    public static float Round(float value)
    {
        if (float.IsNaN(value))
            return value;
        uint bits = BitConverter.SingleToUInt32Bits(value);
        uint below = bits & 0xFFFF0000, rest = bits & 0xFFFF;
        bool up = rest > 0x8000 || (rest == 0x8000 && (below & 0x10000) != 0);
        return BitConverter.UInt32BitsToSingle(up ? below + 0x10000 : below);
    }

    public int StepsUnderWay => 1;

    public void BeginStep(StepLayout step)
    {
        for (int row = 0; row < step.RowCount; row++)
        {
            if (step.Positions[row] < 0 || step.Positions[row] / KvCache.BlockTokens >= step.MaxBlocks)
                throw new ArgumentException("Position.", nameof(step));
        }

        for (int o = 0; o < step.OutputCount; o++)
        {
            if ((uint)step.OutputRows[o] >= (uint)step.RowCount)
                throw new ArgumentException("Output row.", nameof(step));
        }

        _step = step;
    }

    public void Embed(Weight table, Tensor output)
    {
        RefWeight weight = Matrix(table, nameof(table));
        RefTensor tensor = Own(output, nameof(output), Step.RowCount, table.Inputs);
        for (int row = 0; row < Step.RowCount; row++)
        {
            if ((uint)Step.TokenIds[row] >= (uint)table.Outputs)
                throw new ArgumentException("Token.", nameof(table));
            for (int i = 0; i < table.Inputs; i++)
                tensor[row, i] = weight[Step.TokenIds[row], i];
        }
    }

    public void RmsNorm(Tensor input, Weight scale, float epsilon, Tensor output, int rows)
    {
        RefTensor x = Own(input, nameof(input), rows), y = Own(output, nameof(output), rows, input.Columns);
        RefWeight weight = Vector(scale, nameof(scale), input.Columns);
        for (int row = 0; row < rows; row++)
        {
            double[] normed = Norm(Enumerable.Range(0, x.Columns).Select(i => x[row, i]).ToArray(), weight, epsilon);
            for (int i = 0; i < x.Columns; i++)
                y[row, i] = normed[i];
        }
    }

    public void MatMul(Tensor input, Weight weight, Weight? bias, Tensor output, int rows) =>
        Multiply(input, weight, bias, Own(output, nameof(output), rows, weight.Outputs), rows, 0);

    public void MatMulAdd(Tensor input, Weight weight, Weight? bias, Tensor residual, int rows) =>
        Multiply(input, weight, bias, Own(residual, nameof(residual), rows, weight.Outputs), rows, 1);

    public void RopeStoreKv(
        Tensor qkv, int heads, Weight? queryNorm, Weight? keyNorm, float epsilon, RopeTable rope, KvCache cache, int layer)
    {
        var store = (RefCache)Own(cache, nameof(cache));
        Heads(heads, cache, layer);
        int headDim = cache.HeadDim;
        RefTensor x = Own(qkv, nameof(qkv), Step.RowCount, (heads + (2 * cache.KvHeads)) * headDim);
        var table = (RefRope)Own(rope, nameof(rope));
        if (rope.HeadDim != headDim)
            throw new ArgumentException("Head dimension.", nameof(rope));
        RefWeight? qn = queryNorm == null ? null : Vector(queryNorm, nameof(queryNorm), headDim);
        RefWeight? kn = keyNorm == null ? null : Vector(keyNorm, nameof(keyNorm), headDim);
        for (int row = 0; row < Step.RowCount; row++)
        {
            int position = Step.Positions[row];
            if (position >= rope.Positions)
                throw new ArgumentException("Position.", nameof(rope));
            (int block, int slot) = Slot(row, position, cache);
            for (int h = 0; h < heads + cache.KvHeads; h++)
            {
                double[] head = Enumerable.Range(0, headDim).Select(i => x[row, (h * headDim) + i]).ToArray();
                RefWeight? norm = h < heads ? qn : kn;
                if (norm != null)
                    head = Norm(head, norm, epsilon);
                for (int i = 0; i < headDim / 2; i++)
                {
                    double a = head[i], b = head[i + (headDim / 2)], c = table.Cos[position, i], s = table.Sin[position, i];
                    head[i] = (a * c) - (b * s);
                    head[i + (headDim / 2)] = (b * c) + (a * s);
                }

                for (int i = 0; i < headDim; i++)
                {
                    x[row, (h * headDim) + i] = head[i];
                    if (h >= heads)
                        store.Keys[layer, block, h - heads, slot, i] = head[i];
                }
            }

            for (int h = 0; h < cache.KvHeads; h++)
            {
                for (int i = 0; i < headDim; i++)
                    store.Values[layer, block, h, slot, i] = x[row, ((heads + cache.KvHeads + h) * headDim) + i];
            }
        }
    }

    public void Attend(Tensor qkv, int heads, float scale, KvCache cache, int layer, Tensor output)
    {
        var store = (RefCache)Own(cache, nameof(cache));
        Heads(heads, cache, layer);
        int headDim = cache.HeadDim;
        RefTensor x = Own(qkv, nameof(qkv), Step.RowCount), y = Own(output, nameof(output), Step.RowCount, heads * headDim);
        if (qkv.Columns < heads * headDim)
            throw new ArgumentException("Columns.", nameof(qkv));
        for (int row = 0; row < Step.RowCount; row++)
        {
            for (int h = 0; h < heads; h++)
            {
                int kvHead = h / (heads / cache.KvHeads);
                double[] scores = new double[Step.Positions[row] + 1];
                for (int p = 0; p < scores.Length; p++)
                {
                    (int block, int slot) = Slot(row, p, cache);
                    for (int i = 0; i < headDim; i++)
                        scores[p] += x[row, (h * headDim) + i] * store.Keys[layer, block, kvHead, slot, i] * scale;
                }

                double max = scores.Max();
                double total = scores.Sum(s => Math.Exp(s - max));
                for (int i = 0; i < headDim; i++)
                {
                    double sum = 0;
                    for (int p = 0; p < scores.Length; p++)
                    {
                        (int block, int slot) = Slot(row, p, cache);
                        sum += Math.Exp(scores[p] - max) / total * store.Values[layer, block, kvHead, slot, i];
                    }

                    y[row, (h * headDim) + i] = sum;
                }
            }
        }
    }

    public void GatedSilu(Tensor gateUp, Tensor output, int rows)
    {
        RefTensor y = Own(output, nameof(output), rows), x = Own(gateUp, nameof(gateUp), rows, 2 * output.Columns);
        for (int row = 0; row < rows; row++)
        {
            for (int i = 0; i < y.Columns; i++)
                y[row, i] = x[row, i] / (1 + Math.Exp(-x[row, i])) * x[row, y.Columns + i];
        }
    }

    public void GatherRows(Tensor input, int first, int count, Tensor output)
    {
        Outputs(first, count);
        RefTensor x = Own(input, nameof(input), Step.RowCount), y = Own(output, nameof(output), count, input.Columns);
        for (int k = 0; k < count; k++)
        {
            for (int i = 0; i < x.Columns; i++)
                y[k, i] = x[Step.OutputRows[first + k], i];
        }
    }

    public void Sample(Tensor logits, int first, int count)
    {
        Outputs(first, count);
        RefTensor z = Own(logits, nameof(logits), count);
        for (int q = 0; q < Step.QueryCount; q++)
        {
            SampleQuery query = Step.Queries[q];
            if (query.OutputIndex < first || query.OutputIndex >= first + count)
                continue;
            double[] row = Enumerable.Range(0, z.Columns).Select(v => z[query.OutputIndex - first, v]).ToArray();
            bool finite = !row.Any(v => double.IsNaN(v) || double.IsPositiveInfinity(v)) && !row.All(double.IsNegativeInfinity);
            Step.Results[q] = finite ? Sampling.Answer(row, query, Step) : SampleResult.Nothing;
        }
    }

    public void FinishStep(StepLayout step)
    {
    }

    public void CopyBlock(KvCache cache, int from, int to)
    {
        var store = (RefCache)Own(cache, nameof(cache));
        if ((uint)from >= (uint)cache.Blocks)
            throw new ArgumentOutOfRangeException(nameof(from));
        if ((uint)to >= (uint)cache.Blocks)
            throw new ArgumentOutOfRangeException(nameof(to));
        for (int l = 0; l < cache.Layers; l++)
        {
            for (int h = 0; h < cache.KvHeads; h++)
            {
                for (int t = 0; t < KvCache.BlockTokens; t++)
                {
                    for (int i = 0; i < cache.HeadDim; i++)
                    {
                        store.Keys[l, to, h, t, i] = store.Keys[l, from, h, t, i];
                        store.Values[l, to, h, t, i] = store.Values[l, from, h, t, i];
                    }
                }
            }
        }
    }

    private void Multiply(Tensor input, Weight weight, Weight? bias, RefTensor output, int rows, double keep)
    {
        RefWeight w = Matrix(weight, nameof(weight));
        RefTensor x = Own(input, nameof(input), rows, weight.Inputs);
        RefWeight? b = bias == null ? null : Vector(bias, nameof(bias), weight.Outputs);
        for (int row = 0; row < rows; row++)
        {
            for (int o = 0; o < w.Outputs; o++)
            {
                double sum = 0;
                for (int i = 0; i < w.Inputs; i++)
                    sum += x[row, i] * w[o, i];
                output[row, o] = (keep * output[row, o]) + sum + (b == null ? 0 : b[0, o]);
            }
        }
    }

    private static double[] Norm(double[] x, RefWeight scale, double epsilon)
    {
        double factor = 1 / Math.Sqrt(x.Average(v => v * v) + epsilon);
        return x.Select((v, i) => v * factor * scale[0, i]).ToArray();
    }

    private (int Block, int Slot) Slot(int row, int position, KvCache cache)
    {
        int sequence = 0;
        while (Step.RowStart[sequence + 1] <= row)
            sequence++;
        int block = Step.BlockTables[(sequence * Step.MaxBlocks) + (position / KvCache.BlockTokens)];
        return (uint)block < (uint)cache.Blocks
            ? (block, position % KvCache.BlockTokens)
            : throw new ArgumentException("Block.", nameof(cache));
    }

    private void Outputs(int first, int count)
    {
        if (first < 0 || first > Step.OutputCount)
            throw new ArgumentOutOfRangeException(nameof(first));
        if (count < 0 || first + count > Step.OutputCount)
            throw new ArgumentOutOfRangeException(nameof(count));
    }

    private static void Heads(int heads, KvCache cache, int layer)
    {
        if (heads < 1 || heads % cache.KvHeads != 0)
            throw new ArgumentOutOfRangeException(nameof(heads));
        if ((uint)layer >= (uint)cache.Layers)
            throw new ArgumentOutOfRangeException(nameof(layer));
    }

    private DeviceMemory Own(DeviceMemory memory, string name) =>
        memory is IOwned { Alive: true } owned && owned.Maker == this ? memory : throw new ArgumentException("Foreign or disposed.", name);

    private RefTensor Own(Tensor tensor, string name, int rows, int columns = 0)
    {
        var own = (RefTensor)Own(tensor, name);
        if (rows < 0 || rows > own.Rows)
            throw new ArgumentOutOfRangeException(name);
        return columns == 0 || columns == own.Columns ? own : throw new ArgumentException("Columns.", name);
    }

    private RefWeight Matrix(Weight weight, string name)
    {
        var own = (RefWeight)Own(weight, name);
        return own.IsVector ? throw new ArgumentException("Vector.", name) : own;
    }

    private RefWeight Vector(Weight weight, string name, int length)
    {
        var own = (RefWeight)Own(weight, name);
        return own.IsVector && own.Inputs == length ? own : throw new ArgumentException("Length.", name);
    }
}
