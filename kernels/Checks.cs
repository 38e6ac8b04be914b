using System.Runtime.CompilerServices;

namespace Rollout.Kernels;

/// <summary>
/// Checks for mismatched shapes and indices out of range, which every backend refuses. Names are those of the caller's parameters.
/// </summary>
internal static class Checks
{
    // ---- Weights.

    /// <summary>A write of whole rows, or of any part of a vector.</summary>
    public static void Write(Weight destination, long element, ReadOnlySpan<byte> source, DType type)
    {
        CheckType(type);
        if (source.Length % type.Size() != 0)
            throw new ArgumentException($"{source.Length} bytes are no whole number of {type} elements.", nameof(source));
        long count = source.Length / type.Size();
        Elements(destination, element, count, nameof(source));
        if (!destination.IsVector && (element % destination.Inputs != 0 || count % destination.Inputs != 0))
        {
            throw new ArgumentException(
                $"{count} elements from element {element} on are no whole rows of {destination.Inputs}.", nameof(source));
        }
    }

    public static void WriteElements(Weight destination, long element, ReadOnlySpan<uint> indices, ReadOnlySpan<byte> values, DType type)
    {
        CheckType(type);
        if (values.Length != (long)indices.Length * type.Size())
            throw new ArgumentException($"{values.Length} bytes for {indices.Length} indices of {type}.", nameof(values));
        long total = (long)destination.Outputs * destination.Inputs, room = total - element;
        if (element < 0 || room < 0)
            throw new ArgumentOutOfRangeException(nameof(element), element, $"The weight has {total} elements.");
        foreach (uint index in indices)
        {
            if (index >= room)
                throw new ArgumentException($"Index {index} from element {element} on is past the weight's end.", nameof(indices));
        }
    }

    public static void SameShape(Weight source, Weight destination)
    {
        if ((source.Outputs, source.Inputs) != (destination.Outputs, destination.Inputs))
        {
            throw new ArgumentException(
                $"[{destination.Outputs}, {destination.Inputs}], needed [{source.Outputs}, {source.Inputs}].", nameof(destination));
        }
    }

    public static void Elements(Weight weight, long element, long count, string name)
    {
        long total = (long)weight.Outputs * weight.Inputs;
        if (element < 0 || element > total)
            throw new ArgumentOutOfRangeException(nameof(element), element, $"The weight has {total} elements.");
        if (count > total - element)
            throw new ArgumentException($"{count} elements from element {element} on, the weight has {total}.", name);
    }

    private static void CheckType(DType type)
    {
        if (type is not (DType.BFloat16 or DType.Float16 or DType.Float32))
            throw new ArgumentOutOfRangeException(nameof(type));
    }

    // ---- The step.

    /// <summary>Refuses a step whose parts are inconsistent, and records the sequence of every row.</summary>
    public static void Step(StepLayout step, int[] rowSequence)
    {
        if (step.SequenceCount < 0 || step.SequenceCount >= step.RowStart.Length || step.RowStart[0] != 0)
            throw new ArgumentException($"{step.SequenceCount} sequences, first row {step.RowStart[0]}.", nameof(step));
        for (int s = 0; s < step.SequenceCount; s++)
        {
            int start = step.RowStart[s], end = step.RowStart[s + 1];
            if (end < start || end > step.TokenIds.Length)
                throw new ArgumentException($"Sequence {s} has rows {start} to {end}.", nameof(step));
            for (int row = start; row < end; row++)
            {
                int position = step.Positions[row];
                if (position < 0
                    || position / KvCache.BlockTokens >= step.MaxBlocks
                    || (row > start && position <= step.Positions[row - 1]))
                {
                    throw new ArgumentException($"Row {row} has position {position}: out of range or not ascending.", nameof(step));
                }

                rowSequence[row] = s;
            }
        }

        int rows = step.RowCount;
        if (step.OutputCount < 0 || step.OutputCount > step.OutputRows.Length)
            throw new ArgumentException($"{step.OutputCount} output rows.", nameof(step));
        for (int o = 0; o < step.OutputCount; o++)
        {
            if ((uint)step.OutputRows[o] >= (uint)rows)
                throw new ArgumentException($"Output row {o} is row {step.OutputRows[o]} of {rows}.", nameof(step));
        }

        if (step.QueryCount < 0 || step.QueryCount > step.Queries.Length)
            throw new ArgumentException($"{step.QueryCount} queries.", nameof(step));
    }

    /// <param name="step">The step.</param>
    /// <param name="table">Of embeddings.</param>
    /// <param name="answers">Number of queries of the previous step whose answers may be tokens.</param>
    public static void Tokens(StepLayout step, Weight table, int answers = 0)
    {
        for (int row = 0; row < step.RowCount; row++)
        {
            int token = step.TokenIds[row];
            if (token < 0 && ~token >= answers)
                throw new ArgumentException($"Row {row} waits for answer {~token} of {answers}.", nameof(table));
            if (token >= table.Outputs)
                throw new ArgumentException($"Row {row} has token {token} of {table.Outputs}.", nameof(table));
        }
    }

    public static void Differ(Tensor input, Tensor output, [CallerArgumentExpression(nameof(input))] string? name = null)
    {
        if (ReferenceEquals(input, output))
            throw new ArgumentException("Input and output are the same tensor.", name);
    }

    public static void Heads(int heads, KvLayout layout, [CallerArgumentExpression(nameof(heads))] string? name = null)
    {
        if (heads < 1 || heads % layout.KvHeads != 0)
            throw new ArgumentOutOfRangeException(name, heads, $"Needed a multiple of the cache's {layout.KvHeads} heads.");
    }

    public static void Layer(int layer, KvCache cache, [CallerArgumentExpression(nameof(layer))] string? name = null)
    {
        if ((uint)layer >= (uint)cache.Layers)
            throw new ArgumentOutOfRangeException(name, layer, $"The cache has {cache.Layers} layers.");
    }

    public static void RopeWidth(RopeTable rope, KvLayout layout, [CallerArgumentExpression(nameof(rope))] string? name = null)
    {
        if (rope.HeadDim != layout.KeyDim)
            throw new ArgumentException($"For heads of {rope.HeadDim}, the cache has {layout.KeyDim}.", name);
    }

    /// <summary>Every row's position is within the table.</summary>
    public static void Angles(StepLayout step, RopeTable rope, string name)
    {
        for (int row = 0; row < step.RowCount; row++)
        {
            if (step.Positions[row] >= rope.Positions)
                throw new ArgumentException($"Row {row} is at position {step.Positions[row]} of {rope.Positions}.", name);
        }
    }

    /// <summary>All blocks that a sequence's rows attend to, their own slots included, are in the cache.</summary>
    public static void Context(StepLayout step, KvCache cache, string name)
    {
        for (int s = 0; s < step.SequenceCount; s++)
        {
            int last = step.RowStart[s + 1] - 1;
            if (last < step.RowStart[s])
                continue;
            ReadOnlySpan<int> table = step.BlockTables.AsSpan(s * step.MaxBlocks, (step.Positions[last] / KvCache.BlockTokens) + 1);
            foreach (int block in table)
            {
                if ((uint)block >= (uint)cache.Blocks)
                    throw new ArgumentException($"Sequence {s} has block {block} of {cache.Blocks}.", name);
            }
        }
    }

    public static void Blocks(KvCache cache, int from, int to)
    {
        if ((uint)from >= (uint)cache.Blocks)
            throw new ArgumentOutOfRangeException(nameof(from), from, $"The cache has {cache.Blocks} blocks.");
        if ((uint)to >= (uint)cache.Blocks)
            throw new ArgumentOutOfRangeException(nameof(to), to, $"The cache has {cache.Blocks} blocks.");
    }

    public static void Outputs(StepLayout step, int first, int count)
    {
        if (first < 0 || first > step.OutputCount)
            throw new ArgumentOutOfRangeException(nameof(first), first, $"The step has {step.OutputCount} output rows.");
        if (count < 0 || count > step.OutputCount - first)
            throw new ArgumentOutOfRangeException(nameof(count), count, $"The step has {step.OutputCount} output rows.");
    }

    /// <summary>The queries about output rows first to first + count, each of them checked.</summary>
    public static (int Begin, int End) Queries(StepLayout step, int first, int count, int vocabulary)
    {
        int begin = 0;
        while (begin < step.QueryCount && step.Queries[begin].OutputIndex < first)
            begin++;
        int end = begin;
        for (; end < step.QueryCount && step.Queries[end].OutputIndex < first + count; end++)
            Query(step, end, first, vocabulary);
        return (begin, end);
    }

    private static void Query(StepLayout step, int q, int first, int vocabulary)
    {
        ref readonly SampleQuery query = ref step.Queries[q];
        string? problem =
            query.OutputIndex < first ? "output indices do not ascend"
            : query.Target >= vocabulary ? $"target {query.Target} of {vocabulary}"
            : !(query.Temperature >= 0f) ? $"temperature {query.Temperature}"
            : float.IsNaN(query.TopP) ? "top-p is not a number"
            : !(query.MinP <= 1f) ? $"min-p {query.MinP}"
            : query.BiasCount < 0 || query.BiasStart < 0 || query.BiasStart > step.BiasIds.Length - query.BiasCount ? "biases out of range"
            : query.AlternativesCount < 0 || query.AlternativesCount > vocabulary ? $"{query.AlternativesCount} alternatives"
            : query.AlternativesCount > 0
                && (query.AlternativesStart < 0 || query.AlternativesStart > step.AlternativeIds.Length - query.AlternativesCount)
                ? "alternatives out of range"
            : null;
        for (int i = 0; problem == null && i < query.BiasCount; i++)
        {
            if ((uint)step.BiasIds[query.BiasStart + i] >= (uint)vocabulary)
                problem = $"bias for token {step.BiasIds[query.BiasStart + i]} of {vocabulary}";
        }

        if (problem != null)
            throw new ArgumentException($"Query {q}: {problem}.", nameof(step));
    }
}

/// <summary>Checks the context of a step once, at its first layer: all layers have the same block tables.</summary>
internal struct ContextChecks
{
    private KvCache? _cache;
    private RopeTable? _rope;

    public void Check(StepLayout step, in AttentionCall call)
    {
        if (!ReferenceEquals(_rope, call.Rope))
            Checks.Angles(step, call.Rope, "call.Rope");
        if (!ReferenceEquals(_cache, call.Cache))
            Checks.Context(step, call.Cache, "call.Cache");
        (_rope, _cache) = (call.Rope, call.Cache);
    }
}
