using Rollout.Kernels;

namespace Rollout.Engine;

/// <summary>One layer of the model, as facts.</summary>
public sealed record LayerSpec(AttentionSpec Attention, GatedMlpSpec FeedForward);

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

    /// <summary>Every query and key head is RMS-normalised before rotation.</summary>
    public required bool QueryKeyNorm { get; init; }

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
