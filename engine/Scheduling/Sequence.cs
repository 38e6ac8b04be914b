using System.Runtime.CompilerServices;
using Rollout.Kernels;

namespace Rollout.Engine;

/// <summary>
/// One sample: its tokens, the number of them that have keys and values, and the blocks that hold these. Owned by the loop; readers read
/// only what <see cref="Published"/> covers.
/// <code>
///   tokens   [ prompt ............ | sampled ........ ]
///            0            PromptLength            Total
///   KV       [ computed ................. | gap       ]     a step closes the gap, within the token budget
///   and, after Total, tokens that steps in flight sample
/// </code>
/// </summary>
public sealed class Sequence
{
    // Arrays are allocated for this many sampled tokens at first; longer samples move to larger arrays. A reader that holds the old ones
    // finds in them everything that was published when it got them.
    private const int FirstCapacity = 4096;

    private int[] _tokens;
    private float[] _logProbs;
    private float[] _samplingLogProbs;
    private ulong[] _versions;
    private int[] _topIds;
    private float[] _topLogProbs;
    private int _capacity;
    private int _published;
    private int _finishReason;

    internal Sequence(int index, int[] prompt, int maxTokens, int topLogProbs)
    {
        Index = index;
        PromptLength = prompt.Length;
        MaxTokens = maxTokens;
        TopLogProbs = topLogProbs;
        _capacity = Math.Min(maxTokens, FirstCapacity);
        _tokens = new int[prompt.Length + _capacity];
        prompt.CopyTo(_tokens, 0);
        _logProbs = new float[_capacity];
        _samplingLogProbs = new float[_capacity];
        _versions = new ulong[_capacity];
        _topIds = new int[_capacity * topLogProbs];
        _topLogProbs = new float[_capacity * topLogProbs];
        BlockTable = new int[KvBlocks.CountFor(prompt.Length + maxTokens)];
        Total = prompt.Length;
    }

    // ---- Used by readers.

    /// <summary>Index in the group; part of the noise's key.</summary>
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

    /// <summary>Alternatives of tokens [start, end), [tokens, TopLogProbs], most probable first.</summary>
    public ReadOnlySpan<int> TopIds(int start, int end) => _topIds.AsSpan(start * TopLogProbs, (end - start) * TopLogProbs);

    /// <summary>Model log-probabilities of the alternatives.</summary>
    public ReadOnlySpan<float> TopLogProbValues(int start, int end)
        => _topLogProbs.AsSpan(start * TopLogProbs, (end - start) * TopLogProbs);

    /// <summary>Oldest version among those that made this sample's keys and values.</summary>
    public ulong OldestKvVersion { get; internal set; }

    /// <summary>The stop string that ended the sample, or null.</summary>
    public string? MatchedStop => StopStrings?.Matched;

    // ---- Used by the loop.

    internal Group Group { get; set; } = null!;

    internal int MaxTokens { get; }

    /// <summary>Watches the sampled text; null when no stop strings were given.</summary>
    internal StopStringMatcher? StopStrings { get; init; }

    /// <summary>Tokens known: prompt and sampled.</summary>
    internal int Total { get; private set; }

    /// <summary>Tokens whose keys and values are in the blocks, or will be when the steps in flight are done.</summary>
    internal int Computed { get; set; }

    /// <summary>Tokens that steps in flight sample.</summary>
    internal int InFlight { get; set; }

    /// <summary>The query of the latest planned step that samples the last of them.</summary>
    internal int LastQuery { get; set; }

    /// <summary>Tokens to compute before the next can be sampled; none when the last is in flight.</summary>
    internal int Gap => InFlight > 0 && Sampled + InFlight == MaxTokens ? 0 : Total + InFlight - Computed;

    internal int Sampled => Total - PromptLength;

    internal ReadOnlySpan<int> AllTokens => _tokens.AsSpan(0, Total);

    internal int[] BlockTable { get; }

    internal int BlockCount { get; set; }

    /// <summary>The number of leading blocks whose hash is known, and the hash of the last one.</summary>
    internal int HashedBlocks { get; set; }

    internal UInt128 BlockHash { get; set; }

    /// <summary>False once its keys and values come from more than one version: such blocks are never shared.</summary>
    internal bool SingleVersionKv { get; set; } = true;

    /// <summary>Whether this sequence's rows still have to produce the log-probabilities of the group's prompt.</summary>
    internal bool IsScoring => Group.Request.PromptLogProbs && Index == 0 && Sampled == 0;

    /// <summary>
    /// Why the sequence ends with the token appended last, or None. Called once a token, because it advances the stop-string matcher.
    /// </summary>
    internal FinishReason EndOfLastToken()
    {
        int token = _tokens[Total - 1];
        bool matched = StopStrings?.Append(token) ?? false;
        if (Sampled >= Group.Request.MinTokens && (matched || Group.EndTokens.AsSpan().Contains(token))) return FinishReason.Stop;
        return Sampled == MaxTokens ? FinishReason.Length : FinishReason.None;
    }

    /// <param name="result">The token drawn and its log-probabilities.</param>
    /// <param name="topIds">Alternatives for the token.</param>
    /// <param name="topLogProbs">Log-probabilities of the alternatives.</param>
    /// <param name="version">Of the weights that drew it.</param>
    internal void Append(in SampleResult result, ReadOnlySpan<int> topIds, ReadOnlySpan<float> topLogProbs, ulong version)
    {
        int at = Sampled;
        if (at == _capacity) Grow();
        _tokens[Total] = result.Token;
        _logProbs[at] = result.LogProb;
        _samplingLogProbs[at] = result.SamplingLogProb;
        _versions[at] = version;
        topIds.CopyTo(_topIds.AsSpan(at * TopLogProbs));
        topLogProbs.CopyTo(_topLogProbs.AsSpan(at * TopLogProbs));
        Total++;
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    internal void Publish() => Volatile.Write(ref _published, Sampled);

    /// <summary>
    /// Publishes all tokens and ends the sample. The count is written before the reason, so a reader of both sees all tokens.
    /// </summary>
    internal void Finish(FinishReason reason, string error = "")
    {
        Error = error;
        Publish();
        Volatile.Write(ref _finishReason, (int)reason);
    }

    private void Grow()
    {
        _capacity = Math.Min(MaxTokens, 2 * _capacity);
        Array.Resize(ref _tokens, PromptLength + _capacity);
        Array.Resize(ref _logProbs, _capacity);
        Array.Resize(ref _samplingLogProbs, _capacity);
        Array.Resize(ref _versions, _capacity);
        Array.Resize(ref _topIds, _capacity * TopLogProbs);
        Array.Resize(ref _topLogProbs, _capacity * TopLogProbs);
    }
}
