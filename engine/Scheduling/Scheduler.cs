using System.Diagnostics;
using Rollout.Kernels;

namespace Rollout.Engine;

/// <summary>
/// Decides which tokens the next step computes. There is no prefill and no decode: a sequence has computed and total tokens, and a step
/// closes the gap, oldest sequence first, within a budget of tokens. Chunked prefill, prefix hits, preemption (drop the keys and
/// values, recompute later) and new weights under RECOMPUTE all follow from that rule.
/// <code>
///   Submit -> [ waiting ] -- a seat, and blocks for all its tokens --> [ running ] --> ended
///                 ^                                                        |
///                 +-------- preempted: youngest first, computed = 0 -------+
/// </code>
/// These decisions change when a token is sampled, never which token: see DEFINITIONS.md. Not thread-safe: the engine's loop owns it.
/// <para>
/// A step may be planned while the one before is in flight. Rows and queries count as computed and in flight when they are planned; a row's
/// token may be the result of a query of the step before; and the row of a sequence that turns out to have ended is discarded. Steps run
/// in the order in which they were planned, so a freed block may be reused at once. Everything else, in particular a change of weights,
/// happens while no step is in flight.
/// </para>
/// </summary>
public sealed partial class Scheduler
{
    private readonly KvBlocks _blocks;
    private readonly int _maxSequences;
    private readonly int _maxBatchTokens;
    private readonly Action<Sequence> _sequenceEnded;
    private readonly Action<Group> _groupEnded;
    private readonly List<Sequence> _running;            // oldest first
    private readonly LinkedList<Sequence> _waiting = []; // next first
    private int _unforked;                               // sequences whose leader is still computing the prompt for them
    private readonly StreamWakes _streams;

    /// <param name="blocks">The pool.</param>
    /// <param name="maxSequences">Most sequences with a seat.</param>
    /// <param name="maxBatchTokens">Most tokens in one step.</param>
    /// <param name="sequenceEnded">Called on the loop when a sequence has ended.</param>
    /// <param name="groupEnded">Called on the loop when a group's last sequence has ended, before readers can see it.</param>
    internal Scheduler(
        KvBlocks blocks, int maxSequences, int maxBatchTokens, Action<Sequence> sequenceEnded, Action<Group> groupEnded)
    {
        _blocks = blocks;
        _maxSequences = maxSequences;
        _maxBatchTokens = maxBatchTokens;
        _sequenceEnded = sequenceEnded;
        _groupEnded = groupEnded;
        _running = new List<Sequence>(maxSequences);
        _streams = new StreamWakes(maxSequences);
    }

    /// <summary>Version of the weights that the next step runs on.</summary>
    public ulong Version { get; private set; }

    public int Running => _running.Count;

    public int Waiting => _waiting.Count + _unforked;

    /// <summary>Sequences with a seat, oldest first.</summary>
    internal IReadOnlyList<Sequence> RunningSequences => _running;

    internal bool IsEmpty => _running.Count == 0 && _waiting.Count == 0;

    /// <summary>Whether a group that has had a seat has sequences that have not ended.</summary>
    internal bool HasBegun => _running.Count > 0 || _waiting.Any(sequence => sequence.Group.Begun);

    public long GeneratedTokens { get; private set; }

    public long PrefilledTokens { get; private set; }

    public long PrefixHitTokens { get; private set; }

    public long Preemptions { get; private set; }

    /// <summary>Queues a group. Its first sequence, the leader, computes the prompt for all of them.</summary>
    internal void Submit(Group group)
    {
        _waiting.AddLast(group.Sequences[0]);
        _unforked += group.Sequences.Count - 1;
        group.Forked = group.Sequences.Count == 1;
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
            if (tokens == 0) continue; // its last token is in flight
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
            if (!TrySeat(sequence)) break; // no overtaking: the first in the queue gets the next free blocks
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
    /// Collects what the step computed and sampled, ends sequences, and wakes the readers of groups, each once: at once where a sequence
    /// ended, otherwise as <see cref="StreamWakes"/> decides.
    /// </summary>
    internal void CollectResults(ScheduledStep step)
    {
        foreach (Sequence sequence in step.Sequences)
        {
            _blocks.CacheFullBlocks(sequence, Version, sequence.Group.Salt);
            if (sequence.Group.PromptRunner == sequence && sequence.Computed >= sequence.PromptLength) sequence.Group.PromptRunner = null;
        }

        for (int q = 0; q < step.Queries.Length; q++) CollectResult(step, q);
        foreach (StepQuery query in step.Queries) WakeIfEnded(query.Sequence.Group);
        _streams.EndStep(Stopwatch.GetTimestamp());
    }

    /// <summary>Wakes all readers of streams that have unread tokens, because no step may follow soon.</summary>
    internal void WakeStreams() => _streams.RaiseAll();

    /// <summary>Ends all sequences of a group that have not ended. Returns their number.</summary>
    internal int End(Group group, FinishReason reason, string error = "")
    {
        int ended = 0;
        foreach (Sequence sequence in group.Sequences)
        {
            if (sequence.FinishReason != FinishReason.None) continue;
            End(sequence, reason, error);
            ended++;
        }

        WakeIfEnded(group);
        return ended;
    }

    /// <summary>
    /// Allocates blocks for the sequence's first <paramref name="tokens"/> tokens, preempting the youngest sequences. False when it was
    /// preempted itself.
    /// </summary>
    private bool MakeRoom(Sequence sequence, int tokens)
    {
        while (!_blocks.TryGrow(sequence, tokens))
        {
            Sequence youngest = _running[^1];
            Preempt(_running.Count - 1);
            Preemptions++;
            if (youngest == sequence) return false;
        }

        return true;
    }

    /// <summary>Moves a sequence back to the front of the queue, without keys and values.</summary>
    private void Preempt(int index)
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
        // One sequence computes the group's prompt, the others wait for its blocks.
        return (admitNew || group.Begun) && group.PromptRunner is null;
    }

    /// <summary>A seat needs blocks for everything the sequence has so far, so that it is not preempted half-way.</summary>
    private bool TrySeat(Sequence sequence)
    {
        Group group = sequence.Group;
        // Prompt log-probabilities need the prompt's rows computed, not found.
        int found = sequence.IsScoring ? 0 : _blocks.AttachPrefix(sequence, Version, group.Salt);
        if (!_blocks.TryGrow(sequence, sequence.Total + sequence.InFlight))
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
        PrefilledTokens += Math.Clamp(sequence.PromptLength - sequence.Computed, 0, tokens);
        step.AddRows(sequence, tokens);
    }

    /// <summary>Adds the queries of sequence s: its prompt's log-probabilities, and its next token once the gap is closed.</summary>
    private void AddQueries(ScheduledStep step, int s)
    {
        Sequence sequence = step.Sequences[s];
        if (sequence.IsScoring && sequence.InFlight == 0) step.AddPromptQueries(s);
        if (sequence.Gap > 0 || sequence.MaxTokens == 0) return;
        step.AddSampleQuery(sequence, step.LastRowOf(s));
        if (!sequence.Group.Forked) Fork(step, sequence, step.LastRowOf(s));
    }

    /// <summary>
    /// The leader's prompt is complete with this step: its siblings sample their first token from the same logits and share its blocks.
    /// Those that get no seat or no block wait in the queue and then hit the leader's cached prefix.
    /// </summary>
    private void Fork(ScheduledStep step, Sequence leader, int row)
    {
        Group group = leader.Group;
        SetForked(group);
        int seated = 1;
        while (seated < group.Sequences.Count && _running.Count < _maxSequences)
        {
            Sequence sibling = group.Sequences[seated];
            if (!_blocks.TryFork(leader, sibling, leader.Total, out BlockCopy copy)) break;
            if (copy.From >= 0) step.Copies.Add(copy);
            sibling.Computed = leader.Total;
            sibling.OldestKvVersion = leader.OldestKvVersion;
            sibling.SingleVersionKv = leader.SingleVersionKv;
            _running.Add(sibling);
            step.AddSampleQuery(sibling, row);
            seated++;
        }

        QueueFrom(group, seated);
    }

    private void SetForked(Group group)
    {
        group.Forked = true;
        _unforked -= group.Sequences.Count - 1;
    }

    /// <summary>Puts sequences of a group at the front of the queue, in their order.</summary>
    private void QueueFrom(Group group, int first)
    {
        for (int i = group.Sequences.Count - 1; i >= first; i--) _waiting.AddFirst(group.Sequences[i]);
    }

    private void CollectResult(ScheduledStep step, int q)
    {
        StepQuery query = step.Queries[q];
        Sequence sequence = query.Sequence;
        if (sequence.FinishReason != FinishReason.None) return; // it ended with the step before, or with an earlier query of this one
        FinishReason reason = step.StoreResult(q, Version);
        if (query.IsSample && reason != FinishReason.Error) GeneratedTokens++;
        if (reason != FinishReason.None)
        {
            End(sequence, reason, reason == FinishReason.Error ? NoToken : "");
        }
        else if (query.IsSample)
        {
            sequence.Publish();
            if (sequence.Group.Request.StreamTokens) _streams.Add(sequence.Group);
        }
    }

    private string NoToken =>
        $"no token can be drawn under weights version {Version}: its logits are not finite, or every token is forbidden";

    /// <summary>Removes a sequence from the list it is in, and ends it. Every sequence ends here.</summary>
    private void End(Sequence sequence, FinishReason reason, string error = "")
    {
        if (!_running.Remove(sequence)) _waiting.Remove(sequence);
        DropKv(sequence);
        _sequenceEnded(sequence);
        Group group = sequence.Group;
        if (!group.Forked)
        {
            // The leader ends before the prompt is complete: its siblings must compute it themselves.
            SetForked(group);
            QueueFrom(group, 1);
        }

        // The engine removes the group before readers can see its end, because they may then reuse its id.
        bool last = group.CountEnded() == group.Sequences.Count;
        if (last) _groupEnded(group);
        sequence.Finish(reason, error);
        if (last) group.Complete();
        group.HasEndedSamples = true;
    }

    private static void WakeIfEnded(Group group)
    {
        if (!group.HasEndedSamples) return;
        group.HasEndedSamples = false;
        group.Raise();
    }
}
