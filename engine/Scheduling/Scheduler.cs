using System.Diagnostics;
using Rollout.Kernels;

namespace Rollout.Engine;

/// <summary>
/// Decides which tokens the next step computes. There is no prefill and no decode: a sequence has computed and total tokens, and a step
/// closes the gap, oldest sequence first, within a budget of tokens. Chunked prefill, prefix hits, preemption (drop the keys and
/// values, recompute later) and new weights under RECOMPUTE are all that one rule.
/// <code>
///   Submit -> [ waiting ] -- a seat, and blocks for all it has --> [ running ] --> ended
///                 ^                                                    |
///                 +------- unseated: youngest first, computed = 0 -----+
/// </code>
/// These decisions change when a token comes, never which: see DEFINITIONS.md. Not thread-safe: the engine's loop owns it.
///
/// A step may be planned while the one before is under way: rows and queries are counted when they are planned, a row's token may be the answer to a
/// query of that step, and a sample that turns out to have ended has a row there for nothing. Steps run in the order in which they were planned, so
/// blocks may change hands meanwhile. All else, new weights above all, finds no step under way.
/// </summary>
public sealed class Scheduler
{
    private readonly KvBlocks _blocks;
    private readonly int _maxSequences;
    private readonly int _maxBatchTokens;
    private readonly Action<Group> _groupEnded;
    private readonly List<Sequence> _running;            // oldest first
    private readonly LinkedList<Sequence> _waiting = []; // next first
    private int _unforked;                               // samples whose leader is still computing the prompt for them
    private readonly StreamWakes _streams;
    private readonly long[] _tokensByStaleness = new long[9];

    /// <param name="blocks">The pool.</param>
    /// <param name="maxSequences">Seats.</param>
    /// <param name="maxBatchTokens">Tokens of a step.</param>
    /// <param name="groupEnded">Called on the loop when a group's last sample has ended.</param>
    internal Scheduler(KvBlocks blocks, int maxSequences, int maxBatchTokens, Action<Group> groupEnded)
    {
        _blocks = blocks;
        _maxSequences = maxSequences;
        _maxBatchTokens = maxBatchTokens;
        _groupEnded = groupEnded;
        _running = new List<Sequence>(maxSequences);
        _streams = new StreamWakes(maxSequences);
    }

    /// <summary>Version of the weights the next step runs on.</summary>
    public ulong Version { get; private set; }

    public int Running => _running.Count;

    public int Waiting => _waiting.Count + _unforked;

    /// <summary>Sequences with a seat, oldest first.</summary>
    internal IReadOnlyList<Sequence> RunningSequences => _running;

    internal bool IsEmpty => _running.Count == 0 && _waiting.Count == 0;

    /// <summary>Whether a group that had a seat has samples left.</summary>
    internal bool HasBegun => _running.Count > 0 || _waiting.Any(sequence => sequence.Group.Begun);

    public long GeneratedTokens { get; private set; }

    public long PrefilledTokens { get; private set; }

    public long PrefixHitTokens { get; private set; }

    public long Preemptions { get; private set; }

    /// <summary>Tokens of ended samples by how many versions old they were when their sample ended; the last counts all older ones.</summary>
    public ReadOnlyMemory<long> TokensByStaleness => _tokensByStaleness;

    /// <summary>Queues a group. Its first sample, the leader, computes the prompt for all of them.</summary>
    internal void Submit(Group group)
    {
        _waiting.AddLast(group.Samples[0]);
        _unforked += group.Samples.Count - 1;
        group.Forked = group.Samples.Count == 1;
    }

    /// <summary>Fills <paramref name="step"/> with the next tokens to compute. False when there is nothing to do.</summary>
    /// <param name="step">Filled.</param>
    /// <param name="admitNew">Whether groups that have not begun may begin.</param>
    internal bool Next(ScheduledStep step, bool admitNew)
    {
        step.Clear();
        int budget = _maxBatchTokens;

        for (int i = 0; i < _running.Count && budget > 0; i++)
        {
            Sequence sequence = _running[i];
            int tokens = Math.Min(sequence.Gap, budget);
            if (tokens == 0) continue; // it waits for its last token
            if (!MakeRoom(sequence, sequence.Computed + tokens)) break;
            AddRows(step, sequence, tokens);
            budget -= tokens;
        }

        LinkedListNode<Sequence>? next;
        for (LinkedListNode<Sequence>? node = _waiting.First; node is not null; node = next)
        {
            next = node.Next;
            if (budget == 0 || _running.Count == _maxSequences) break;
            Sequence sequence = node.Value;
            if (sequence.Gap == 0 || !MayBegin(sequence, admitNew)) continue;
            if (!TrySeat(sequence)) break; // no overtaking: whoever is next gets the next free blocks
            _waiting.Remove(node);
            int tokens = Math.Min(sequence.Gap, budget);
            AddRows(step, sequence, tokens);
            budget -= tokens;
        }

        int sequences = step.Layout.SequenceCount;
        for (int s = 0; s < sequences; s++) AddQueries(step, s);
        return sequences > 0;
    }

    /// <summary>
    /// Takes in what the step computed and sampled, ends samples, and raises groups that have something new, each once: those of which a
    /// sample ended now, those that stream when it is time.
    /// </summary>
    internal void Complete(ScheduledStep step)
    {
        foreach (Sequence sequence in step.Sequences.AsSpan(0, step.Layout.SequenceCount))
        {
            _blocks.CacheFullBlocks(sequence, Version, sequence.Group.Salt);
            if (sequence.Group.PromptRunner == sequence && sequence.Computed >= sequence.PromptLength) sequence.Group.PromptRunner = null;
        }

        ReadOnlySpan<Question> questions = step.Questions.AsSpan(0, step.Layout.QueryCount);
        for (int q = 0; q < questions.Length; q++)
        {
            Question question = questions[q];
            if (question.PromptPosition >= 0) TakePromptLogProb(step.Layout, q, question.Sequence, question.PromptPosition);
            else TakeSample(step.Layout, q, question.Sequence);
        }

        foreach (Question question in questions) RaiseNews(question.Sequence.Group);
        _streams.EndStep(Stopwatch.GetTimestamp());
    }

    /// <summary>Raises the streaming groups whose news was held back for the steps to follow, because none may follow soon.</summary>
    internal void RaiseStreams() => _streams.RaiseAll();

    /// <summary>Ends all samples of a group that have not ended. Returns how many that were.</summary>
    internal int End(Group group, FinishReason reason, string error = "")
    {
        if (!group.Forked) SetForked(group);
        int ended = 0;
        foreach (Sequence sequence in group.Samples)
        {
            if (sequence.FinishReason != FinishReason.None) continue;
            Leave(sequence, reason, error);
            ended++;
        }

        RaiseNews(group);
        return ended;
    }

    /// <summary>New weights are in force from the next step on.</summary>
    internal void WeightsChanged(ulong version, UpdatePolicy policy)
    {
        Version = version;
        EndStale(policy);
        for (int i = _running.Count - 1; i >= 0; i--)
        {
            Sequence sequence = _running[i];
            if (Keeps(sequence, policy)) sequence.SingleVersionKv = false;
            else Unseat(i);
        }
    }

    /// <summary>Keys and values are about to go: sequences with a seat give it up and recompute, and no prefix can be hit.</summary>
    internal void DropAllKv()
    {
        for (int i = _running.Count - 1; i >= 0; i--) Unseat(i);
        _blocks.ForgetCached();
    }

    /// <summary>Ends samples whose oldest part is older than their request allows, before a step is spent on them.</summary>
    private void EndStale(UpdatePolicy policy)
    {
        // To the side first: ending a sample changes both lists.
        List<Sequence> stale = [.. _running.Concat(_waiting).Where(sequence =>
            sequence.Group.Request.MaxStaleness is { } most && Version - OldestPart(sequence, policy) > (ulong)most)];
        foreach (Sequence sequence in stale)
        {
            Leave(sequence, FinishReason.Abort);
            RaiseNews(sequence.Group);
        }
    }

    /// <summary>Version of the oldest token of a sample, or of the oldest keys and values it is going to keep.</summary>
    private ulong OldestPart(Sequence sequence, UpdatePolicy policy)
    {
        ulong oldest = sequence.Sampled > 0 ? sequence.Versions(0, 1)[0] : Version;
        return Keeps(sequence, policy) && sequence.Computed > 0 ? Math.Min(oldest, sequence.OldestKvVersion) : oldest;
    }

    /// <summary>Whether keys and values outlive new weights. Log-probabilities of a prompt are always those of one version.</summary>
    private static bool Keeps(Sequence sequence, UpdatePolicy policy) => policy == UpdatePolicy.Keep && !IsScoring(sequence);

    /// <summary>Whether the log-probabilities of the group's prompt are still to come, from this sample's rows.</summary>
    private static bool IsScoring(Sequence sequence)
        => sequence.Group.Request.PromptLogProbs && sequence.Index == 0 && sequence.Sampled == 0;

    /// <summary>Blocks for the first <paramref name="tokens"/> tokens, at the cost of younger sequences. False when it had to yield itself.</summary>
    private bool MakeRoom(Sequence sequence, int tokens)
    {
        while (!_blocks.TryGrow(sequence, tokens))
        {
            Sequence youngest = _running[^1];
            Unseat(_running.Count - 1);
            Preemptions++;
            if (youngest == sequence) return false;
        }

        return true;
    }

    /// <summary>Back to the front of the queue, without keys and values.</summary>
    private void Unseat(int index)
    {
        Sequence sequence = _running[index];
        _running.RemoveAt(index);
        DropKv(sequence);
        _waiting.AddFirst(sequence);
    }

    private void DropKv(Sequence sequence)
    {
        _blocks.Release(sequence);
        sequence.Computed = 0;
        sequence.SingleVersionKv = true;
        if (sequence.Group.PromptRunner == sequence) sequence.Group.PromptRunner = null;
    }

    private static bool MayBegin(Sequence sequence, bool admitNew)
    {
        Group group = sequence.Group;
        // One sample computes the group's prompt, the others wait for its blocks.
        return (admitNew || group.Begun) && group.PromptRunner is null;
    }

    /// <summary>A seat needs blocks for everything the sequence has so far, so that it does not evict itself half-way.</summary>
    private bool TrySeat(Sequence sequence)
    {
        Group group = sequence.Group;
        // Prompt log-probabilities need the prompt's rows computed, not found.
        int found = IsScoring(sequence) ? 0 : _blocks.AttachPrefix(sequence, Version, group.Salt);
        if (!_blocks.TryGrow(sequence, sequence.Total + sequence.Asked))
        {
            DropKv(sequence);
            return false;
        }

        _running.Add(sequence);
        sequence.Computed = found;
        sequence.OldestKvVersion = Version;
        PrefixHitTokens += found;
        if (!group.Begun) group.CachedPromptTokens = found;
        group.Begun = true;
        if (found < KvBlocks.FullTokens(sequence.PromptLength - 1)) group.PromptRunner = sequence;
        return true;
    }

    private void AddRows(ScheduledStep step, Sequence sequence, int tokens)
    {
        StepLayout layout = step.Layout;
        int s = layout.SequenceCount++;
        int row = layout.RowStart[s];
        int position = sequence.Computed;
        step.Sequences[s] = sequence;
        layout.RowStart[s + 1] = row + tokens;
        int known = Math.Min(tokens, sequence.Total - position);
        sequence.AllTokens.Slice(position, known).CopyTo(layout.TokenIds.AsSpan(row));
        if (known < tokens) layout.TokenIds[row + known] = ~sequence.AskedQuery;
        for (int i = 0; i < tokens; i++) layout.Positions[row + i] = position + i;
        sequence.BlockTable.AsSpan(0, sequence.BlockCount).CopyTo(layout.BlockTables.AsSpan(s * layout.MaxBlocks));
        PrefilledTokens += Math.Clamp(sequence.PromptLength - position, 0, tokens);
        sequence.Computed += tokens;
    }

    /// <summary>What is asked of the logits of sequence s: its prompt's log-probabilities, and its next token once the gap is closed.</summary>
    private void AddQueries(ScheduledStep step, int s)
    {
        Sequence sequence = step.Sequences[s];
        int first = step.Layout.RowStart[s];
        int end = step.Layout.RowStart[s + 1];
        if (sequence.Group.Request.PromptLogProbs && sequence.Index == 0 && sequence.Sampled + sequence.Asked == 0)
        {
            for (int row = first; row < end; row++) AskPromptLogProb(step, sequence, row, step.Layout.Positions[row]);
        }

        if (sequence.Gap > 0 || sequence.MaxTokens == 0) return;
        AskSample(step, sequence, end - 1);
        if (!sequence.Group.Forked) Fork(step, sequence, end - 1);
    }

    /// <summary>
    /// The leader's prompt is complete with this step: its siblings sample their first token from the same logits and share its blocks.
    /// Those that find no seat or no block wait like anyone else, and will find the prefix that the leader leaves.
    /// </summary>
    private void Fork(ScheduledStep step, Sequence leader, int row)
    {
        Group group = leader.Group;
        SetForked(group);
        int seated = 1;
        while (seated < group.Samples.Count && _running.Count < _maxSequences)
        {
            Sequence sibling = group.Samples[seated];
            if (!_blocks.TryFork(leader, sibling, leader.Total, out BlockCopy copy)) break;
            if (copy.From >= 0) step.Copies.Add(copy);
            sibling.Computed = leader.Total;
            sibling.OldestKvVersion = leader.OldestKvVersion;
            sibling.SingleVersionKv = leader.SingleVersionKv;
            _running.Add(sibling);
            AskSample(step, sibling, row);
            seated++;
        }

        QueueFrom(group, seated);
    }

    private void SetForked(Group group)
    {
        group.Forked = true;
        _unforked -= group.Samples.Count - 1;
    }

    /// <summary>Samples of a group go to the front of the queue, in their order.</summary>
    private void QueueFrom(Group group, int first)
    {
        for (int i = group.Samples.Count - 1; i >= first; i--) _waiting.AddFirst(group.Samples[i]);
    }

    private static void AskPromptLogProb(ScheduledStep step, Sequence sequence, int row, int position)
    {
        StepLayout layout = step.Layout;
        // After the last prompt token there is no token to score, only alternatives to list.
        bool last = position == sequence.PromptLength - 1;
        int top = sequence.Group.Request.PromptTop;
        step.Questions[layout.QueryCount] = new Question(sequence, position);
        layout.Queries[layout.QueryCount++] = new SampleQuery
        {
            OutputIndex = OutputIndexOf(layout, row),
            Target = last ? 0 : sequence.AllTokens[position + 1],
            Temperature = 1,
            TopP = 1,
            AlternativesStart = layout.AlternativesCount,
            AlternativesCount = top,
        };
        layout.AlternativesCount += top;
    }

    private static void AskSample(ScheduledStep step, Sequence sequence, int row)
    {
        StepLayout layout = step.Layout;
        Group group = sequence.Group;
        GroupRequest request = group.Request;
        LogitBias bias = sequence.Sampled + sequence.Asked < request.MinTokens ? group.BiasBeforeMinTokens : group.Bias;
        step.Questions[layout.QueryCount] = new Question(sequence, -1);
        sequence.AskedQuery = layout.QueryCount;
        layout.Queries[layout.QueryCount++] = new SampleQuery
        {
            OutputIndex = OutputIndexOf(layout, row),
            Target = -1,
            Temperature = request.Temperature,
            TopK = request.TopK,
            TopP = request.TopP,
            MinP = request.MinP,
            Seed = request.Seed,
            SampleIndex = (uint)sequence.Index,
            Position = sequence.Total + sequence.Asked,
            BiasStart = layout.AddBiases(bias.Ids, bias.Values),
            BiasCount = bias.Ids.Length,
            AlternativesStart = layout.AlternativesCount,
            AlternativesCount = request.TopLogProbs,
        };
        layout.AlternativesCount += request.TopLogProbs;
        sequence.Asked++;
    }

    private static int OutputIndexOf(StepLayout step, int row)
    {
        if (step.OutputCount == 0 || step.OutputRows[step.OutputCount - 1] != row) step.OutputRows[step.OutputCount++] = row;
        return step.OutputCount - 1;
    }

    private void TakePromptLogProb(StepLayout step, int q, Sequence sequence, int position)
    {
        if (sequence.FinishReason != FinishReason.None) return; // an earlier position of this step failed
        Group group = sequence.Group;
        if (step.Results[q].Token < 0)
        {
            Leave(sequence, FinishReason.Error, NoToken);
            return;
        }

        int top = group.Request.PromptTop;
        int from = step.Queries[q].AlternativesStart;
        step.AlternativeIds.AsSpan(from, top).CopyTo(group.PromptTopIds.AsSpan(position * top));
        step.AlternativeLogProbs.AsSpan(from, top).CopyTo(group.PromptTopLogProbs.AsSpan(position * top));
        bool last = position == sequence.PromptLength - 1;
        if (!last) group.PromptLogProbs[position] = step.Results[q].LogProb;
        else group.PromptVersion = Version;
        if (last && sequence.MaxTokens == 0) Leave(sequence, FinishReason.Length);
    }

    private void TakeSample(StepLayout step, int q, Sequence sequence)
    {
        if (sequence.FinishReason != FinishReason.None) return; // with the step before: this row was for nothing
        sequence.Asked--;
        SampleResult result = step.Results[q];
        if (result.Token < 0)
        {
            Leave(sequence, FinishReason.Error, NoToken);
            return;
        }

        int from = step.Queries[q].AlternativesStart;
        int top = sequence.TopLogProbs;
        sequence.Append(result, step.AlternativeIds.AsSpan(from, top), step.AlternativeLogProbs.AsSpan(from, top), Version);
        GeneratedTokens++;

        FinishReason reason = EndOf(sequence, result.Token);
        if (reason != FinishReason.None)
        {
            Leave(sequence, reason);
            return;
        }

        sequence.Publish();
        if (sequence.Group.Request.StreamTokens) _streams.Add(sequence.Group);
    }

    private static FinishReason EndOf(Sequence sequence, int token)
    {
        Group group = sequence.Group;
        bool matched = sequence.StopStrings?.Append(token) ?? false;
        if (sequence.Sampled >= group.Request.MinTokens && (matched || group.EndTokens.AsSpan().Contains(token))) return FinishReason.Stop;
        return sequence.Sampled == sequence.MaxTokens ? FinishReason.Length : FinishReason.None;
    }

    /// <summary>The one way out, from whichever list the sequence is in.</summary>
    private void Leave(Sequence sequence, FinishReason reason, string error = "")
    {
        if (!_running.Remove(sequence)) _waiting.Remove(sequence);
        DropKv(sequence);
        CountStaleness(sequence);
        Group group = sequence.Group;
        if (!group.Forked)
        {
            // The leader goes before the prompt is complete: nobody computes it for its siblings any more.
            SetForked(group);
            QueueFrom(group, 1);
        }

        // The engine forgets the group before anyone can see its end: whoever sees it may use its id again.
        bool last = group.CountEnded() == group.Samples.Count;
        if (last) _groupEnded(group);
        sequence.Finish(reason, error);
        if (last) group.Complete();
        group.HasNews = true;
    }

    private void CountStaleness(Sequence sequence)
    {
        ReadOnlySpan<ulong> versions = sequence.Versions(0, sequence.Sampled);
        for (int start = 0, end; start < versions.Length; start = end)
        {
            end = versions[start..].IndexOfAnyExcept(versions[start]) is var length and >= 0 ? start + length : versions.Length;
            int staleness = (int)Math.Min(Version - versions[start], (ulong)_tokensByStaleness.Length - 1);
            _tokensByStaleness[staleness] += end - start;
        }
    }

    private static void RaiseNews(Group group)
    {
        if (!group.HasNews) return;
        group.HasNews = false;
        group.Raise();
    }

    private string NoToken => $"no token can be drawn under weights version {Version}: its logits are not finite, or every token is forbidden";
}
