namespace Rollout.Engine;

/// <summary>One prompt, n samples. Immutable; checked as a whole by <see cref="RequestValidator"/> before it enters the engine.</summary>
public sealed record GroupRequest
{
    /// <summary>Unique among the groups in flight.</summary>
    public required string Id { get; init; }

    public required int[] Prompt { get; init; }

    public int N { get; init; } = 1;

    /// <summary>Sample i draws its tokens with (Seed, i).</summary>
    public ulong Seed { get; init; }

    /// <summary>0 is greedy.</summary>
    public float Temperature { get; init; } = 1;

    /// <summary>0 keeps all tokens.</summary>
    public int TopK { get; init; }

    /// <summary>1 keeps all tokens.</summary>
    public float TopP { get; init; } = 1;

    /// <summary>0 keeps all tokens.</summary>
    public float MinP { get; init; }

    /// <summary>Token id to what is added to its logit before temperature.</summary>
    public IReadOnlyDictionary<int, float> LogitBias { get; init; } = s_noBias;

    /// <summary>Null: as many as the context has room for. 0: score the prompt only.</summary>
    public int? MaxTokens { get; init; }

    public int MinTokens { get; init; }

    public IReadOnlyList<int> StopTokenIds { get; init; } = [];

    public IReadOnlyList<string> StopStrings { get; init; } = [];

    public bool IgnoreEos { get; init; }

    /// <summary>Alternatives reported for every sampled token.</summary>
    public int TopLogProbs { get; init; }

    /// <summary>Report the model log-probability of prompt tokens 1.. and <see cref="PromptTop"/> alternatives for each.</summary>
    public bool PromptLogProbs { get; init; }

    /// <summary>Alternatives at every prompt position after the first, and for the token after the prompt.</summary>
    public int PromptTop { get; init; }

    /// <summary>
    /// End a sample, with finish reason abort, when new weights make its oldest token (or, under KEEP, its oldest keys and values) more
    /// than this many versions old. Null: no limit.
    /// </summary>
    public int? MaxStaleness { get; init; }

    /// <summary>Groups with different salts share no cached keys and values.</summary>
    public string CacheSalt { get; init; } = "";

    /// <summary>Wake the reader as tokens come (true) or only when a sample ends (false).</summary>
    public bool StreamTokens { get; init; }

    private static readonly Dictionary<int, float> s_noBias = [];
}

public enum FinishReason
{
    /// <summary>The sample goes on.</summary>
    None,

    /// <summary>End of sequence, a stop token or a stop string.</summary>
    Stop,

    /// <summary>max_tokens, or the end of the context.</summary>
    Length,

    Abort,

    /// <summary>This sample failed; <see cref="Sequence.Error"/> says why.</summary>
    Error,
}
