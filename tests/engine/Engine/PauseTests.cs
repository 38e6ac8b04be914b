using Xunit;

namespace Rollout.Engine.Tests;

/// <summary>
/// Pauses combined with other pauses, aborts, sleep and partial samples. The loop is held while the test posts its commands.
/// </summary>
public sealed class PauseTests
{
    private static readonly TimeSpan s_long = TimeSpan.FromDays(100); // longer than 32 bits of milliseconds

    private static readonly GroupRequest s_request = new()
    {
        Id = "a",
        Prompt = [5, 6, 7],
        N = 2,
        MaxTokens = 60,
        IgnoreEos = true,
        Seed = 3,
        StreamTokens = true,
    };

    private static readonly TimeSpan s_patience = TimeSpan.FromSeconds(45);

    private static CancellationToken Cancelled => TestContext.Current.CancellationToken;

    [Fact]
    public async Task A_pause_that_keeps_hardens_one_that_waits_and_both_callers_learn_it()
    {
        (RolloutEngine engine, ScriptedBackend backend, Group group) = Begin();
        await using RolloutEngine _ = engine;
        Task<PauseResult> waits = engine.PauseAsync(PauseMode.Wait, "first", s_long, Cancelled);
        Task<PauseResult> keeps = engine.PauseAsync(PauseMode.Keep, "second", s_long, Cancelled);
        backend.LetGo();
        Assert.Equal(new PauseResult(EngineState.Paused, 0), await keeps.WaitAsync(s_patience, Cancelled));
        Assert.Equal(new PauseResult(EngineState.Paused, 0), await waits.WaitAsync(s_patience, Cancelled));
        Assert.Equal((EngineState.Paused, "second"), (engine.Status.State, engine.Status.Reason));
        Assert.All(group.Sequences, sample => Assert.Equal((FinishReason.None, 6), (sample.FinishReason, sample.Published)));
        await engine.ResumeAsync();
        await group.Completed.WaitAsync(Cancelled);
        Assert.Equal("", engine.Status.Reason);
    }

    [Fact]
    public async Task A_pause_in_force_is_not_softened_by_one_that_waits()
    {
        (RolloutEngine engine, ScriptedBackend backend, Group group) = Begin();
        await using RolloutEngine _ = engine;
        Task<PauseResult> keeps = engine.PauseAsync(PauseMode.Keep, "first", s_long, Cancelled);
        Task<PauseResult> waits = engine.PauseAsync(PauseMode.Wait, "second", s_long, Cancelled);
        backend.LetGo();
        await Task.WhenAll(keeps, waits).WaitAsync(s_patience, Cancelled);
        Assert.Equal((EngineState.Paused, "second"), (engine.Status.State, engine.Status.Reason));
        Assert.All(group.Sequences, sample => Assert.Equal(6, sample.Published));
    }

    [Fact]
    public async Task A_caller_that_waits_for_a_pause_is_told_when_it_was_ended()
    {
        (RolloutEngine engine, ScriptedBackend backend, Group group) = Begin();
        await using RolloutEngine _ = engine;
        Task<PauseResult> waits = engine.PauseAsync(PauseMode.Wait, "first", s_long, Cancelled);
        Task<EngineState> resumed = engine.ResumeAsync();
        backend.LetGo();
        Assert.Equal(EngineState.Running, await resumed);
        Assert.Equal(EngineState.Running, (await waits.WaitAsync(TimeSpan.FromSeconds(30), Cancelled)).State);
        await group.Completed.WaitAsync(Cancelled);
    }

    [Fact]
    public async Task Pausing_again_sets_the_lease_anew()
    {
        (RolloutEngine engine, ScriptedBackend backend, Group group) = Begin();
        await using RolloutEngine _ = engine;
        Task<PauseResult> first = engine.PauseAsync(PauseMode.Keep, "trainer", s_long, Cancelled);
        backend.LetGo();
        await first;
        await engine.PauseAsync(PauseMode.Keep, "trainer", TimeSpan.FromMilliseconds(100), Cancelled);
        await group.Completed.WaitAsync(TimeSpan.FromSeconds(30), Cancelled); // the pause ended by itself
        await engine.PauseAsync(PauseMode.Keep, "trainer", TimeSpan.FromMilliseconds(100), Cancelled);
        await engine.PauseAsync(PauseMode.Keep, "trainer", s_long, Cancelled);
        Assert.Equal(EngineState.Paused, engine.Status.State);
    }

    [Fact]
    public async Task A_pause_that_waits_too_long_ends_with_its_lease()
    {
        await using RolloutEngine engine = TestModels.Load("qwen3");
        await engine.PauseAsync(PauseMode.Keep, "trainer", s_long, Cancelled);
        Group held = engine.Submit(s_request);
        await engine.ResumeAsync();
        await engine.PauseAsync(PauseMode.Wait, "trainer", TimeSpan.FromMilliseconds(100), Cancelled);
        await held.Completed.WaitAsync(TimeSpan.FromSeconds(30), Cancelled);
        Assert.All(held.Sequences, sample => Assert.Equal(FinishReason.Length, sample.FinishReason));
    }

    [Fact]
    public async Task A_pause_that_waits_lets_samples_without_a_seat_end_too()
    {
        ScriptedBackend backend = new();
        await using RolloutEngine engine = RolloutEngine.Load(TestModels.Folder("qwen3"), backend, new() { MaxSequences = 1 });
        backend.HoldAfter(5);
        Group group = engine.Submit(s_request with { N = 3 });
        backend.WaitUntilHeld();
        Group next = engine.Submit(s_request with { Id = "next" });
        Task<PauseResult> waits = engine.PauseAsync(PauseMode.Wait, "trainer", s_long, Cancelled);
        backend.LetGo();
        await waits.WaitAsync(TimeSpan.FromSeconds(30), Cancelled);
        Assert.All(group.Sequences, sample => Assert.Equal((FinishReason.Length, 60), (sample.FinishReason, sample.Published)));
        Assert.All(next.Sequences, sample => Assert.Equal((FinishReason.None, 0), (sample.FinishReason, sample.Published)));
    }

    [Fact]
    public async Task A_pause_that_aborts_says_how_many_samples_it_ended_in_all_groups()
    {
        (RolloutEngine engine, ScriptedBackend backend, Group group) = Begin();
        await using RolloutEngine _ = engine;
        Group queued = engine.Submit(s_request with { Id = "b", N = 3, StreamTokens = false });
        Task<PauseResult> aborts = engine.PauseAsync(PauseMode.Abort, "trainer", s_long, Cancelled);
        backend.LetGo();
        Assert.Equal(new PauseResult(EngineState.Paused, 5), await aborts);
        foreach (Group ended in (Group[])[group, queued])
        {
            int open = ended.Sequences.Count; // readers are told of every end
            await foreach (SequenceChunk chunk in ended.ReadAsync(Cancelled))
                if (chunk.FinishReason == FinishReason.Abort) open--;
            Assert.Equal(0, open);
            Assert.True(ended.Completed.IsCompleted);
        }

        Assert.Equal((0, 0, 0), (engine.Status.Running, engine.Status.Waiting, engine.Status.KvBlocksUsed));
    }

    [Theory]
    [InlineData("a group")]
    [InlineData("by id")]
    [InlineData("by a pause")]
    public async Task An_abort_counts_the_samples_that_it_ended_and_not_those_that_had_ended(string how)
    {
        ScriptedBackend backend = new();
        await using RolloutEngine engine = RolloutEngine.Load(TestModels.Folder("qwen3"), backend, new() { MaxSequences = 1 });
        backend.HoldAfter(7);
        Group group = engine.Submit(s_request with { N = 3, MaxTokens = 5 }); // one after the other
        backend.WaitUntilHeld();
        Assert.Equal([5, 2, 0], group.Sequences.Select(sample => sample.Published));
        Task<int> aborts = how switch
        {
            "a group" => engine.AbortAsync(group),
            "by id" => ById(),
            _ => ByPause(),
        };
        backend.LetGo();
        Assert.Equal(2, await aborts);
        await group.Completed.WaitAsync(TimeSpan.FromSeconds(30), Cancelled);
        Assert.Equal([FinishReason.Length, FinishReason.Abort, FinishReason.Abort], group.Sequences.Select(sample => sample.FinishReason));

        async Task<int> ById() => (await engine.AbortAsync(["a"])).Sequences;

        async Task<int> ByPause() => (await engine.PauseAsync(PauseMode.Abort, "trainer", s_long, Cancelled)).AbortedSamples;
    }

    [Fact]
    public async Task Keys_and_values_do_not_sleep_while_a_pause_still_waits()
    {
        (RolloutEngine engine, ScriptedBackend backend, Group group) = Begin();
        await using RolloutEngine _ = engine;
        Task<PauseResult> waits = engine.PauseAsync(PauseMode.Wait, "trainer", s_long, Cancelled);
        Task<IReadOnlyList<FreedMemory>> sleeps = engine.SleepAsync(MemoryTags.KvCache);
        backend.LetGo();
        Assert.Equal(EngineState.Pausing, (await Assert.ThrowsAsync<EngineStateException>(() => sleeps)).State);
        await waits;
        Assert.All(group.Sequences, sample => Assert.Equal(FinishReason.Length, sample.FinishReason));
        await engine.SleepAsync(MemoryTags.KvCache);
    }

    /// <summary>A group with five tokens a sample, and the loop held before the sixth.</summary>
    private static (RolloutEngine Engine, ScriptedBackend Backend, Group Group) Begin()
    {
        ScriptedBackend backend = new();
        RolloutEngine engine = TestModels.Load("qwen3", backend);
        return (engine, backend, engine.SubmitAndHold(backend, s_request, tokens: 5));
    }
}
