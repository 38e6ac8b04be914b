using Rollout.Kernels;
using Xunit;

namespace Rollout.Engine.Tests;

/// <summary>
/// An update in place: no step runs while bytes are written, and one that ends half-way poisons until a full update commits.
/// </summary>
public sealed class InPlaceUpdateTests
{
    private static readonly GroupRequest s_request = new()
    {
        Id = "probe",
        Prompt = [.. Enumerable.Range(3, 40)],
        N = 3,
        MaxTokens = 200,
        Seed = 9,
        IgnoreEos = true,
        StreamTokens = true,
    };

    private static CancellationToken Cancelled => TestContext.Current.CancellationToken;

    [Theory]
    [InlineData(UpdatePolicy.Recompute)]
    [InlineData(UpdatePolicy.Keep)]
    [InlineData(UpdatePolicy.Drain)]
    [InlineData(UpdatePolicy.Abort)]
    public async Task In_place_gives_what_staged_gives(UpdatePolicy policy)
    {
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        await using RolloutEngine fresh = RolloutEngine.Load(payload.Folder, new CpuBackend(1), new EngineOptions());
        ScriptedBackend backend = new();
        await using RolloutEngine engine = TestModels.Load("qwen3", backend);
        Group begun = engine.SubmitAndHold(backend, s_request, tokens: 20);
        using (WeightUpdate update = engine.BeginUpdate(payload.Manifest(0, 1) with { Policy = policy, Mode = UpdateMode.InPlace }))
        {
            Task opened = update.OpenAsync(Cancelled);
            backend.LetGo();
            await opened;
            Assert.Equal((EngineState.Updating, 0L), (engine.Status.State, update.StagingBytes));
            // Aborted groups complete at once, not after the bytes have been written.
            if (policy == UpdatePolicy.Abort) await begun.Completed.WaitAsync(TimeSpan.FromSeconds(30), Cancelled);
            Group waits = engine.Submit(s_request with { Id = "waits" });
            long steps = engine.Status.Steps;
            update.Write(0, payload.Bytes.AsSpan(0, 1000));
            await Task.Delay(50, Cancelled);
            Assert.Equal((steps, 0), (engine.Status.Steps, waits.Sequences[0].Published));
            update.Write(1000, payload.Bytes.AsSpan(1000));
            CommitResult result = await update.CommitAsync(payload.Digest, Cancelled);
            Assert.InRange(result.StallSeconds, 0.04, 30); // timers count in milliseconds
            await waits.Completed.WaitAsync(Cancelled);
            Assert.All(waits.Sequences.SelectMany(sample => sample.Versions(0, 200).ToArray()), version => Assert.Equal(1ul, version));
        }

        await begun.Completed.WaitAsync(Cancelled);
        FinishReason expected = policy == UpdatePolicy.Abort ? FinishReason.Abort : FinishReason.Length;
        Assert.All(begun.Sequences, sample => Assert.Equal(expected, sample.FinishReason));
        Assert.Equal(EngineState.Running, engine.Status.State);
        if (policy == UpdatePolicy.Drain)
            Assert.All(begun.Sequences.SelectMany(sample => sample.Versions(0, 200).ToArray()), version => Assert.Equal(0ul, version));
        foreach (Sequence sample in policy == UpdatePolicy.Recompute ? begun.Sequences : [])
        {
            int swap = Array.IndexOf(sample.Versions(0, 200).ToArray(), 1ul);
            GroupRequest rest = s_request with { Prompt = [.. s_request.Prompt, .. sample.Tokens(0, swap)], MaxTokens = 200 - swap };
            Sequence continued = (await fresh.RunAsync(rest))[sample.Index];
            Assert.Equal(continued.Tokens(0, 200 - swap).ToArray(), sample.Tokens(swap, 200).ToArray());
        }

        Assert.Equal((await fresh.RunAsync(s_request))[0].Bits(), (await engine.RunAsync(s_request))[0].Bits());
    }

    [Fact]
    public async Task An_update_that_ends_half_way_poisons_until_a_full_update_of_either_mode()
    {
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        await using RolloutEngine fresh = RolloutEngine.Load(payload.Folder, new CpuBackend(1), new EngineOptions());
        ScriptedBackend backend = new();
        await using RolloutEngine engine = TestModels.Load("qwen3", backend);
        string expected = (await fresh.RunAsync(s_request))[0].Bits();
        ulong version = 0;
        foreach (UpdateMode healer in (UpdateMode[])[UpdateMode.Staged, UpdateMode.InPlace])
        {
            Group begun = engine.SubmitAndHold(backend, s_request with { Id = "begun" }, tokens: 20);
            using (WeightUpdate update = engine.BeginUpdate(
                payload.Manifest(version, version + 1) with { Mode = UpdateMode.InPlace, Owner = "clumsy" }))
            {
                Task opened = update.OpenAsync(Cancelled);
                backend.LetGo();
                await opened;
                update.Write(0, payload.Bytes.AsSpan(0, 1000));
            }

            Assert.Equal((EngineState.Poisoned, version), (engine.Status.State, engine.Version));
            Assert.Contains("clumsy", engine.Status.Reason, StringComparison.Ordinal);
            EngineStateException refused = Assert.Throws<EngineStateException>(() => engine.Submit(s_request with { Id = "refused" }));
            Assert.Equal(EngineState.Poisoned, refused.State);
            await begun.Completed.WaitAsync(Cancelled);
            Assert.All(begun.Sequences, sample => Assert.Equal(FinishReason.Abort, sample.FinishReason));
            Assert.All(begun.Sequences, sample => Assert.InRange(sample.Published, 20, 199));

            UpdateManifest partial = payload.Manifest(version, version + 1) with { Partial = true };
            Assert.Contains("only a full update", Assert.Throws<UpdateRejectedException>(() => engine.BeginUpdate(partial)).Message,
                StringComparison.Ordinal);
            using WeightUpdate full = await engine.OpenUpdateAsync(payload.Manifest(version, ++version) with { Mode = healer });
            Assert.Equal(EngineState.Poisoned, engine.Status.State);
            full.Write(0, payload.Bytes);
            await full.CommitAsync(payload.Digest, Cancelled);
            Assert.Equal((EngineState.Running, version), (engine.Status.State, engine.Version));
            Assert.Equal(expected, (await engine.RunAsync(s_request))[0].Bits());
        }
    }

    [Fact]
    public async Task Before_the_first_byte_nothing_has_changed()
    {
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        ScriptedBackend backend = new();
        await using RolloutEngine engine = TestModels.Load("qwen3", backend);
        string old = (await engine.RunAsync(s_request))[0].Bits();
        UpdateManifest manifest = payload.Manifest(0, 1) with { Mode = UpdateMode.InPlace };
        engine.BeginUpdate(manifest).Dispose();
        (await engine.OpenUpdateAsync(manifest)).Dispose();

        // The update cannot start: groups that began end only after the pause.
        Group begun = engine.SubmitAndHold(backend, s_request with { Id = "begun" }, tokens: 20);
        Task paused = engine.PauseAsync(PauseMode.Keep, "delays the drain", TimeSpan.FromMinutes(1), Cancelled);
        backend.LetGo();
        await paused;
        using (WeightUpdate late = engine.BeginUpdate(manifest with { Policy = UpdatePolicy.Drain }))
        {
            using CancellationTokenSource deadline = new(50);
            await Assert.ThrowsAsync<UpdateFailedException>(() => late.OpenAsync(deadline.Token));
        }

        Assert.Equal(EngineState.Paused, engine.Status.State);
        await engine.ResumeAsync();
        await begun.Completed.WaitAsync(Cancelled);
        Assert.Equal((EngineState.Running, 0ul), (engine.Status.State, engine.Version));
        Assert.Equal(old, (await engine.RunAsync(s_request))[0].Bits());
    }

    [Fact]
    public async Task Without_memory_for_a_second_set_updates_go_in_place_unless_staged_is_requested()
    {
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        ScriptedBackend backend = new() { FreeBytes = 1000 };
        await using RolloutEngine engine = RolloutEngine.Load(TestModels.Folder("qwen3"), backend, new EngineOptions());
        NoRoomException e = Assert.Throws<NoRoomException>(
            () => engine.BeginUpdate(payload.Manifest(0, 1) with { Mode = UpdateMode.Staged }));
        Assert.Contains("1000", e.Message, StringComparison.Ordinal);
        using (WeightUpdate update = engine.BeginUpdate(payload.Manifest(0, 1))) Assert.Equal(UpdateMode.InPlace, update.Mode);
        backend.FreeBytes = long.MaxValue;
        using (WeightUpdate update = engine.BeginUpdate(payload.Manifest(0, 1))) Assert.Equal(UpdateMode.Staged, update.Mode);
    }

    [Fact]
    public async Task A_pause_survives_an_update_in_place()
    {
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        await using RolloutEngine engine = TestModels.Load("qwen3");
        await engine.PauseAsync(PauseMode.Keep, "pauser", TimeSpan.FromMinutes(1), Cancelled);
        using WeightUpdate update = await engine.OpenUpdateAsync(payload.Manifest(0, 1) with { Mode = UpdateMode.InPlace });
        update.Write(0, payload.Bytes);
        await update.CommitAsync(payload.Digest, Cancelled);
        Assert.Equal((EngineState.Paused, "pauser"), (engine.Status.State, engine.Status.Reason));
    }
}
