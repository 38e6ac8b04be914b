namespace Rollout.Kernels;

/// <summary>Memory that a backend owns. Only the backend that made it may read or write it.</summary>
public abstract class DeviceMemory : IDisposable
{
    /// <summary>Bytes held on the device while not discarded.</summary>
    public abstract long Bytes { get; }

    /// <summary>Frees the memory; its contents are lost. Until <see cref="Restore"/>, operations refuse it.</summary>
    public abstract void Discard();

    /// <summary>Allocates the memory again, zeroed, if it was discarded.</summary>
    /// <exception cref="OutOfMemoryException">The device does not have enough memory.</exception>
    public abstract void Restore();

    public abstract void Dispose();

    /// <summary>The backend it belongs to, where backends check that.</summary>
    internal virtual Backend? Owner => null;

    /// <summary>Disposed, or discarded and not restored.</summary>
    internal virtual bool IsGone => false;
}

/// <summary>Activations [rows, columns], fp32 and row-major as the engine sees them.</summary>
public abstract class Tensor(int rows, int columns) : DeviceMemory
{
    /// <summary>Capacity in rows; a step uses the first few.</summary>
    public int Rows { get; } = rows;

    public int Columns { get; } = columns;

    /// <summary>Copies the first <paramref name="rows"/> rows to the host (for tests and debugging, not the hot path).</summary>
    public abstract void Read(int rows, Span<float> destination);

    /// <summary>Copies rows from the host, starting at row 0.</summary>
    public abstract void Write(int rows, ReadOnlySpan<float> source);
}

/// <summary>
/// A weight [outputs, inputs] in a layout of the backend's choice: a linear layer's matrix (y = x·Wᵀ), an embedding table (outputs =
/// vocabulary), or, with outputs = 1, a vector such as a norm scale or a bias. Matrices are stored as <see cref="Backend.WeightFormat"/>
/// says, vectors as fp32.
/// </summary>
public abstract class Weight(int outputs, int inputs) : DeviceMemory
{
    public int Outputs { get; } = outputs;

    public int Inputs { get; } = inputs;

    /// <summary>A vector is kept in fp32 because it is small and rounding it to bf16 would gain nothing.</summary>
    public bool IsVector => Outputs == 1;
}

/// <summary>Weights that are allocated, discarded and restored together.</summary>
/// <param name="weights">In the order of their shapes.</param>
public class WeightArena(IReadOnlyList<Weight> weights) : DeviceMemory
{
    public IReadOnlyList<Weight> Weights => weights;

    public override long Bytes => weights.Sum(weight => weight.Bytes);

    /// <summary>Whether the device has memory of its own, which <see cref="MoveToHost"/> can free.</summary>
    public virtual bool CanMoveToHost => false;

    /// <summary>
    /// Copies the weights to the host's memory and frees the device's. <see cref="Restore"/> copies them back and frees the copy;
    /// <see cref="Discard"/> and <see cref="DeviceMemory.Dispose"/> free the copy too.
    /// </summary>
    /// <exception cref="NotSupportedException">The device has no memory of its own.</exception>
    /// <exception cref="OutOfMemoryException">The host does not have enough memory; nothing has happened.</exception>
    public virtual void MoveToHost() => throw new NotSupportedException("The weights are in the host's memory already.");

    public override void Discard()
    {
        foreach (Weight weight in weights)
            weight.Discard();
    }

    /// <summary>Allocates the memory again, zeroed; when the device does not have enough for all of it, nothing stays allocated.</summary>
    /// <exception cref="OutOfMemoryException">The device does not have enough memory.</exception>
    public override void Restore()
    {
        try
        {
            foreach (Weight weight in weights)
                weight.Restore();
        }
        catch
        {
            Discard();
            throw;
        }
    }

    public override void Dispose()
    {
        foreach (Weight weight in weights)
            weight.Dispose();
    }
}

/// <summary>Shape of one layer's keys and values.</summary>
/// <param name="KvHeads">Key and value heads.</param>
/// <param name="KeyDim">Elements of a key, and of a query. Even.</param>
/// <param name="ValueDim">Elements of a value, and of a head's output.</param>
public readonly record struct KvLayout(int KvHeads, int KeyDim, int ValueDim)
{
    /// <summary>Elements of one block's keys and values.</summary>
    public long BlockElements => (long)KvHeads * (KeyDim + ValueDim) * KvCache.BlockTokens;
}

/// <summary>
/// Paged keys and values. A block holds <see cref="BlockTokens"/> tokens in every layer: keys [kvHeads, BlockTokens, keyDim] and values
/// [kvHeads, BlockTokens, valueDim] of that layer's <see cref="KvLayout"/>, inner layout up to the backend.
/// </summary>
public abstract class KvCache(int blocks, IReadOnlyList<KvLayout> layers) : DeviceMemory
{
    /// <summary>
    /// Tokens in one block. Attention also processes the context in such blocks, from position 0: the order of every reduction then depends
    /// on the position alone.
    /// </summary>
    public const int BlockTokens = 16;

    private readonly KvLayout[] _layouts = [.. layers];

    public int Layers => _layouts.Length;

    public int Blocks { get; } = blocks;

    public KvLayout Layout(int layer) => _layouts[layer];
}

/// <summary>cos and sin of position x frequency, [positions, headDim / 2].</summary>
public abstract class RopeTable(int positions, int headDim) : DeviceMemory
{
    public int Positions { get; } = positions;

    public int HeadDim { get; } = headDim;
}
