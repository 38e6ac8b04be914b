using CsCheck;
using Rollout.Kernels;
using Xunit;

namespace Rollout.Engine.Tests;

/// <summary>
/// The scheduler and the KV blocks under random load, on a device that remembers which token, at which position, under which weights,
/// each KV slot was computed from, and looks at every step whether a row finds its own past in its blocks.
/// </summary>
public sealed class SchedulerTests
{
    private sealed record Load(int Seats, int BatchTokens, int Blocks, int Prefixes, bool PlansAhead, int[] Script);

    private static readonly Gen<Load> s_load =
        from seats in Gen.Int[1, 12]
        from batchTokens in Gen.Int[1, 80]
        from blocks in Gen.Int[8, 60] // a sample has at most 8 blocks: one always fits, many never do
        from prefixes in Gen.Int[1, 3]
        from plansAhead in Gen.Bool
        from script in Gen.Int[0, int.MaxValue - 1].Array[10, 120]
        select new Load(seats, batchTokens, blocks, prefixes, plansAhead, script);

    [Fact]
    public void No_block_leaks_no_sample_starves_and_every_row_finds_its_past()
        => s_load.Sample(Run, iter: 400, threads: 1);

    private static void Run(Load load)
    {
        KvBlocks blocks = new(load.Blocks);
        List<Group> ended = [];
        Scheduler scheduler = new(blocks, load.Seats, load.BatchTokens, group =>
        {
            // Whoever sees the end may use the id again: the engine must have forgotten the group by then.
            Assert.Single(group.Samples, sample => sample.FinishReason == FinishReason.None);
            Assert.False(group.Completed.IsCompleted);
            ended.Add(group);
        });
        Loop loop = new(scheduler, new FakeDevice(load.Blocks), load);
        List<Group> submitted = [];
        HashSet<Group> kept = [];
        ulong version = 0;

        foreach (int draw in load.Script)
        {
            Random random = new(draw);
            switch (draw % 10)
            {
                case 0 or 1 or 2:
                    Group group = NewGroup(submitted.Count, random, load.Prefixes);
                    submitted.Add(group);
                    scheduler.Submit(group);
                    break;
                case 3 when submitted.Count > 0:
                    loop.Land();
                    scheduler.End(submitted[random.Next(submitted.Count)], FinishReason.Abort);
                    break;
                case 4:
                    loop.Land();
                    UpdatePolicy policy = random.Next(2) == 0 ? UpdatePolicy.Keep : UpdatePolicy.Recompute;
                    scheduler.WeightsChanged(++version, policy);
                    if (policy == UpdatePolicy.Keep) kept.UnionWith(submitted);
                    break;
                default:
                    loop.Step(kept, admitNew: draw % 7 != 0);
                    break;
            }

            blocks.CheckInvariant(idle: false);
        }

        // Nothing starves: what is left ends within the steps its tokens need, one row a step at worst, each recomputed at every preemption.
        for (int steps = 0; !scheduler.IsEmpty || loop.Land(); steps++)
        {
            Assert.True(steps < 200_000, $"{scheduler.Running} running and {scheduler.Waiting} waiting samples do not end");
            loop.Step(kept, admitNew: true);
        }

        blocks.CheckInvariant(idle: true);
        Assert.Equal(0, scheduler.Waiting);
        Assert.Equal(submitted.Count, ended.Distinct().Count());
        Assert.Equal(ended.Count, ended.Distinct().Count());
        foreach (Group group in submitted)
        {
            Assert.True(group.Completed.IsCompletedSuccessfully);
            foreach (Sequence sample in group.Samples) CheckTokens(group, sample);
        }
    }

    private static Group NewGroup(int id, Random random, int prefixes)
    {
        // Prompts of few families, so that prefixes are hit.
        int family = random.Next(prefixes);
        int[] prompt = [.. Enumerable.Range(0, random.Next(1, 64)).Select(i => 1000 * family + i)];
        GroupRequest request = new()
        {
            Id = $"{id}",
            Prompt = prompt,
            N = random.Next(1, 6),
            Seed = (ulong)random.Next(),
            MaxTokens = random.Next(1, 50),
            CacheSalt = random.Next(4) == 0 ? "salt" : "",
        };
        Sequence[] samples = [.. Enumerable.Range(0, request.N).Select(i => new Sequence(i, prompt, request.MaxTokens!.Value, 0))];
        return new Group(request, samples, endTokens: [7]);
    }

    /// <summary>As the engine's: a step at a time, or the next one planned and run before the answers of the one before are taken in.</summary>
    private sealed class Loop(Scheduler scheduler, FakeDevice device, Load load)
    {
        private readonly ScheduledStep[] _plans = [.. Enumerable.Range(0, 2).Select(
            _ => new ScheduledStep(new StepLayout(load.BatchTokens, load.Seats, 8, load.BatchTokens + load.Seats, 1, 1)))];

        private ScheduledStep? _underWay;

        public void Step(HashSet<Group> kept, bool admitNew)
        {
            ScheduledStep step = _underWay == _plans[0] ? _plans[1] : _plans[0];
            if (!scheduler.Next(step, admitNew))
            {
                Land();
                return;
            }

            int[] answers = device.Run(step.Layout, scheduler.Version);
            foreach (BlockCopy copy in step.Copies) device.CopyBlock(copy.From, copy.To);
            device.Check(scheduler, kept);
            Land();
            for (int q = 0; q < answers.Length; q++) step.Layout.Results[q] = new SampleResult { Token = answers[q] };
            _underWay = step;
            if (!load.PlansAhead) Land();
        }

        public bool Land()
        {
            if (_underWay is not { } step) return false;
            _underWay = null;
            scheduler.Complete(step);
            device.CheckComputed(scheduler);
            return true;
        }
    }

    /// <summary>What a sample must hold, told from its seed alone.</summary>
    private static void CheckTokens(Group group, Sequence sample)
    {
        int[] tokens = sample.Tokens(0, sample.Published).ToArray();
        int last = group.Request.Prompt[^1];
        for (int i = 0; i < tokens.Length; i++)
        {
            last = NextToken(group.Request.Seed, (uint)sample.Index, sample.PromptLength + i, last);
            Assert.Equal(last, tokens[i]);
            Assert.True(last != 7 || i == tokens.Length - 1, "a sample goes on after its end token");
        }

        Assert.Equal(sample.Versions(0, tokens.Length).ToArray(), sample.Versions(0, tokens.Length).ToArray().Order());
        if (sample.FinishReason == FinishReason.Length) Assert.Equal(group.Request.MaxTokens, tokens.Length);
        else if (sample.FinishReason == FinishReason.Stop) Assert.Equal(7, tokens[^1]);
        else Assert.Equal(FinishReason.Abort, sample.FinishReason);
    }

    private static int NextToken(ulong seed, uint index, int position, int last)
        => (int)((seed * 31 + index * 17 + (ulong)position * 13 + (ulong)last) * 2654435761 % 97);

    /// <summary>KV slots that remember what they were computed from.</summary>
    private sealed class FakeDevice(int blocks)
    {
        private readonly (int Token, int Position, ulong Version)[] _slots = new (int, int, ulong)[blocks * KvCache.BlockTokens];

        private int[] _answers = [];

        /// <summary>Computes a step, and what its queries are answered.</summary>
        public int[] Run(StepLayout step, ulong version)
        {
            HashSet<int> written = [];
            int[] tokens = [.. step.TokenIds.Take(step.RowCount).Select(token => token >= 0 ? token : _answers[~token])];
            for (int s = 0; s < step.SequenceCount; s++)
            {
                for (int row = step.RowStart[s]; row < step.RowStart[s + 1]; row++)
                {
                    int slot = Slot(step.BlockTables.AsSpan(s * step.MaxBlocks), step.Positions[row]);
                    Assert.True(written.Add(slot), "two rows of one step write one slot");
                    _slots[slot] = (tokens[row], step.Positions[row], version);
                }
            }

            _answers = [.. step.Queries.Take(step.QueryCount).Select(query =>
            {
                int row = step.OutputRows[query.OutputIndex];
                Assert.Equal(query.Position - 1, step.Positions[row]);
                return NextToken(query.Seed, query.SampleIndex, query.Position, tokens[row]);
            })];
            return _answers;
        }

        public void CopyBlock(int from, int to)
            => Array.Copy(_slots, from * KvCache.BlockTokens, _slots, to * KvCache.BlockTokens, KvCache.BlockTokens);

        /// <summary>Before the results: everything computed before this step is still there.</summary>
        public void Check(Scheduler scheduler, HashSet<Group> kept) => CheckAll(scheduler, kept);

        public void CheckComputed(Scheduler scheduler) => CheckAll(scheduler, null);

        private void CheckAll(Scheduler scheduler, HashSet<Group>? kept)
        {
            foreach (Sequence sequence in scheduler.RunningSequences)
            {
                for (int position = 0; position < Math.Min(sequence.Computed, sequence.Total); position++)
                {
                    (int token, int at, ulong version) = _slots[Slot(sequence.BlockTable, position)];
                    Assert.Equal((sequence.AllTokens[position], position), (token, at));
                    Assert.True(version >= sequence.OldestKvVersion, "keys and values older than the sample admits");
                    if (kept is not null && !kept.Contains(sequence.Group)) Assert.Equal(scheduler.Version, version);
                }
            }
        }

        private static int Slot(ReadOnlySpan<int> blockTable, int position)
            => blockTable[position / KvCache.BlockTokens] * KvCache.BlockTokens + position % KvCache.BlockTokens;
    }
}
