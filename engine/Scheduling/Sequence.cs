using System.Runtime.CompilerServices;

namespace Rollout.Engine;

/// <summary>
/// One sample: its tokens, how many of them have keys and values, and the blocks these lie in. Owned by the loop; readers look only at
/// what <see cref="Published"/> covers.
/// <code>
///   tokens   [ prompt ............ | sampled ........ ]
///            0            PromptLength            Total
///   KV       [ computed ................. | gap       ]     a step closes the gap, within the token budget
/// </code>
/// </summary>
public sealed class Sequence
{
    private readonly int[] _tokens;
    private readonly float[] _logProbs;
    private readonly float[] _samplingLogProbs;
    private readonly ulong[] _versions;
    private int _published;
    private int _finishReason;

    internal Sequence(int index, int[] prompt, int maxTokens, int topLogProbs)
    {
        Index = index;
        PromptLength = prompt.Length;
        MaxTokens = maxTokens;
        TopLogProbs = topLogProbs;
        _tokens = new int[prompt.Length + maxTokens];
        prompt.CopyTo(_tokens, 0);
        _logProbs = new float[maxTokens];
        _samplingLogProbs = new float[maxTokens];
        _versions = new ulong[maxTokens];
        TopIds = new int[maxTokens * topLogProbs];
        TopLogProbValues = new float[maxTokens * topLogProbs];
        BlockTable = new int[KvBlocks.CountFor(_tokens.Length)];
        Total = prompt.Length;
    }

    // ---- For readers.

    /// <summary>Place in the group; part of the noise's key.</summary>
    public int Index { get; }

    public int PromptLength { get; }

    /// <summary>Sampled tokens that may be read.</summary>
    public int Published => Volatile.Read(ref _published);

    public FinishReason FinishReason => (FinishReason)Volatile.Read(ref _finishReason);

    public string Error { get; private set; } = "";

    /// <summary>Sampled tokens [start, end).</summary>
    public ReadOnlySpan<int> Tokens(int start, int end) => _tokens.AsSpan(PromptLength + start, end - start);

    /// <summary>Model log-probabilities of sampled tokens [start, end).</summary>
    public ReadOnlySpan<float> LogProbs(int start, int end) => _logProbs.AsSpan(start, end - start);

    public ReadOnlySpan<float> SamplingLogProbs(int start, int end) => _samplingLogProbs.AsSpan(start, end - start);

    /// <summary>The weights version that drew each of the tokens [start, end).</summary>
    public ReadOnlySpan<ulong> Versions(int start, int end) => _versions.AsSpan(start, end - start);

    /// <summary>Alternatives reported a token.</summary>
    public int TopLogProbs { get; }

    /// <summary>[MaxTokens, TopLogProbs].</summary>
    public int[] TopIds { get; }

    public float[] TopLogProbValues { get; }

    /// <summary>Oldest version among those that made this sample's keys and values.</summary>
    public ulong OldestKvVersion { get; internal set; }

    /// <summary>Sampled tokens whose text comes before a stop string that ended the sample; null when none did.</summary>
    public string? MatchedStop { get; internal set; }

    // ---- For the loop.

    internal Group Group { get; set; } = null!;

    internal int MaxTokens { get; }

    /// <summary>Tokens known: prompt and sampled.</summary>
    internal int Total { get; private set; }

    /// <summary>Tokens whose keys and values lie in the blocks.</summary>
    internal int Computed { get; set; }

    /// <summary>Rows of this sequence in the step being run.</summary>
    internal int Scheduled { get; set; }

    internal int Sampled => Total - PromptLength;

    internal ReadOnlySpan<int> AllTokens => _tokens.AsSpan(0, Total);

    internal int[] BlockTable { get; }

    internal int BlockCount { get; set; }

    /// <summary>Leading blocks whose hash is known, and the hash of the last of them.</summary>
    internal int HashedBlocks { get; set; }

    internal UInt128 BlockHash { get; set; }

    /// <summary>False once its keys and values come from more than one version: such blocks are never shared.</summary>
    internal bool SingleVersionKv { get; set; } = true;

    internal void Append(int token, float logProb, float samplingLogProb, ulong version)
    {
        int at = Sampled;
        _tokens[Total] = token;
        _logProbs[at] = logProb;
        _samplingLogProbs[at] = samplingLogProb;
        _versions[at] = version;
        Total++;
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    internal void Publish() => Volatile.Write(ref _published, Sampled);

    /// <summary>Publishes what there is and ends the sample. The count is written before the reason, so a reader of both sees all.</summary>
    internal void Finish(FinishReason reason, string error = "")
    {
        Error = error;
        Publish();
        Volatile.Write(ref _finishReason, (int)reason);
    }
}
