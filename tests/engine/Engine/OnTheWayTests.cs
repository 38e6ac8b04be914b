using System.Collections;
using Rollout.Kernels;
using Xunit;

namespace Rollout.Engine.Tests;

/// <summary>
/// A request that was accepted but has not reached the loop when something ends it or makes the engine refuse it: it ends once, leaks
/// nothing, and the next one is served. The loop is held while the test posts its commands.
/// </summary>
public sealed class OnTheWayTests
{
    private static readonly GroupRequest s_request = new()
    {
        Id = "a",
        Prompt = [5, 6, 7],
        MaxTokens = 30,
        IgnoreEos = true,
        Seed = 3,
        StreamTokens = true,
    };

    private static readonly GroupRequest s_late = s_request with { Id = "late", N = 4 };

    private static readonly TimeSpan s_patience = TimeSpan.FromSeconds(30);

    private static CancellationToken Cancelled => TestContext.Current.CancellationToken;

    [Theory]
    [InlineData("all")]
    [InlineData("by id")]
    [InlineData("by a pause")]
    public async Task A_request_aborted_before_the_loop_has_it_ends_and_its_id_is_free(string how)
    {
        ScriptedBackend backend = new();
        await using RolloutEngine engine = TestModels.Load("qwen3", backend);
        Group begun = engine.SubmitAndHold(backend, s_request, tokens: 5);
        Task aborts = how switch
        {
            "all" => engine.AbortAsync(ids: null),
            "by id" => engine.AbortAsync(["late"]),
            _ => engine.PauseAsync(PauseMode.Abort, "trainer", TimeSpan.FromMinutes(10), Cancelled),
        };
        Group late = engine.Submit(s_late); // the loop finds the abort first
        backend.LetGo();
        await aborts.WaitAsync(s_patience, Cancelled);
        await late.Completed.WaitAsync(s_patience, Cancelled);
        Assert.All(late.Sequences, sample => Assert.Equal((FinishReason.Abort, 0), (sample.FinishReason, sample.Published)));
        if (how == "by a pause") await engine.ResumeAsync();
        await begun.Completed.WaitAsync(s_patience, Cancelled);
        await AssertServesAsync(engine);
    }

    [Fact]
    public async Task A_request_that_arrives_after_sleep_began_ends_and_groups_in_flight_go_on()
    {
        ScriptedBackend backend = new();
        await using RolloutEngine engine = TestModels.Load("qwen3", backend);
        Group begun = engine.SubmitAndHold(backend, s_request, tokens: 5);
        Task paused = engine.PauseAsync(PauseMode.Keep, "trainer", TimeSpan.FromMinutes(10), Cancelled);
        Task asleep = engine.SleepAsync(MemoryTags.KvCache);
        Group late = engine.Submit(s_late); // it does not sleep yet
        backend.LetGo();
        await Task.WhenAll(paused, asleep).WaitAsync(s_patience, Cancelled);
        await late.Completed.WaitAsync(s_patience, Cancelled);
        Assert.All(late.Sequences, sample => Assert.Equal((FinishReason.Abort, 0), (sample.FinishReason, sample.Published)));
        Assert.Equal((0, 1), (engine.Status.Running, engine.Status.Waiting)); // the group that had begun waits to recompute
        await engine.WakeUpAsync(MemoryTags.KvCache);
        await engine.ResumeAsync();
        await begun.Completed.WaitAsync(s_patience, Cancelled);
        Assert.Equal(FinishReason.Length, begun.Sequences[0].FinishReason);
        await AssertServesAsync(engine);
    }

    [Fact]
    public async Task A_request_that_arrives_after_poisoning_ends_and_is_served_after_an_update()
    {
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        await using RolloutEngine engine = TestModels.Load("qwen3");
        WeightUpdate broken = await engine.OpenUpdateAsync(payload.Manifest(0, 1) with { Mode = UpdateMode.InPlace });
        broken.Write(0, payload.Bytes.AsSpan(0, 1000));
        using SlowIds slow = new();
        Task<AbortCounts> holds = engine.AbortAsync(slow);
        slow.WaitUntilHeld();
        Group late = engine.Submit(s_late);
        broken.Dispose();
        slow.LetGo();
        await holds.WaitAsync(s_patience, Cancelled);
        await late.Completed.WaitAsync(s_patience, Cancelled);
        Assert.All(late.Sequences, sample => Assert.Equal((FinishReason.Abort, 0), (sample.FinishReason, sample.Published)));
        Assert.Equal((EngineState.Poisoned, 0), (engine.Status.State, engine.Status.Waiting));
        using (WeightUpdate heals = await engine.OpenUpdateAsync(payload.Manifest(0, 1)))
        {
            heals.Write(0, payload.Bytes);
            await heals.CommitAsync(payload.Digest, Cancelled);
        }

        await AssertServesAsync(engine, payload.Folder);
    }

    [Theory]
    [InlineData("device lost")]
    [InlineData("stopped")]
    public async Task A_request_to_an_engine_that_has_failed_or_stopped_ends_with_the_reason(string reason)
    {
        ScriptedBackend backend = new();
        await using RolloutEngine engine = TestModels.Load("qwen3", backend);
        Group begun = engine.SubmitAndHold(backend, s_request with { N = 2 }, tokens: 5);
        Group late = engine.Submit(s_late);
        ValueTask stops = ValueTask.CompletedTask;
        if (reason == "stopped") stops = engine.DisposeAsync();
        else backend.StepsLeft = 0; // the step that is held fails
        backend.LetGo();
        await stops;
        await Task.WhenAll(begun.Completed, late.Completed).WaitAsync(s_patience, Cancelled);
        Assert.All(begun.Sequences.Concat(late.Sequences), sample =>
        {
            Assert.Equal(FinishReason.Error, sample.FinishReason);
            Assert.Contains(reason, sample.Error, StringComparison.Ordinal);
        });
        Assert.Equal((0, 0), (engine.Status.Running, engine.Status.Waiting));
    }

    /// <summary>Nothing is leaked, and a request with the id of the ended one gets what a new engine gives.</summary>
    private static async Task AssertServesAsync(RolloutEngine engine, string? weights = null)
    {
        Assert.Equal((0, 0), (engine.Status.Running, engine.Status.Waiting));
        await using RolloutEngine fresh = RolloutEngine.Load(weights ?? TestModels.Folder("qwen3"), new CpuBackend(1), new EngineOptions());
        string[] expected = [.. (await fresh.RunAsync(s_late)).Select(sample => sample.Bits())];
        Assert.Equal(expected, (await engine.RunAsync(s_late)).Select(sample => sample.Bits()));
        Assert.Equal((0, 0, 0), (engine.Status.Running, engine.Status.Waiting, engine.Status.KvBlocksUsed));
    }

    /// <summary>Ids that block their reader, which is the loop.</summary>
    private sealed class SlowIds : IReadOnlyCollection<string>, IDisposable
    {
        private readonly ManualResetEventSlim _held = new();
        private readonly ManualResetEventSlim _letGo = new();

        public int Count => 0;

        public void WaitUntilHeld() => Assert.True(_held.Wait(TimeSpan.FromMinutes(1)), "the loop never came to the command");

        public void LetGo() => _letGo.Set();

        public IEnumerator<string> GetEnumerator()
        {
            _held.Set();
            _letGo.Wait(TimeSpan.FromMinutes(1));
            yield break;
        }

        IEnumerator IEnumerable.GetEnumerator() => GetEnumerator();

        public void Dispose()
        {
            _held.Dispose();
            _letGo.Dispose();
        }
    }
}
