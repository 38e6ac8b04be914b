using Rollout.Kernels;
using Xunit;

namespace Rollout.Engine.Tests;

/// <summary>Updates combined with pauses: both keep their guarantees in either order.</summary>
public sealed class PausedUpdateTests
{
    private static readonly TimeSpan s_patience = TimeSpan.FromSeconds(30);

    private static readonly GroupRequest s_request = new()
    {
        Id = "begun",
        Prompt = [.. Enumerable.Range(3, 40)],
        N = 2,
        MaxTokens = 60,
        Seed = 9,
        IgnoreEos = true,
        StreamTokens = true,
    };

    private static CancellationToken Cancelled => TestContext.Current.CancellationToken;

    /// <summary>The samples have five tokens, and a sixth when the pause is in force.</summary>
    [Theory, MemberData(nameof(PoliciesAndModes))]
    public async Task An_update_meets_a_pause(UpdatePolicy policy, PauseMode mode)
    {
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        await using RolloutEngine fresh = RolloutEngine.Load(payload.Folder, new CpuBackend(1), new EngineOptions());
        ScriptedBackend backend = new();
        await using RolloutEngine engine = TestModels.Load("qwen3", backend);
        using WeightUpdate update = await engine.OpenUpdateAsync(payload.Manifest(0, 1) with { Policy = policy });
        update.Write(0, payload.Bytes);
        Group begun = engine.SubmitAndHold(backend, s_request, tokens: 5);
        Task paused = engine.PauseAsync(mode, "pauser", TimeSpan.FromMinutes(10), Cancelled);
        Task committed;
        if (mode == PauseMode.Wait)
        {
            committed = update.CommitAsync(payload.Digest, Cancelled);
            backend.LetGo();
        }
        else
        {
            backend.LetGo();
            await paused.WaitAsync(s_patience, Cancelled);
            committed = update.CommitAsync(payload.Digest, Cancelled);
        }

        Group later = engine.Submit(s_request with { Id = "later" });
        if (policy == UpdatePolicy.Drain && mode == PauseMode.Keep)
        {
            for (int turn = 0; turn < 2; turn++) await engine.AbortAsync(["nobody"]);
            Assert.Equal((false, 0ul), (committed.IsCompleted, engine.Version)); // groups that began are frozen, so no commit
            await engine.ResumeAsync();
            paused = engine.PauseAsync(PauseMode.Wait, "pauser", TimeSpan.FromMinutes(10), Cancelled);
        }

        await committed.WaitAsync(s_patience, Cancelled);
        await paused.WaitAsync(s_patience, Cancelled);
        Assert.Equal((EngineState.Paused, "pauser", 1ul), (engine.Status.State, engine.Status.Reason, engine.Version));
        if (mode == PauseMode.Keep && policy is UpdatePolicy.Keep or UpdatePolicy.Recompute)
            Assert.All(begun.Sequences, sample => Assert.Equal((FinishReason.None, 6), (sample.FinishReason, sample.Published)));
        else
            Assert.True(begun.Completed.IsCompleted);
        await engine.ResumeAsync();
        await Task.WhenAll(begun.Completed, later.Completed).WaitAsync(s_patience, Cancelled);

        bool aborted = policy == UpdatePolicy.Abort || mode == PauseMode.Abort;
        int old = aborted || policy != UpdatePolicy.Drain ? 6 : 60;
        Assert.All(begun.Sequences, sample =>
        {
            Assert.Equal(aborted ? (FinishReason.Abort, 6) : (FinishReason.Length, 60), (sample.FinishReason, sample.Published));
            ulong[] versions = sample.Versions(0, sample.Published).ToArray();
            Assert.Equal(versions.Select((_, i) => i < old ? 0ul : 1ul), versions);
        });
        IReadOnlyList<Sequence> expected = await fresh.RunAsync(later.Request);
        Assert.Equal(expected.Select(sample => sample.Bits()), later.Sequences.Select(sample => sample.Bits()));
        Assert.Equal((EngineState.Running, 0, 0), (engine.Status.State, engine.Status.Running, engine.Status.Waiting));
    }

    /// <summary>
    /// Samples of a group use the only seat one after another: between two of them the seat is free, but the group has begun.
    /// </summary>
    [Fact]
    public async Task Under_drain_the_samples_that_wait_for_a_seat_end_on_the_old_weights_too()
    {
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        ScriptedBackend backend = new();
        await using RolloutEngine engine = RolloutEngine.Load(TestModels.Folder("qwen3"), backend, new() { MaxSequences = 1 });
        GroupRequest request = s_request with { N = 3, MaxTokens = 8 };
        Group begun = await engine.UpdateWhileAsync(backend, payload, UpdatePolicy.Drain, request, heldAfter: 5);
        Assert.Equal(1ul, engine.Version);
        Assert.All(begun.Sequences, sample => Assert.Equal(new ulong[8], sample.Versions(0, 8).ToArray()));
    }

    /// <summary>Weights are half written: no step runs before the commit, also when the pause ends.</summary>
    [Fact]
    public async Task A_lease_that_ends_while_an_update_lands_in_place_lets_no_step_run()
    {
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        await using RolloutEngine fresh = RolloutEngine.Load(payload.Folder, new CpuBackend(1), new EngineOptions());
        ScriptedBackend backend = new();
        await using RolloutEngine engine = TestModels.Load("qwen3", backend);
        Group begun = engine.SubmitAndHold(backend, s_request, tokens: 5);
        Task paused = engine.PauseAsync(PauseMode.Keep, "pauser", TimeSpan.FromMinutes(10), Cancelled);
        backend.LetGo();
        await paused.WaitAsync(s_patience, Cancelled);
        UpdateManifest manifest = payload.Manifest(0, 1) with { Mode = UpdateMode.InPlace, Owner = "trainer" };
        using (WeightUpdate update = await engine.OpenUpdateAsync(manifest))
        {
            update.Write(0, payload.Bytes.AsSpan(0, 1000));
            await engine.PauseAsync(PauseMode.Keep, "pauser", TimeSpan.FromMilliseconds(1), Cancelled);
            long over = Environment.TickCount64 + 20;
            while (Environment.TickCount64 < over || engine.Status.Reason != "trainer") await Task.Delay(1, Cancelled);
            for (int turn = 0; turn < 2; turn++) await engine.AbortAsync(["nobody"]);
            Assert.Equal((EngineState.Updating, "trainer"), (engine.Status.State, engine.Status.Reason));
            Assert.All(begun.Sequences, sample => Assert.Equal(6, sample.Published));
            update.Write(1000, payload.Bytes.AsSpan(1000));
            await update.CommitAsync(payload.Digest, Cancelled);
        }

        await begun.Completed.WaitAsync(s_patience, Cancelled); // without a resume
        Assert.Equal((EngineState.Running, ""), (engine.Status.State, engine.Status.Reason));
        foreach (Sequence sample in begun.Sequences)
        {
            GroupRequest rest = s_request with { Prompt = [.. s_request.Prompt, .. sample.Tokens(0, 6)], MaxTokens = 54 };
            Assert.Equal((await fresh.RunAsync(rest))[sample.Index].Tokens(0, 54).ToArray(), sample.Tokens(6, 60).ToArray());
        }
    }

    [Fact]
    public async Task During_an_update_in_place_groups_can_be_aborted_and_a_pause_takes_force()
    {
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        ScriptedBackend backend = new();
        await using RolloutEngine engine = TestModels.Load("qwen3", backend);
        Group begun = engine.SubmitAndHold(backend, s_request, tokens: 5);
        WeightUpdate update = engine.BeginUpdate(payload.Manifest(0, 1) with { Mode = UpdateMode.InPlace, Owner = "trainer" });
        Task opened = update.OpenAsync(Cancelled);
        backend.LetGo();
        await opened.WaitAsync(s_patience, Cancelled);
        Group later = engine.Submit(s_request with { Id = "later" });
        AbortCounts counts = await engine.AbortAsync(["begun"]);
        Assert.Equal((1, 2), (counts.Groups, counts.Sequences));
        await begun.Completed.WaitAsync(s_patience, Cancelled);
        Task<PauseResult> waits = engine.PauseAsync(PauseMode.Wait, "pauser", TimeSpan.FromMinutes(10), Cancelled);
        Assert.Equal(new PauseResult(EngineState.Updating, 0), await waits.WaitAsync(s_patience, Cancelled));
        Assert.Equal("trainer", engine.Status.Reason);
        update.Write(0, payload.Bytes);
        await update.CommitAsync(payload.Digest, Cancelled);
        update.Dispose();
        Assert.Equal((EngineState.Paused, "pauser"), (engine.Status.State, engine.Status.Reason));
        Assert.All(later.Sequences, sample => Assert.Equal((FinishReason.None, 0), (sample.FinishReason, sample.Published)));
        await engine.ResumeAsync();
        await later.Completed.WaitAsync(s_patience, Cancelled);
        Assert.All(later.Sequences, sample => Assert.Equal(FinishReason.Length, sample.FinishReason));
    }

    [Fact]
    public async Task A_waiting_pause_waits_for_an_update_in_place_too_and_no_step_runs_meanwhile()
    {
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        ScriptedBackend backend = new();
        await using RolloutEngine engine = TestModels.Load("qwen3", backend);
        Group begun = engine.SubmitAndHold(backend, s_request, tokens: 5);
        Task<PauseResult> waits = engine.PauseAsync(PauseMode.Wait, "pauser", TimeSpan.FromMinutes(10), Cancelled);
        using WeightUpdate update = engine.BeginUpdate(payload.Manifest(0, 1) with { Mode = UpdateMode.InPlace });
        Task opened = update.OpenAsync(Cancelled);
        backend.LetGo();
        await opened.WaitAsync(s_patience, Cancelled);
        update.Write(0, payload.Bytes.AsSpan(0, 1000));
        for (int turn = 0; turn < 3; turn++) await engine.AbortAsync(["nobody"]);
        Assert.All(begun.Sequences, sample => Assert.Equal((FinishReason.None, 6), (sample.FinishReason, sample.Published)));
        Assert.Equal((EngineState.Updating, false), (engine.Status.State, waits.IsCompleted));
        update.Write(1000, payload.Bytes.AsSpan(1000));
        await update.CommitAsync(payload.Digest, Cancelled);
        Assert.Equal(EngineState.Paused, (await waits.WaitAsync(s_patience, Cancelled)).State);
        Assert.All(begun.Sequences, sample =>
        {
            Assert.Equal((FinishReason.Length, 60), (sample.FinishReason, sample.Published));
            Assert.Equal([.. Enumerable.Repeat(0ul, 6), .. Enumerable.Repeat(1ul, 54)], sample.Versions(0, 60).ToArray());
        });
    }

    /// <summary>The cycle of a trainer that shares the device: the pause stays in force through sleep and update.</summary>
    [Fact]
    public async Task A_pause_outlives_sleep_waking_and_the_update_that_heals()
    {
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        await using RolloutEngine fresh = RolloutEngine.Load(payload.Folder, new CpuBackend(1), new EngineOptions());
        ScriptedBackend backend = new();
        await using RolloutEngine engine = TestModels.Load("qwen3", backend);
        Group begun = engine.SubmitAndHold(backend, s_request, tokens: 5);
        Task paused = engine.PauseAsync(PauseMode.Abort, "trainer", TimeSpan.FromMinutes(10), Cancelled);
        backend.LetGo();
        await paused.WaitAsync(s_patience, Cancelled);
        Assert.Equal(2, (await engine.SleepAsync(MemoryTags.All)).Count);
        await engine.WakeUpAsync(MemoryTags.All);
        Assert.Equal(EngineState.Poisoned, engine.Status.State);
        using (WeightUpdate update = await engine.OpenUpdateAsync(payload.Manifest(0, 1)))
        {
            update.Write(0, payload.Bytes);
            await update.CommitAsync(payload.Digest, Cancelled);
        }

        Assert.Equal((EngineState.Paused, "trainer"), (engine.Status.State, engine.Status.Reason));
        Group later = engine.Submit(s_request);
        for (int turn = 0; turn < 2; turn++) await engine.AbortAsync(["nobody"]);
        Assert.Equal((0, 2), (engine.Status.Running, engine.Status.Waiting));
        await engine.ResumeAsync();
        await later.Completed.WaitAsync(s_patience, Cancelled);
        Assert.True(begun.Completed.IsCompleted);
        Assert.Equal((await fresh.RunAsync(s_request)).Select(sample => sample.Bits()), later.Sequences.Select(sample => sample.Bits()));
    }

    public static TheoryData<UpdatePolicy, PauseMode> PoliciesAndModes
    {
        get
        {
            TheoryData<UpdatePolicy, PauseMode> data = [];
            foreach (UpdatePolicy policy in Enum.GetValues<UpdatePolicy>())
                foreach (PauseMode mode in Enum.GetValues<PauseMode>()) data.Add(policy, mode);
            return data;
        }
    }
}
