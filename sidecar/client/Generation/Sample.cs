namespace Rollout.Client;

/// <summary>Why a sample ended.</summary>
public enum FinishReason
{
    /// <summary>End of sequence, a stop token or a stop string.</summary>
    Stop,

    /// <summary><see cref="GenerateOptions.MaxTokens"/>, or the end of the context.</summary>
    Length,

    /// <summary>Ended early by an abort or a pause, with the tokens drawn until then.</summary>
    Abort,

    /// <summary>The sample failed; <see cref="Sample.Error"/> says why.</summary>
    Error,
}

/// <summary>Tokens [Start, End) of a sample were drawn from the weights of this version.</summary>
public readonly record struct VersionSpan(ulong Version, int Start, int End);

/// <summary>K alternatives in each row, most probable first, flattened: [row][k]. Model log-probabilities.</summary>
public sealed record TopLogProbs(int K, int[] Ids, float[] LogProbs)
{
    public int Rows => K == 0 ? 0 : Ids.Length / K;

    internal static TopLogProbs? From(V1.TopLogprobs? top) =>
        top is null || top.K == 0 ? null : new TopLogProbs((int)top.K, top.Ids.ToInts(), top.Logprobs.ToFloats());
}

/// <summary>The prompt of a group as the sidecar reports it.</summary>
/// <param name="Ids">Only where the prompt was text.</param>
/// <param name="LogProbs">Model log-probabilities of prompt tokens 1.., if requested.</param>
/// <param name="CachedTokens">Prompt tokens whose keys and values came from the prefix cache.</param>
public sealed record PromptInfo(int[] Ids, float[] LogProbs, int CachedTokens);

/// <summary>A sample that has ended. The three arrays over its tokens have the same length.</summary>
public sealed record Sample
{
    public required string RequestId { get; init; }

    /// <summary>Index in the group, 0..N-1.</summary>
    public required int Index { get; init; }

    /// <summary>Seed of the group: the same seed, <see cref="Index"/>, prompt and weights give the same tokens.</summary>
    public required ulong Seed { get; init; }

    public required int[] Ids { get; init; }

    /// <summary>Natural logarithm of each token's probability under the model: temperature 1, nothing added or removed.</summary>
    public required float[] LogProbs { get; init; }

    /// <summary>The same under the distribution the token was drawn from: after bias, temperature and truncation.</summary>
    public required float[] SamplingLogProbs { get; init; }

    /// <summary>The weights version of each span of tokens, in order, without gaps.</summary>
    public required IReadOnlyList<VersionSpan> Versions { get; init; }

    /// <summary>Oldest weights version that made any key or value this sample was drawn with.</summary>
    public required ulong OldestKvVersion { get; init; }

    public required FinishReason FinishReason { get; init; }

    /// <summary>Alternatives, one row per token; null unless requested.</summary>
    public TopLogProbs? Top { get; init; }

    /// <summary>"" unless requested.</summary>
    public string Text { get; init; } = "";

    /// <summary>With <see cref="FinishReason.Error"/>, else "".</summary>
    public string Error { get; init; } = "";

    /// <summary>The prompt of the group, the same in each of its samples.</summary>
    public PromptInfo? Prompt { get; init; }
}

/// <summary>The tokens of one sample since its last chunk.</summary>
public sealed record SampleChunk
{
    public required string RequestId { get; init; }

    /// <summary>Index in the group, 0..N-1.</summary>
    public required int Index { get; init; }

    /// <summary>Position of <c>Ids[0]</c> among the sample's tokens.</summary>
    public required int Start { get; init; }

    public required int[] Ids { get; init; }

    /// <inheritdoc cref="Sample.LogProbs"/>
    public required float[] LogProbs { get; init; }

    /// <inheritdoc cref="Sample.SamplingLogProbs"/>
    public required float[] SamplingLogProbs { get; init; }

    /// <summary>Cover exactly <see cref="Ids"/>, in positions of the sample.</summary>
    public required IReadOnlyList<VersionSpan> Versions { get; init; }

    /// <inheritdoc cref="Sample.OldestKvVersion"/>
    public required ulong OldestKvVersion { get; init; }

    /// <summary>Null while the sample continues.</summary>
    public required FinishReason? FinishReason { get; init; }

    public TopLogProbs? Top { get; init; }

    /// <summary>Text since the last chunk; "" unless requested.</summary>
    public string Text { get; init; } = "";

    public string Error { get; init; } = "";

    internal static SampleChunk From(string requestId, V1.SampleChunk chunk) => new()
    {
        RequestId = requestId,
        Index = (int)chunk.Index,
        Start = (int)chunk.Start,
        Ids = chunk.Ids.ToInts(),
        LogProbs = chunk.Logprobs.ToFloats(),
        SamplingLogProbs = chunk.SamplingLogprobs.ToFloats(),
        Versions = [.. chunk.Versions.Select(span => new VersionSpan(span.Version, (int)span.Start, (int)span.End))],
        OldestKvVersion = chunk.OldestKvVersion,
        FinishReason = chunk.FinishReason switch
        {
            V1.FinishReason.Unspecified => null,
            V1.FinishReason.Stop => Client.FinishReason.Stop,
            V1.FinishReason.Length => Client.FinishReason.Length,
            V1.FinishReason.Abort => Client.FinishReason.Abort,
            V1.FinishReason.Error => Client.FinishReason.Error,
            var other => throw new RolloutException($"the sidecar is newer than this client: unknown finish reason {(int)other}"),
        },
        Top = TopLogProbs.From(chunk.Top),
        Text = chunk.Text,
        Error = chunk.Error,
    };
}
