using System.Runtime.InteropServices;

namespace Rollout.Kernels.Tests;

/// <summary>The plainest arithmetic that fits the contract: scalar, float64, loops. Every other backend is compared to it.</summary>
/// <param name="format">bf16, or fp32: how matrices are rounded.</param>
public sealed partial class ReferenceBackend(WeightFormat format = WeightFormat.BFloat16) : Backend
{
    public override string Name => "reference";

    public override int WriteRows => 1;

    public override long AvailableBytes => long.MaxValue;

    public override long HeldBytes => 0;

    public override int KvElementBytes => sizeof(double);

    public override long KvCacheBudget => 0;

    public override int LogitRows => 64;

    public override int StepsInFlight => 1;

    public override WeightFormat WeightFormat => format;

    protected override void DisposeCore()
    {
    }

    protected override Tensor AllocateTensorCore(int rows, int columns, bool rounded) => new RefTensor(this, rows, columns);

    protected override Weight AllocateWeightCore(int outputs, int inputs) => new RefWeight(this, outputs, inputs);

    protected override KvCache AllocateKvCacheCore(int blocks, IReadOnlyList<KvLayout> layers) => new RefCache(this, blocks, layers);

    protected override RopeTable AllocateRopeTableCore(ReadOnlySpan<float> inverseFrequencies, int positions)
    {
        RefRope table = new(this, positions, inverseFrequencies.Length * 2);
        for (int p = 0; p < positions; p++)
        {
            for (int i = 0; i < inverseFrequencies.Length; i++)
            {
                float angle = p * inverseFrequencies[i];
                table.Cos[p, i] = Math.Cos(angle);
                table.Sin[p, i] = Math.Sin(angle);
            }
        }

        return table;
    }

    protected override void WriteWeightCore(Weight destination, long element, ReadOnlySpan<byte> source, DType type)
    {
        RefWeight weight = (RefWeight)destination;
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

    protected override void WriteWeightElementsCore(
        Weight destination, long element, ReadOnlySpan<uint> indices, ReadOnlySpan<byte> values, DType type)
    {
        for (int i = 0; i < indices.Length; i++)
            WriteWeightCore(destination, element + indices[i], values.Slice(i * type.Size(), type.Size()), type);
    }

    protected override void CopyWeightCore(Weight source, Weight destination) =>
        ((RefWeight)source).Data.CopyTo(((RefWeight)destination).Data, 0);

    protected override void ReadWeightCore(Weight source, long element, Span<float> destination) =>
        ((RefWeight)source).Data.AsSpan((int)element, destination.Length).CopyTo(destination);

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

    protected override void BeginStepCore(StepLayout step)
    {
    }

    protected override void EmbedCore(Weight table, Tensor output)
    {
        (RefWeight weight, RefTensor tensor) = ((RefWeight)table, (RefTensor)output);
        for (int row = 0; row < Step.RowCount; row++)
        {
            for (int i = 0; i < table.Inputs; i++)
                tensor[row, i] = weight[Step.TokenIds[row], i];
        }
    }

    protected override void RmsNormCore(Tensor input, Weight scale, float epsilon, Tensor output, int rows)
    {
        (RefTensor x, RefTensor y) = ((RefTensor)input, (RefTensor)output);
        for (int row = 0; row < rows; row++)
        {
            double[] normed = Norm(Enumerable.Range(0, x.Columns).Select(i => x[row, i]).ToArray(), (RefWeight)scale, epsilon);
            for (int i = 0; i < x.Columns; i++)
                y[row, i] = normed[i];
        }
    }

    protected override void RmsNormAddCore(Tensor input, Weight scale, float epsilon, Tensor residual, int rows)
    {
        (RefTensor x, RefTensor y) = ((RefTensor)input, (RefTensor)residual);
        for (int row = 0; row < rows; row++)
        {
            double[] normed = Norm(Enumerable.Range(0, x.Columns).Select(i => x[row, i]).ToArray(), (RefWeight)scale, epsilon);
            for (int i = 0; i < x.Columns; i++)
                y[row, i] += normed[i];
        }
    }

    protected override void MatMulCore(Tensor input, Weight weight, Weight? bias, Tensor output, int rows, bool add)
    {
        (RefTensor x, RefWeight w, RefWeight? b, RefTensor y) =
            ((RefTensor)input, (RefWeight)weight, (RefWeight?)bias, (RefTensor)output);
        for (int row = 0; row < rows; row++)
        {
            for (int o = 0; o < w.Outputs; o++)
            {
                double sum = 0;
                for (int i = 0; i < w.Inputs; i++)
                    sum += x[row, i] * w[o, i];
                y[row, o] = (add ? y[row, o] : 0) + sum + (b == null ? 0 : b[0, o]);
            }
        }
    }

    protected override void AttentionCore(in AttentionCall call)
    {
        for (int row = 0; row < Step.RowCount; row++)
            RotateAndStore(row, call);
        for (int row = 0; row < Step.RowCount; row++)
            Attend(row, call);
    }

    private void RotateAndStore(int row, in AttentionCall call)
    {
        (RefTensor x, RefRope table, RefCache cache) = ((RefTensor)call.Qkv, (RefRope)call.Rope, (RefCache)call.Cache);
        KvLayout layout = cache.Layout(call.Layer);
        int position = Step.Positions[row], heads = call.Heads, half = layout.KeyDim / 2;
        Span<double> values = x.Row(row);
        NormHeads(values[..(heads * layout.KeyDim)], call.QueryNorm, call.Epsilon);
        NormHeads(values.Slice(heads * layout.KeyDim, layout.KvHeads * layout.KeyDim), call.KeyNorm, call.Epsilon);
        for (int h = 0; h < heads + layout.KvHeads; h++, values = values[layout.KeyDim..])
        {
            Span<double> head = values[..layout.KeyDim];
            for (int i = 0; i < half; i++)
            {
                double a = head[i], b = head[i + half], c = table.Cos[position, i], s = table.Sin[position, i];
                head[i] = (a * c) - (b * s);
                head[i + half] = (b * c) + (a * s);
            }

            if (h >= heads)
                head.CopyTo(cache.Key(call.Layer, Block(row, position), h - heads, position % KvCache.BlockTokens));
        }

        for (int h = 0; h < layout.KvHeads; h++, values = values[layout.ValueDim..])
            values[..layout.ValueDim].CopyTo(cache.Value(call.Layer, Block(row, position), h, position % KvCache.BlockTokens));
    }

    private static void NormHeads(Span<double> heads, Weight? norm, double epsilon)
    {
        if (norm is null)
            return;
        for (; !heads.IsEmpty; heads = heads[norm.Inputs..])
            Norm(heads[..norm.Inputs].ToArray(), (RefWeight)norm, epsilon).CopyTo(heads);
    }

    private void Attend(int row, in AttentionCall call)
    {
        (RefTensor x, RefTensor y, RefCache cache) = ((RefTensor)call.Qkv, (RefTensor)call.Output, (RefCache)call.Cache);
        KvLayout layout = cache.Layout(call.Layer);
        int seen = (Step.Positions[row] / KvCache.BlockTokens) + 1;
        int[] blocks = [.. Enumerable.Range(0, seen).Select(b => Block(row, b * KvCache.BlockTokens))];
        double[] weights = new double[Step.Positions[row] + 1];
        for (int h = 0; h < call.Heads; h++)
        {
            int kvHead = h / (call.Heads / layout.KvHeads);
            ReadOnlySpan<double> query = x.Row(row).Slice(h * layout.KeyDim, layout.KeyDim);
            for (int p = 0; p < weights.Length; p++)
            {
                ReadOnlySpan<double> key = cache.Key(call.Layer, blocks[p / KvCache.BlockTokens], kvHead, p % KvCache.BlockTokens);
                double score = 0;
                for (int i = 0; i < key.Length; i++)
                    score += query[i] * key[i];
                weights[p] = score * call.Scale;
            }

            double max = weights.Max(), total = 0;
            for (int p = 0; p < weights.Length; p++)
                total += weights[p] = Math.Exp(weights[p] - max);
            Span<double> output = y.Row(row).Slice(h * layout.ValueDim, layout.ValueDim);
            output.Clear();
            for (int p = 0; p < weights.Length; p++)
            {
                ReadOnlySpan<double> value = cache.Value(call.Layer, blocks[p / KvCache.BlockTokens], kvHead, p % KvCache.BlockTokens);
                for (int i = 0; i < value.Length; i++)
                    output[i] += weights[p] / total * value[i];
            }
        }
    }

    protected override void GatedSiluCore(Tensor gateUp, Tensor output, int rows)
    {
        (RefTensor x, RefTensor y) = ((RefTensor)gateUp, (RefTensor)output);
        for (int row = 0; row < rows; row++)
        {
            for (int i = 0; i < y.Columns; i++)
                y[row, i] = x[row, i] / (1 + Math.Exp(-x[row, i])) * x[row, y.Columns + i];
        }
    }

    protected override void GatherRowsCore(Tensor input, int first, int count, Tensor output)
    {
        (RefTensor x, RefTensor y) = ((RefTensor)input, (RefTensor)output);
        for (int k = 0; k < count; k++)
        {
            for (int i = 0; i < x.Columns; i++)
                y[k, i] = x[Step.OutputRows[first + k], i];
        }
    }

    protected override void SampleCore(Tensor logits, int first, int count, int begin, int end)
    {
        RefTensor z = (RefTensor)logits;
        for (int q = begin; q < end; q++)
        {
            SampleQuery query = Step.Queries[q];
            double[] row = Enumerable.Range(0, z.Columns).Select(v => z[query.OutputIndex - first, v]).ToArray();
            bool finite = !row.Any(v => double.IsNaN(v) || double.IsPositiveInfinity(v)) && !row.All(double.IsNegativeInfinity);
            Step.Results[q] = finite ? Sampling.Answer(row, query, Step) : SampleResult.Nothing;
        }
    }

    protected override void FinishStepCore(StepLayout step)
    {
    }

    protected override void CopyBlockCore(KvCache cache, int from, int to)
    {
        RefCache store = (RefCache)cache;
        for (int l = 0; l < cache.Layers; l++)
        {
            for (int h = 0; h < cache.Layout(l).KvHeads; h++)
            {
                for (int t = 0; t < KvCache.BlockTokens; t++)
                {
                    store.Key(l, from, h, t).CopyTo(store.Key(l, to, h, t));
                    store.Value(l, from, h, t).CopyTo(store.Value(l, to, h, t));
                }
            }
        }
    }

    private static double[] Norm(double[] x, RefWeight scale, double epsilon)
    {
        double factor = 1 / Math.Sqrt(x.Average(v => v * v) + epsilon);
        return x.Select((v, i) => v * factor * scale[0, i]).ToArray();
    }

    /// <summary>The block that has the position, in the row's sequence.</summary>
    private int Block(int row, int position)
    {
        int sequence = 0;
        while (Step.RowStart[sequence + 1] <= row)
            sequence++;
        return Step.BlockTables[(sequence * Step.MaxBlocks) + (position / KvCache.BlockTokens)];
    }
}
