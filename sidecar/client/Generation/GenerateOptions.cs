namespace Rollout.Client;

/// <summary>
/// How the samples of one group are drawn and when they end. By default one sample, from the unmodified distribution of the model.
/// </summary>
public sealed record GenerateOptions
{
    internal static readonly GenerateOptions Default = new();

    /// <summary>Samples to draw.</summary>
    public int N { get; init; } = 1;

    /// <summary>Seed of the group; sample i draws with (seed, i). Null: random, see <see cref="Sample.Seed"/>.</summary>
    public ulong? Seed { get; init; }

    /// <summary>Most tokens of a sample. Null: up to the model's context length.</summary>
    public int? MaxTokens { get; init; }

    /// <summary>End-of-sequence and stop tokens are forbidden until a sample has this many tokens.</summary>
    public int MinTokens { get; init; }

    /// <summary>0 is greedy.</summary>
    public float Temperature { get; init; } = 1;

    /// <summary>Keep the k most probable tokens. 0: off.</summary>
    public int TopK { get; init; }

    /// <summary>Keep the most probable tokens that together have this share. 1: off.</summary>
    public float TopP { get; init; } = 1;

    /// <summary>Keep tokens at least this many times as probable as the most probable one. 0: off.</summary>
    public float MinP { get; init; }

    /// <summary>Added to the logit of a token before temperature; minus infinity forbids it.</summary>
    public IReadOnlyDictionary<int, float>? LogitBias { get; init; }

    /// <summary>Tokens that end a sample, besides end of sequence. The token itself is part of the sample.</summary>
    public IReadOnlyList<int> StopTokenIds { get; init; } = [];

    /// <summary>Texts that end a sample; needs a tokenizer. Ids are never cut, the text ends before the match.</summary>
    public IReadOnlyList<string> StopStrings { get; init; } = [];

    /// <summary>Continue past end of sequence.</summary>
    public bool IgnoreEos { get; init; }

    /// <summary>Most probable alternatives to report for each sampled token.</summary>
    public int TopLogProbs { get; init; }

    /// <summary>Report the model log-probability of every prompt token after the first. The prompt is then computed in full.</summary>
    public bool PromptLogProbs { get; init; }

    /// <summary>Return text as well as token ids; needs a tokenizer.</summary>
    public bool ReturnText { get; init; }

    /// <summary>
    /// End a sample, with finish reason abort, when new weights make its oldest token more than this many versions old. Null: no limit.
    /// </summary>
    public int? MaxStaleness { get; init; }

    /// <summary>Requests with different salts never share cached keys and values.</summary>
    public string CacheSalt { get; init; } = "";
}
