using System.IO.Hashing;
using System.Runtime.CompilerServices;
using System.Text;

namespace Rollout.Engine;

/// <summary>
/// One prompt and the n sequences sampled from it. The loop writes, one reader reads: a sequence's arrays are valid up to its
/// <see cref="Sequence.Published"/> count, which is written last.
/// </summary>
public sealed class Group
{
    private readonly Signal _signal = new();
    private readonly TaskCompletionSource _completed = new(TaskCreationOptions.RunContinuationsAsynchronously);
    private int _ended;

    internal Group(GroupRequest request, Sequence[] sequences, IReadOnlyList<int> endTokens)
    {
        Request = request;
        EndTokens = [.. endTokens];
        Bias = LogitBias.Of(request.LogitBias, []);
        BiasBeforeMinTokens = request.MinTokens == 0 ? Bias : LogitBias.Of(request.LogitBias, endTokens);
        Salt = request.CacheSalt.Length == 0 ? 0 : XxHash128.HashToUInt128(Encoding.UTF8.GetBytes(request.CacheSalt));
        foreach (Sequence sequence in sequences) sequence.Group = this;
        Sequences = sequences;
        if (request.PromptLogProbs)
        {
            PromptLogProbs = new float[request.Prompt.Length - 1];
            PromptTopIds = new int[request.Prompt.Length * request.PromptTop];
            PromptTopLogProbs = new float[request.Prompt.Length * request.PromptTop];
        }
    }

    public GroupRequest Request { get; }

    public IReadOnlyList<Sequence> Sequences { get; }

    /// <summary>Model log-probability of prompt tokens 1..; valid once a sample has published or ended.</summary>
    public float[] PromptLogProbs { get; } = [];

    /// <summary>[prompt length, PromptTop]: alternatives for the token after prompt position p, most probable first.</summary>
    public int[] PromptTopIds { get; } = [];

    public float[] PromptTopLogProbs { get; } = [];

    /// <summary>Prompt tokens of the first sample whose keys and values came from the prefix cache.</summary>
    public int CachedPromptTokens { get; internal set; }

    /// <summary>Weights version under which the prompt was computed last.</summary>
    public ulong PromptVersion { get; internal set; }

    /// <summary>
    /// Completes when every sample has ended. Never faults: <see cref="Sequence.FinishReason"/> says how each sample ended.
    /// </summary>
    public Task Completed => _completed.Task;

    // ---- Used by the loop.

    /// <summary>Tokens that end a sample.</summary>
    internal int[] EndTokens { get; }

    internal LogitBias Bias { get; }

    internal LogitBias BiasBeforeMinTokens { get; }

    /// <summary>Seeds the hash chain of its blocks.</summary>
    internal UInt128 Salt { get; }

    /// <summary>True once a sample has had a seat.</summary>
    internal bool Begun { get; set; }

    /// <summary>The sample that is computing the prompt, if one is.</summary>
    internal Sequence? PromptRunner { get; set; }

    /// <summary>Set while a step's results are collected and a sample has ended, so that the reader is woken once.</summary>
    internal bool HasEndedSamples { get; set; }

    /// <summary>Whether the group is in the list of <see cref="StreamWakes"/>, whose readers are to be woken.</summary>
    internal bool IsWakePending { get; set; }

    /// <summary>
    /// False while siblings wait for the leader to complete the prompt; afterwards they have been forked from it, or were queued on their
    /// own. Initially true: a group may end before it reaches the scheduler, which counts its siblings.
    /// </summary>
    internal bool Forked { get; set; } = true;

    /// <summary>
    /// Yields the new tokens of each sequence until all have ended: as tokens are sampled with StreamTokens, otherwise as sequences end.
    /// One reader at a time.
    /// </summary>
    public async IAsyncEnumerable<SequenceChunk> ReadAsync([EnumeratorCancellation] CancellationToken cancellation = default)
    {
        using CancellationTokenRegistration wake = cancellation.UnsafeRegister(static group => ((Group)group!)._signal.Raise(), this);
        int[] read = new int[Sequences.Count];
        bool[] ended = new bool[Sequences.Count];
        int open = Sequences.Count;
        while (open > 0)
        {
            await _signal.WaitAsync().ConfigureAwait(false);
            cancellation.ThrowIfCancellationRequested();
            for (int i = 0; i < Sequences.Count; i++)
            {
                if (ended[i]) continue;
                Sequence sequence = Sequences[i];
                FinishReason reason = sequence.FinishReason; // before the count: a finished sequence's count is final
                int published = sequence.Published;
                if (reason == FinishReason.None && (!Request.StreamTokens || published == read[i])) continue;
                yield return new SequenceChunk(sequence, read[i], published, reason);
                read[i] = published;
                if (reason == FinishReason.None) continue;
                ended[i] = true;
                open--;
            }
        }
    }

    /// <summary>Called by the loop, once a prompt position.</summary>
    /// <param name="position">The prompt position whose logits these are.</param>
    /// <param name="logProb">Of the prompt token after the position; not used at the last position.</param>
    /// <param name="topIds">Alternatives for the token after the position.</param>
    /// <param name="topLogProbs">The log-probabilities of the alternatives.</param>
    /// <param name="version">Of the weights that computed them.</param>
    internal void StorePromptLogProb(
        int position, float logProb, ReadOnlySpan<int> topIds, ReadOnlySpan<float> topLogProbs, ulong version)
    {
        topIds.CopyTo(PromptTopIds.AsSpan(position * topIds.Length));
        topLogProbs.CopyTo(PromptTopLogProbs.AsSpan(position * topIds.Length));
        if (position < PromptLogProbs.Length) PromptLogProbs[position] = logProb;
        else PromptVersion = version;
    }

    /// <summary>Called by the loop after it has published.</summary>
    internal void Raise() => _signal.Raise();

    /// <summary>Called by the loop, once a sequence. Returns how many have ended.</summary>
    internal int CountEnded() => ++_ended;

    /// <summary>Called by the loop after the last sequence's end is published.</summary>
    internal void Complete() => _completed.TrySetResult();
}

/// <summary>Tokens [Start, End) of a sequence, with the reason if these are its last.</summary>
public readonly record struct SequenceChunk(Sequence Sequence, int Start, int End, FinishReason FinishReason);
