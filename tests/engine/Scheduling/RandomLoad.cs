using System.Text;
using Rollout.Kernels;
using Xunit;

namespace Rollout.Engine.Tests;

/// <summary>The settings of a load, and its script: every number is one action.</summary>
internal sealed record LoadPlanned(int Seats, int BatchTokens, int Blocks, bool PlansAhead, int[] Script);

/// <summary>
/// A scheduler under a mixed load, and all its guarantees: checked after every action, and for every sample at its end from its request and
/// the versions of its tokens alone.
/// </summary>
internal sealed class RandomLoad
{
    private static readonly PieceTokenizer s_tokenizer = new([.. Enumerable.Range(0, RememberingDevice.Vocabulary)
        .Select(t => Encoding.UTF8.GetBytes("abccbaacb".Substring(t % 7, t % 3)))]); // of no byte to two

    private static TimeSpan s_patience = TimeSpan.FromSeconds(30);

    private readonly LoadPlanned _load;
    private readonly KvBlocks _blocks;
    private readonly Scheduler _scheduler;
    private readonly RememberingDevice _device;
    private readonly ScheduledStep[] _plans;
    private ScheduledStep? _inFlight;
    private RememberingDevice.Answers? _answers;

    private readonly List<Group> _submitted = [];
    private readonly List<Group> _ended = [];
    private readonly List<Task> _readers = [];
    private readonly Dictionary<Group, int> _begun = []; // with the position of its first row
    private readonly HashSet<Group> _mixed = [];         // may have keys and values of several versions
    private readonly HashSet<Sequence> _seated = [];
    private readonly HashSet<Sequence> _aborted = [];
    private readonly HashSet<Sequence> _counted = [];
    private readonly EngineMetrics _metrics = new("random load", () => 0);
    private readonly long[] _staleness = new long[9];
    private readonly List<ulong> _versions = [0];

    public RandomLoad(LoadPlanned load)
    {
        _load = load;
        _blocks = new KvBlocks(load.Blocks);
        _scheduler = new Scheduler(_blocks, load.Seats, load.BatchTokens, sequence =>
        {
            Assert.Equal(FinishReason.None, sequence.FinishReason);
            _metrics.CountTokens(sequence.Versions(0, sequence.Sampled), _scheduler!.Version);
        }, group =>
        {
            // A reader that sees the end may reuse the id: the engine must have removed the group by then.
            Assert.Single(group.Sequences, sample => sample.FinishReason == FinishReason.None);
            Assert.False(group.Completed.IsCompleted);
            _ended.Add(group);
        });
        _device = new RememberingDevice(load.Blocks);
        int queries = load.BatchTokens + load.Seats;
        _plans = [.. Enumerable.Range(0, 2).Select(
            _ => new ScheduledStep(new StepLayout(load.BatchTokens, load.Seats, 8, queries, 3 * queries, 1)))];
    }

    public void Run()
    {
        using EngineMetrics metrics = _metrics;
        foreach (int draw in _load.Script)
        {
            Act(draw % 20, new Random(draw));
            CheckCounts();
        }

        // Nothing starves: the rest ends within the steps that its tokens need, at worst one row a step, recomputed at every preemption.
        for (int steps = 0; !_scheduler.IsEmpty || _inFlight is not null; steps++)
        {
            Assert.True(steps < 200_000, $"{_scheduler.Running} running and {_scheduler.Waiting} waiting samples do not end");
            Step(admitNew: true);
        }

        CheckCounts();
        CheckEnd();
    }

    private void Act(int kind, Random random)
    {
        switch (kind)
        {
            case < 6:
                Group group = NewGroup(_submitted.Count, random);
                _submitted.Add(group);
                _readers.Add(Task.Run(() => ReadAsync(group)));
                if (random.Next(10) > 0)
                {
                    _scheduler.Submit(group);
                    break;
                }

                // Ended by the engine before it is queued.
                _aborted.UnionWith(group.Sequences);
                Assert.Equal(group.Sequences.Count, _scheduler.End(group, FinishReason.Abort));
                break;
            case 6 when _submitted.Count > 0:
                CollectInFlight();
                Group aborted = _submitted[random.Next(_submitted.Count)];
                Sequence[] left = [.. aborted.Sequences.Where(sample => sample.FinishReason == FinishReason.None)];
                _aborted.UnionWith(left);
                Assert.Equal(left.Length, _scheduler.End(aborted, FinishReason.Abort));
                break;
            case 7:
                CollectInFlight();
                Update(random.Next(2) == 0 ? UpdatePolicy.Keep : UpdatePolicy.Recompute, _versions[^1] + (ulong)random.Next(1, 4));
                break;
            case 8 when random.Next(4) == 0:
                CollectInFlight();
                _scheduler.DropAllKv();
                _device.Forget();
                Assert.Equal((0, 0, 0), (_blocks.Used, _blocks.Cached, _scheduler.Running));
                break;
            default:
                Step(admitNew: kind != 9);
                break;
        }
    }

    private void Update(UpdatePolicy policy, ulong version)
    {
        Sequence[] open = [.. _submitted.SelectMany(group => group.Sequences).Where(sample => sample.FinishReason == FinishReason.None)];
        bool Scoring(Sequence sample) => sample.Group.Request.PromptLogProbs && sample.Index == 0 && sample.Published == 0;
        bool Keeps(Sequence sample) => policy == UpdatePolicy.Keep && sample.Computed > 0 && !Scoring(sample);
        List<Sequence> stale = [];
        foreach (Sequence sample in open)
        {
            ulong oldest = sample.Published > 0 ? sample.Versions(0, 1)[0] : version;
            if (Keeps(sample)) oldest = Math.Min(oldest, sample.OldestKvVersion); // the device has checked it
            if (sample.Group.Request.MaxStaleness is { } most && version - oldest > (ulong)most) stale.Add(sample);
        }

        _aborted.UnionWith(stale);
        Dictionary<Sequence, int> kept = open.Except(stale).Where(Keeps).ToDictionary(sample => sample, sample => sample.Computed);
        _versions.Add(version);
        _scheduler.WeightsChanged(version, policy);

        Assert.Equal(version, _scheduler.Version);
        Assert.Equal(stale, open.Where(sample => sample.FinishReason != FinishReason.None));
        foreach (Sequence sample in open.Except(stale)) Assert.Equal(kept.GetValueOrDefault(sample), sample.Computed);
        _mixed.UnionWith(kept.Keys.Select(sample => sample.Group));
    }

    private static Group NewGroup(int id, Random random)
    {
        // Few different blocks in any order, so that equal blocks after different prefixes are common; most prompts end inside a block.
        int[] prompt =
        [
            .. Enumerable.Range(0, random.Next(4)).SelectMany(_ => Piece(random.Next(3), KvCache.BlockTokens)),
            .. Piece(random.Next(3), random.Next(3) == 0 ? 0 : random.Next(1, KvCache.BlockTokens)),
        ];
        if (prompt.Length == 0) prompt = [random.Next(RememberingDevice.Vocabulary)];
        bool scores = random.Next(3) == 0;
        int n = scores && random.Next(2) == 0 ? 1 : random.Next(1, 6);
        int maxTokens = random.Next(scores && n == 1 ? 0 : 1, 50);
        GroupRequest request = new()
        {
            Id = $"{id}",
            Prompt = prompt,
            N = n,
            Seed = (ulong)random.Next(),
            MaxTokens = maxTokens,
            MinTokens = random.Next(2) == 0 ? 0 : random.Next(0, maxTokens + 1),
            CacheSalt = random.Next(6) switch { 0 => "salt", 1 => "sale", _ => "" },
            PromptLogProbs = scores,
            PromptTop = scores ? random.Next(3) : 0,
            TopLogProbs = random.Next(4),
            MaxStaleness = random.Next(3) == 0 ? random.Next(4) : null,
            StreamTokens = random.Next(2) == 0,
            StopStrings = random.Next(3) > 0 ? []
                : [.. Enumerable.Range(0, random.Next(1, 4)).Select(_ => "abcbacca".Substring(random.Next(4), random.Next(1, 5)))],
            LogitBias = new[] { 7, 8, 9, 10, 50 }.Where(_ => random.Next(4) == 0)
                .ToDictionary(token => token, _ => random.Next(2) == 0 ? 1 : float.NegativeInfinity),
        };
        Sequence[] samples = [.. Enumerable.Range(0, n).Select(i => new Sequence(i, prompt, maxTokens, request.TopLogProbs)
        {
            StopStrings = request.StopStrings.Count == 0 ? null : new StopStringMatcher(request.StopStrings, s_tokenizer),
        })];
        return new Group(request, samples, endTokens: random.Next(3) == 0 ? [] : [7, 30]);
    }

    private static IEnumerable<int> Piece(int kind, int tokens) => Enumerable.Range(0, tokens).Select(i => 20 * kind + i);

    // ---- Like the engine's loop: one step at a time, or the next one planned and run before the results of the one before are collected.

    private void Step(bool admitNew)
    {
        ScheduledStep step = _inFlight == _plans[0] ? _plans[1] : _plans[0];
        if (!_scheduler.Next(step, admitNew))
        {
            if (_inFlight is null) _scheduler.WakeStreams();
            CollectInFlight();
            return;
        }

        StepLayout layout = step.Layout;
        Assert.InRange(layout.RowCount, layout.SequenceCount, _load.BatchTokens);
        Assert.InRange(_scheduler.Running, layout.SequenceCount, _load.Seats);
        for (int s = 0; s < layout.SequenceCount; s++)
        {
            Group group = step.Sequences[s].Group;
            int last = group.Request.Prompt.Length + Math.Max(1, group.Request.MaxTokens!.Value) - 2; // the last token is drawn from it
            Assert.InRange(layout.Positions[layout.RowStart[s + 1] - 1], 0, last);
            if (!_begun.TryAdd(group, layout.Positions[layout.RowStart[s]])) continue;
            Assert.True(admitNew, "a group began that may not");
            Assert.DoesNotContain(_submitted.TakeWhile(earlier => earlier != group),
                earlier => !_begun.ContainsKey(earlier) && !earlier.Completed.IsCompleted);
            // Preempted sequences come first, unless they wait for their group's prompt or their last token.
            IReadOnlyList<Sequence> running = _scheduler.RunningSequences;
            Assert.DoesNotContain(_seated, sample => sample.FinishReason == FinishReason.None && !running.Contains(sample)
                && !sample.Group.Sequences.Any(running.Contains) && _inFlight?.Sequences.Contains(sample) != true);
        }

        _seated.UnionWith(_scheduler.RunningSequences);
        RememberingDevice.Answers answers = _device.Run(step, _scheduler.Version, sequence => _mixed.Contains(sequence.Group));
        CollectInFlight();
        (_inFlight, _answers) = (step, answers);
        if (!_load.PlansAhead) CollectInFlight();
    }

    private void CollectInFlight()
    {
        if (_inFlight is not { } step) return;
        _inFlight = null;
        _answers!.WriteTo(step.Layout);
        _scheduler.CollectResults(step);
        CountStaleness();
    }

    // ---- Checks.

    private void CheckCounts()
    {
        _blocks.CheckInvariant(idle: false);
        Sequence[] open = [.. _submitted.SelectMany(group => group.Sequences).Where(sample => sample.FinishReason == FinishReason.None)];
        Assert.Equal(open.Length - _scheduler.Running, _scheduler.Waiting);
        if (_inFlight is null) Assert.Equal(open.Any(sample => _begun.ContainsKey(sample.Group)), _scheduler.HasBegun);
        CountStaleness();
        Assert.Equal(_staleness, _metrics.TokensByStaleness.ToArray());
    }

    /// <summary>Counts the samples that have ended since the last call, which was before the version changed.</summary>
    private void CountStaleness()
    {
        foreach (Sequence sample in _submitted.SelectMany(group => group.Sequences))
        {
            if (sample.FinishReason == FinishReason.None || !_counted.Add(sample)) continue;
            foreach (ulong version in sample.Versions(0, sample.Published)) _staleness[Math.Min(_scheduler.Version - version, 8)]++;
        }
    }

    private void CheckEnd()
    {
        _blocks.CheckInvariant(idle: true);
        Assert.Equal(0, _scheduler.Waiting);
        Assert.Equal(_submitted.Select(group => group.Request.Id).Order(), _ended.Select(group => group.Request.Id).Order());
        Assert.Equal(_submitted.SelectMany(group => group.Sequences).Sum(sample => sample.Published), _scheduler.GeneratedTokens);
        Assert.Equal(_device.PromptRows, _scheduler.PrefilledTokens);
        bool woken = Task.WhenAll(_readers).Wait(s_patience);
        if (!woken) s_patience = TimeSpan.FromMilliseconds(100); // for shrinking a failing load
        Assert.True(woken, "a reader was not woken at the end of its group");
        foreach (Group group in _submitted)
        {
            Assert.True(group.Completed.IsCompletedSuccessfully);
            Assert.Equal(_begun.GetValueOrDefault(group), group.CachedPromptTokens);
            if (group.Request.PromptLogProbs) CheckScores(group);
            foreach (Sequence sample in group.Sequences) CheckSample(group, sample, mixed: _mixed.Contains(group));
        }
    }

    /// <summary>A prompt's log-probabilities are those of one version, which the group names and its first token was drawn from.</summary>
    private static void CheckScores(Group group)
    {
        Sequence leader = group.Sequences[0];
        int[] prompt = group.Request.Prompt;
        int top = group.Request.PromptTop;
        if (leader.Published == 0 && leader.FinishReason != FinishReason.Length) return; // it ended before that
        if (leader.Published > 0) Assert.Equal(leader.Versions(0, 1)[0], group.PromptVersion);
        ulong past = 0;
        for (int p = 0; p < prompt.Length; p++)
        {
            past = RememberingDevice.Past(past, prompt[p], group.PromptVersion);
            Assert.True(RememberingDevice.IsFinite(past), "a score of logits that are no numbers");
            if (p + 1 < prompt.Length)
            {
                SampleQuery query = new() { Target = prompt[p + 1] };
                Assert.Equal(RememberingDevice.Answer(past, query, new HashSet<int>()).LogProb, group.PromptLogProbs[p]);
            }

            for (int k = 0; k < top; k++)
            {
                int at = p * top + k;
                Assert.Equal(RememberingDevice.Alternative(past, k), (group.PromptTopIds[at], group.PromptTopLogProbs[at]));
            }
        }
    }

    private void CheckSample(Group group, Sequence sample, bool mixed)
    {
        GroupRequest request = group.Request;
        int n = sample.Published;
        int[] tokens = sample.Tokens(0, n).ToArray();
        ulong[] versions = sample.Versions(0, n).ToArray();
        Assert.Equal(versions.Order(), versions);
        Dictionary<ulong, ulong> pasts = versions.Distinct()
            .ToDictionary(version => version, version => RememberingDevice.Past(request.Prompt, version));
        StringBuilder text = new();
        for (int i = 0; i < n; i++)
        {
            if (!mixed) CheckToken(group, sample, i, pasts[versions[i]]);
            foreach (ulong version in pasts.Keys) pasts[version] = RememberingDevice.Past(pasts[version], tokens[i], version);

            int before = text.Length;
            text.Append(Encoding.UTF8.GetString(s_tokenizer.TokenBytes(tokens[i])));
            string so = text.ToString();
            string? matched = request.StopStrings.FirstOrDefault(
                stop => so.LastIndexOf(stop, StringComparison.Ordinal) is >= 0 and var at && at + stop.Length > before);
            bool ends = i + 1 >= request.MinTokens && (matched is not null || group.EndTokens.Contains(tokens[i]));
            Assert.Equal(ends, i == n - 1 && sample.FinishReason == FinishReason.Stop);
            Assert.Equal(i + 1 == request.MaxTokens && !ends, i == n - 1 && sample.FinishReason == FinishReason.Length);
            if (ends) Assert.Equal(matched, sample.MatchedStop);
        }

        if (sample.FinishReason == FinishReason.Abort) Assert.Contains(sample, _aborted);
        else Assert.DoesNotContain(sample, _aborted);
        if (sample.FinishReason == FinishReason.Error && !mixed)
        {
            bool Fails(IEnumerable<int> all) => _versions.Any(version => !RememberingDevice.IsFinite(RememberingDevice.Past(all, version)));
            bool promptFails = request.PromptLogProbs && sample.Index == 0 && n == 0
                && Enumerable.Range(1, request.Prompt.Length).Any(p => Fails(request.Prompt.Take(p)));
            Assert.True(promptFails || Fails([.. request.Prompt, .. tokens]), "a sample failed without a reason");
        }
    }

    private static void CheckToken(Group group, Sequence sample, int i, ulong past)
    {
        GroupRequest request = group.Request;
        HashSet<int> forbidden = [.. request.LogitBias.Where(bias => float.IsNegativeInfinity(bias.Value)).Select(bias => bias.Key)];
        if (i < request.MinTokens) forbidden.UnionWith(group.EndTokens);
        int position = sample.PromptLength + i;
        SampleQuery query = new() { Target = -1, Seed = request.Seed, SampleIndex = (uint)sample.Index, Position = position };
        SampleResult expected = RememberingDevice.Answer(past, query, forbidden);
        Assert.Equal((expected.Token, expected.LogProb, expected.SamplingLogProb),
            (sample.Tokens(i, i + 1)[0], sample.LogProbs(i, i + 1)[0], sample.SamplingLogProbs(i, i + 1)[0]));
        for (int k = 0; k < request.TopLogProbs; k++)
            Assert.Equal(RememberingDevice.Alternative(past, k), (sample.TopIds(i, i + 1)[k], sample.TopLogProbValues(i, i + 1)[k]));
    }

    /// <summary>Reads a group as a caller does: the chunks of a sample are consecutive and report its end once.</summary>
    private static async Task ReadAsync(Group group)
    {
        int[] read = new int[group.Sequences.Count];
        HashSet<int> ended = [];
        await foreach (SequenceChunk chunk in group.ReadAsync())
        {
            Assert.DoesNotContain(chunk.Sequence.Index, ended);
            Assert.Equal(read[chunk.Sequence.Index], chunk.Start);
            bool isNews = group.Request.StreamTokens && chunk.End > chunk.Start;
            Assert.True(isNews || chunk.FinishReason != FinishReason.None, "a chunk of nothing");
            read[chunk.Sequence.Index] = chunk.End;
            if (chunk.FinishReason != FinishReason.None) ended.Add(chunk.Sequence.Index);
        }

        Assert.Equal(group.Sequences.Select(sample => sample.Published), read);
    }
}
