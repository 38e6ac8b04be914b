namespace Rollout.Kernels;

/// <summary>
/// One layer's attention over the rows of a step. In this order: an RMS norm of queries and keys, where given; rotation of queries
/// and keys by the row's position (halves paired: i with i + keyDim/2); storing of keys and values in the row's slot of the cache; then
/// every query attends to positions 0..Positions[row] of its sequence's blocks.
/// <code>
///   Qkv     [rows, heads*keyDim | kvHeads*keyDim | kvHeads*valueDim]
///   Output  [rows, heads*valueDim]
/// </code>
/// </summary>
public readonly struct AttentionCall
{
    /// <summary>Queries, keys and values of the step's rows. Its contents afterwards are undefined.</summary>
    public required Tensor Qkv { get; init; }

    /// <summary>Query heads: a multiple of the layer's key-value heads.</summary>
    public required int Heads { get; init; }

    /// <summary>[keyDim]: each query head is normalised alone; [heads*keyDim]: all of them together; null: none is.</summary>
    public Weight? QueryNorm { get; init; }

    /// <summary>[keyDim], [kvHeads*keyDim], or null, likewise.</summary>
    public Weight? KeyNorm { get; init; }

    /// <summary>Of both norms.</summary>
    public float Epsilon { get; init; }

    public required RopeTable Rope { get; init; }

    /// <summary>Multiplies the scores, before softmax.</summary>
    public required float Scale { get; init; }

    public required KvCache Cache { get; init; }

    /// <summary>Of the cache.</summary>
    public required int Layer { get; init; }

    public required Tensor Output { get; init; }
}
