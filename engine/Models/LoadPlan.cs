using System.Buffers;
using System.Diagnostics.CodeAnalysis;
using System.Globalization;
using Rollout.Kernels;
using Rollout.Kernels.Cuda;

namespace Rollout.Engine;

/// <summary>One weight of the model: its place in <see cref="LoadPlan.Weights"/> and in every <see cref="WeightSet"/>.</summary>
public readonly record struct WeightSlot(int Index);

/// <summary>A weight that the model computes with, some of them fused from several tensors of a checkpoint.</summary>
/// <param name="Name">The engine's own, for people.</param>
/// <param name="Outputs">1 for a vector.</param>
/// <param name="Inputs">Length of a row.</param>
public sealed record PlannedWeight(string Name, int Outputs, int Inputs)
{
    public bool IsVector => Outputs == 1;
}

/// <summary>
/// A range of a checkpoint tensor's elements and where it goes, in order: whole rows where the weight is a matrix.
/// </summary>
/// <param name="First">Of the tensor's elements.</param>
/// <param name="Elements">How many.</param>
/// <param name="Slot">The weight they are a part of.</param>
/// <param name="Destination">Where the first goes: output * inputs + input of the weight.</param>
public readonly record struct LoadPiece(long First, long Elements, WeightSlot Slot, long Destination);

/// <summary>What becomes of one tensor of a checkpoint or an update.</summary>
/// <param name="Source">Name in the checkpoint.</param>
/// <param name="Shape">Shape it must have there.</param>
/// <param name="Pieces">Where its elements go, every one to one place, in ascending order; none for a tied tensor.</param>
/// <param name="TiedTo">
/// The tensor that this one repeats, the embedding of a tied model, or null. Checkpoints and trainers' state dictionaries often hold both
/// names of the one parameter; as transformers does, the second is accepted (its shape must be right) and its bytes are not used. It is
/// never required.
/// </param>
public sealed record LoadEntry(string Source, IReadOnlyList<long> Shape, IReadOnlyList<LoadPiece> Pieces, string? TiedTo = null)
{
    /// <summary>The number of elements.</summary>
    public long Elements { get; } = Shape.Aggregate(1L, (product, length) => product * length);

    /// <summary>Elements of a row, which is stored whole; 1 for a vector.</summary>
    public long RowElements => Shape.Count > 1 ? Shape[^1] : 1;

    [MemberNotNullWhen(true, nameof(TiedTo))]
    public bool Tied => TiedTo is not null;

    /// <summary>A shape for messages: "[320, 64]".</summary>
    public static string Format(IReadOnlyList<long> shape)
        => $"[{string.Join(", ", shape.Select(dimension => dimension.ToString(CultureInfo.InvariantCulture)))}]";

    /// <summary>Whether a tensor sent for it has its shape.</summary>
    public bool HasShape(IReadOnlyList<long> shape)
    {
        if (shape.Count != Shape.Count) return false;
        for (int i = 0; i < Shape.Count; i++)
            if (shape[i] != Shape[i]) return false;
        return true;
    }

    /// <summary>Where elements of the tensor go, counted from <paramref name="element"/>; nowhere where it is tied.</summary>
    internal IReadOnlyList<WeightRange> Places(WeightSet weights, long element, long count)
    {
        List<WeightRange> places = new(Pieces.Count);
        foreach (LoadPiece piece in Pieces)
        {
            long from = Math.Max(element, piece.First), to = Math.Min(element + count, piece.First + piece.Elements);
            if (from >= to) continue;
            places.Add(new WeightRange(from - element, to - from, weights[piece.Slot], piece.Destination + from - piece.First));
        }

        return places;
    }

    /// <summary>Stores elements of the tensor, whole rows, the first of them being <paramref name="element"/>.</summary>
    internal void Write(Backend backend, WeightSet weights, long element, ReadOnlySpan<byte> values, DType type)
    {
        long end = element + values.Length / type.Size();
        foreach (LoadPiece piece in Pieces)
        {
            long from = Math.Max(element, piece.First);
            int count = (int)Math.Max(0, Math.Min(end, piece.First + piece.Elements) - from);
            if (count == 0) continue;
            ReadOnlySpan<byte> own = values.Slice((int)(from - element) * type.Size(), count * type.Size());
            backend.WriteWeight(weights[piece.Slot], piece.Destination + from - piece.First, own, type);
        }
    }

    /// <summary>Reads elements of the tensor, any number of them, the first being <paramref name="element"/>.</summary>
    internal void Read(Backend backend, WeightSet weights, long element, Span<float> values)
    {
        long end = element + values.Length;
        foreach (LoadPiece piece in Pieces)
        {
            long from = Math.Max(element, piece.First);
            int count = (int)Math.Max(0, Math.Min(end, piece.First + piece.Elements) - from);
            if (count == 0) continue;
            backend.ReadWeight(weights[piece.Slot], piece.Destination + from - piece.First, values.Slice((int)(from - element), count));
        }
    }

    /// <summary>Stores single elements of the tensor, their indices ascending.</summary>
    internal void WriteElements(Backend backend, WeightSet weights, ReadOnlySpan<uint> indices, ReadOnlySpan<byte> values, DType type)
    {
        foreach (LoadPiece piece in Pieces)
        {
            int count = CountBelow(indices, piece.First + piece.Elements);
            WriteElements(backend, weights[piece.Slot], piece, indices[..count], values[..(count * type.Size())], type);
            indices = indices[count..];
            values = values[(count * type.Size())..];
        }
    }

    private static void WriteElements(
        Backend backend, Weight weight, LoadPiece piece, ReadOnlySpan<uint> indices, ReadOnlySpan<byte> values, DType type)
    {
        if (piece.First == 0)
        {
            backend.WriteWeightElements(weight, piece.Destination, indices, values, type);
            return;
        }

        uint[] own = ArrayPool<uint>.Shared.Rent(indices.Length);
        for (int i = 0; i < indices.Length; i++) own[i] = (uint)(indices[i] - piece.First);
        backend.WriteWeightElements(weight, piece.Destination, own.AsSpan(0, indices.Length), values, type);
        ArrayPool<uint>.Shared.Return(own);
    }

    private static int CountBelow(ReadOnlySpan<uint> ascending, long limit)
    {
        if (limit > uint.MaxValue) return ascending.Length;
        int at = ascending.BinarySearch((uint)limit);
        return at < 0 ? ~at : at;
    }
}

/// <summary>
/// The weights of a model and what becomes of every tensor of a checkpoint or weight update: filled once, by the model's blocks. Every
/// element of every weight is covered exactly once.
/// </summary>
public sealed class LoadPlan
{
    private readonly Dictionary<string, LoadEntry> _entries = [];
    private readonly List<PlannedWeight> _weights = [];

    internal LoadPlan()
    {
    }

    /// <summary>All weights that the model needs, in the order in which it uses them; a <see cref="WeightSlot"/> is an index.</summary>
    public IReadOnlyList<PlannedWeight> Weights => _weights;

    /// <summary>All source tensors, those of one weight together.</summary>
    public IReadOnlyCollection<LoadEntry> Entries => _entries.Values;

    /// <summary>The plan of a model.</summary>
    public static LoadPlan Compile(ModelSpec spec) => new Transformer(spec).Weights;

    /// <summary>Finds the entry of a source tensor, in constant time.</summary>
    public bool TryFind(string source, [MaybeNullWhen(false)] out LoadEntry entry) => _entries.TryGetValue(source, out entry);

    /// <summary>The entry of a source tensor that the model has.</summary>
    public LoadEntry this[string source] => _entries[source];

    // ---- For blocks.

    /// <summary>Declares a matrix whose rows are those of the sources, one below the other.</summary>
    /// <param name="name">The engine's own.</param>
    /// <param name="inputs">Length of a row.</param>
    /// <param name="sources">Names in the checkpoint, and their rows.</param>
    internal WeightSlot Matrix(string name, int inputs, params ReadOnlySpan<(string Name, int Outputs)> sources)
    {
        WeightSlot slot = new(_weights.Count);
        int outputs = 0;
        foreach ((string source, int rows) in sources)
        {
            Load(source, [rows, inputs], new LoadPiece(0, (long)rows * inputs, slot, (long)outputs * inputs));
            outputs += rows;
        }

        _weights.Add(new PlannedWeight(name, outputs, inputs));
        return slot;
    }

    /// <summary>Declares a vector made of the sources, one after the other.</summary>
    internal WeightSlot Vector(string name, params ReadOnlySpan<(string Name, int Length)> sources)
    {
        WeightSlot slot = new(_weights.Count);
        int inputs = 0;
        foreach ((string source, int length) in sources)
        {
            Load(source, [length], new LoadPiece(0, length, slot, inputs));
            inputs += length;
        }

        _weights.Add(new PlannedWeight(name, 1, inputs));
        return slot;
    }

    /// <summary>Declares a weight alone; <see cref="Load"/> says what fills it.</summary>
    internal WeightSlot Weight(string name, int outputs, int inputs)
    {
        _weights.Add(new PlannedWeight(name, outputs, inputs));
        return new WeightSlot(_weights.Count - 1);
    }

    /// <summary>Says where the elements of a source tensor go.</summary>
    internal void Load(string source, IReadOnlyList<long> shape, params IReadOnlyList<LoadPiece> pieces)
        => _entries.Add(source, new LoadEntry(source, shape, pieces));

    /// <summary>A source tensor may come that repeats another.</summary>
    internal void Tie(string source, string original)
        => _entries.Add(source, new LoadEntry(source, _entries[original].Shape, [], original));
}
