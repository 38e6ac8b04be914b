using Rollout.Kernels;

namespace Rollout.Engine;

/// <summary>A tensor of the workspace.</summary>
internal readonly record struct TensorSlot(int Index);

/// <summary>A rope table of the workspace.</summary>
internal readonly record struct RopeSlot(int Index);

/// <summary>
/// What the model's blocks compute in. Blocks run one after another, so equal requests share one tensor: every layer's attention
/// uses the same one for its queries, keys and values.
/// </summary>
internal sealed class WorkspacePlan
{
    private readonly List<(string Use, int Columns, bool Rounded, bool OfOutputs)> _tensors = [];
    private readonly List<(RopeSpec Rope, int HeadDim)> _ropes = [];

    /// <summary>A tensor with a row for every token of a step.</summary>
    /// <param name="use">What it is for: tensors of the same use and width are one.</param>
    /// <param name="columns">Width.</param>
    /// <param name="rounded">See <see cref="Backend.AllocateTensor"/>.</param>
    public TensorSlot Tensor(string use, int columns, bool rounded = false)
        => new(IndexOf(_tensors, (use, columns, rounded, OfOutputs: false)));

    /// <summary>A tensor with a row for every token whose logits are computed together: see <see cref="Backend.LogitRows"/>.</summary>
    public TensorSlot OutputTensor(string use, int columns) => new(IndexOf(_tensors, (use, columns, Rounded: false, OfOutputs: true)));

    public RopeSlot Rope(RopeSpec rope, int headDim) => new(IndexOf(_ropes, (rope, headDim)));

    /// <summary>Allocates the memory.</summary>
    /// <param name="backend">Of the device.</param>
    /// <param name="maxRows">Most tokens in a step.</param>
    /// <param name="maxContext">Longest sequence.</param>
    public Workspace Allocate(Backend backend, int maxRows, int maxContext)
    {
        int outputRows = Math.Min(backend.LogitRows, maxRows);
        RopeTable[] ropes = [.. _ropes.Select(rope => backend.AllocateRopeTable(rope.Rope.InverseFrequencies(rope.HeadDim), maxContext))];
        Tensor[] tensors = [.. _tensors.Select(tensor
            => backend.AllocateTensor(tensor.OfOutputs ? outputRows : maxRows, tensor.Columns, tensor.Rounded))];
        return new Workspace(backend, tensors, ropes);
    }

    private static int IndexOf<T>(List<T> list, T wanted)
    {
        int index = list.IndexOf(wanted);
        if (index >= 0) return index;
        list.Add(wanted);
        return list.Count - 1;
    }
}

/// <summary>The memory of forward passes on one device: see <see cref="WorkspacePlan"/>. One step at a time.</summary>
public sealed class Workspace : IDisposable
{
    private readonly Tensor[] _tensors;
    private readonly RopeTable[] _ropes;

    internal Workspace(Backend backend, Tensor[] tensors, RopeTable[] ropes)
    {
        Backend = backend;
        _tensors = tensors;
        _ropes = ropes;
    }

    public Backend Backend { get; }

    internal Tensor this[TensorSlot slot] => _tensors[slot.Index];

    internal RopeTable this[RopeSlot slot] => _ropes[slot.Index];

    public void Dispose()
    {
        foreach (Tensor tensor in _tensors) tensor.Dispose();
        foreach (RopeTable rope in _ropes) rope.Dispose();
    }
}
