using Rollout.Kernels;

namespace Rollout.Engine;

/// <summary>One layer of the model, as facts.</summary>
/// <param name="Attention">The first of its two blocks.</param>
/// <param name="FeedForward">The second.</param>
/// <param name="Norms">Of both.</param>
public sealed record LayerSpec(AttentionSpec Attention, GatedMlpSpec FeedForward, NormPlacement Norms);

/// <summary>Where a block's RMS norm is.</summary>
public enum NormPlacement
{
    /// <summary>hidden += block(norm(hidden)).</summary>
    BeforeBlock,

    /// <summary>hidden += norm(block(hidden)).</summary>
    AfterBlock,
}

/// <summary>What the RMS norm of queries and keys runs over, before rotation.</summary>
public enum QueryKeyNorm
{
    None,

    /// <summary>Each head alone.</summary>
    EachHead,

    /// <summary>All query heads together, and all key heads.</summary>
    AllHeads,
}

/// <summary>Causal attention with grouped queries and rotary positions.</summary>
public sealed record AttentionSpec
{
    /// <summary>Query heads.</summary>
    public required int Heads { get; init; }

    /// <summary>Key and value heads; divides <see cref="Heads"/>.</summary>
    public required int KvHeads { get; init; }

    /// <summary>Even. Not always HiddenSize / Heads.</summary>
    public required int HeadDim { get; init; }

    public required RopeSpec Rope { get; init; }

    /// <summary>Query, key and value projections have a bias.</summary>
    public required bool QkvBias { get; init; }

    /// <summary>The output projection has a bias.</summary>
    public required bool OutputBias { get; init; }

    public required QueryKeyNorm QueryKeyNorm { get; init; }

    /// <summary>Columns of all query heads.</summary>
    public int QueryWidth => Heads * HeadDim;

    /// <summary>Columns of all key heads, and of all value heads.</summary>
    public int KvWidth => KvHeads * HeadDim;

    /// <summary>What the layer keeps of every token.</summary>
    public KvLayout Kv => new(KvHeads, HeadDim, HeadDim);
}

/// <summary>down(silu(gate(x)) * up(x)).</summary>
/// <param name="Width">Outputs of gate and of up.</param>
/// <param name="Bias">All three projections have a bias.</param>
public sealed record GatedMlpSpec(int Width, bool Bias);
