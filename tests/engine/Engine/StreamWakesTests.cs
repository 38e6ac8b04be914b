using System.Diagnostics;
using Rollout.Kernels;
using Xunit;

namespace Rollout.Engine.Tests;

/// <summary>When the readers of streams are woken for new tokens.</summary>
public sealed class StreamWakesTests
{
    [Fact]
    public async Task Short_steps_wake_readers_together_and_long_ones_one_by_one()
    {
        const int Groups = 100;
        StreamWakes wakes = new(Groups);
        Reader[] readers = [.. Enumerable.Range(0, Groups).Select(i => new Reader(i))];
        long now = 1_000 * Stopwatch.Frequency;

        await StepAsync(now, expected: 1);
        Step(now + (Stopwatch.Frequency / 1_000));
        Step(now + (2 * Stopwatch.Frequency / 1_000) - 1);
        await Task.Delay(20, TestContext.Current.CancellationToken);
        Assert.All(readers, reader => Assert.False(reader.HasNewTokens));
        await StepAsync(now + (Stopwatch.Frequency / 100), expected: 3);
        await StepAsync(now + (2 * Stopwatch.Frequency / 100), expected: 1);

        void Step(long end)
        {
            foreach (Reader reader in readers) reader.Sample(wakes);
            wakes.EndStep(end);
        }

        async Task StepAsync(long end, int expected)
        {
            Step(end);
            foreach (Reader reader in readers) Assert.Equal(expected, await reader.ReadAsync());
        }
    }

    [Fact]
    public async Task What_was_held_back_is_not_lost_when_no_step_follows()
    {
        StreamWakes wakes = new(2);
        Reader[] readers = [new(0), new(1)];
        readers[0].Sample(wakes);
        wakes.EndStep(now: 1);
        Assert.Equal(1, await readers[0].ReadAsync());
        foreach (Reader reader in readers) reader.Sample(wakes);
        wakes.EndStep(now: 2);
        wakes.RaiseAll();
        foreach (Reader reader in readers) Assert.Equal(1, await reader.ReadAsync());
    }

    [Fact]
    public void The_time_between_rounds_grows_with_the_groups_and_with_the_samples_of_one_step()
    {
        long one = TicksBetween(groups: 1, samples: 1, heldBack: 0);
        Assert.Equal(22, one * 1_000_000 / Stopwatch.Frequency); // microseconds: as measured, and not more because of earlier rounds
        long sample = TicksBetween(1, 2, 0) - one;
        Assert.InRange(sample, 1, one);
        Assert.Equal(one + (99 * sample), TicksBetween(1, 100, 0));
        Assert.Equal(10 * one, TicksBetween(10, 1, 0));
        foreach (int heldBack in (int[])[1, 2, 5]) Assert.Equal(TicksBetween(3, 4, 0), TicksBetween(3, 4, heldBack));
    }

    /// <summary>Time from the second round, before which this many steps woke no reader, to the third.</summary>
    private static long TicksBetween(int groups, int samples, int heldBack)
    {
        const long Start = 1_000_000_000_000;
        long soon = 0;
        long late = Stopwatch.Frequency;
        while (soon + 1 < late)
        {
            long middle = (soon + late) / 2;
            if (Wakes(middle)) late = middle;
            else soon = middle;
        }

        return late;

        bool Wakes(long ticks)
        {
            StreamWakes wakes = new(groups);
            Group[] all = [.. Enumerable.Range(0, groups).Select(i => new Group(new() { Id = $"{i}", Prompt = [1] }, [], endTokens: []))];
            Step(Start);
            for (int i = 0; i < heldBack; i++) Assert.False(Step(Start + i + 1));
            long second = Start + Stopwatch.Frequency;
            Assert.True(Step(second));
            return Step(second + ticks);

            bool Step(long now)
            {
                foreach (Group group in all)
                    for (int i = 0; i < samples; i++) wakes.Add(group);
                wakes.EndStep(now);
                return !all[0].IsWakePending;
            }
        }
    }

    private sealed class Reader
    {
        private readonly Group _group;
        private readonly IAsyncEnumerator<SequenceChunk> _chunks;
        private ValueTask<bool> _next;

        public Reader(int id)
        {
            GroupRequest request = new() { Id = $"{id}", Prompt = [1], MaxTokens = 100, StreamTokens = true };
            _group = new Group(request, [new Sequence(0, request.Prompt, 100, 0)], endTokens: []);
            _chunks = _group.ReadAsync(TestContext.Current.CancellationToken).GetAsyncEnumerator();
            _next = _chunks.MoveNextAsync();
        }

        public bool HasNewTokens => _next.IsCompleted;

        public void Sample(StreamWakes wakes)
        {
            _group.Sequences[0].Append(new SampleResult { Token = 3 }, [], [], version: 0);
            _group.Sequences[0].Publish();
            wakes.Add(_group);
        }

        /// <summary>Waits for new tokens; returns their number.</summary>
        public async Task<int> ReadAsync()
        {
            Assert.True(await _next.AsTask().WaitAsync(TimeSpan.FromSeconds(30), TestContext.Current.CancellationToken));
            int tokens = _chunks.Current.End - _chunks.Current.Start;
            _next = _chunks.MoveNextAsync();
            return tokens;
        }
    }
}
