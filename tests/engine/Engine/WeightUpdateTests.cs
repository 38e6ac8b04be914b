using Rollout.Kernels;
using Xunit;

namespace Rollout.Engine.Tests;

/// <summary>A weight update is a transaction: all of the new weights between two steps, or nothing.</summary>
public sealed class WeightUpdateTests
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
    [InlineData("llama3", 1)] // tied head, chunks that split elements
    [InlineData("qwen2", 1000)] // biases
    [InlineData("qwen3", 1 << 20)]
    public async Task After_a_commit_the_engine_is_one_that_loaded_the_new_weights(string family, int chunk)
    {
        using UpdatePayload payload = UpdatePayload.Of(family);
        await using RolloutEngine fresh = RolloutEngine.Load(payload.Folder, new CpuBackend(1), new EngineOptions());
        await using RolloutEngine engine = TestModels.Load(family);
        string old = (await engine.RunAsync(s_request))[0].Bits();
        using (WeightUpdate update = await engine.OpenUpdateAsync(payload.Manifest(0, 1)))
        {
            for (int at = 0; at < payload.Bytes.Length; at += chunk)
                update.Write(at, payload.Bytes.AsSpan(at, Math.Min(chunk, payload.Bytes.Length - at)));
            CommitResult result = await update.CommitAsync(payload.Digest, Cancelled);
            Assert.Equal(payload.Digest, result.Digest);
        }

        Sequence sample = (await engine.RunAsync(s_request))[0];
        Assert.NotEqual(old, sample.Bits());
        Assert.Equal((await fresh.RunAsync(s_request))[0].Bits(), sample.Bits());
        Assert.All(sample.Versions(0, 200).ToArray(), version => Assert.Equal(1ul, version));
        Assert.Equal(fresh.Describe().Weights.Select(w => (w.Name, Convert.ToHexString(w.Digest))).Order(),
            engine.Describe().Weights.Select(w => (w.Name, Convert.ToHexString(w.Digest))).Order());
    }

    [Fact]
    public async Task Under_recompute_the_rest_of_a_sample_is_a_fresh_run_on_the_prefix()
    {
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        await using RolloutEngine fresh = RolloutEngine.Load(payload.Folder, new CpuBackend(1), new EngineOptions());
        Group group = await UpdateInFlightAsync(payload, UpdatePolicy.Recompute);
        foreach (Sequence sample in group.Sequences)
        {
            int swap = SwapAt(sample);
            Assert.Equal(1ul, sample.OldestKvVersion);
            // Sample i of a group of the same seed draws with the same noise at the same positions.
            GroupRequest rest = s_request with { Prompt = [.. s_request.Prompt, .. sample.Tokens(0, swap)], MaxTokens = 200 - swap };
            Sequence expected = (await fresh.RunAsync(rest))[sample.Index];
            Assert.Equal(expected.Tokens(0, 200 - swap).ToArray(), sample.Tokens(swap, 200).ToArray());
            Assert.Equal(expected.LogProbs(0, 200 - swap).ToArray(), sample.LogProbs(swap, 200).ToArray());
        }
    }

    [Fact]
    public async Task Under_keep_a_sample_goes_on_with_the_keys_and_values_it_has_and_says_so()
    {
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        await using RolloutEngine old = TestModels.Load("qwen3");
        await using RolloutEngine fresh = RolloutEngine.Load(payload.Folder, new CpuBackend(1), new EngineOptions());
        Group group = await UpdateInFlightAsync(payload, UpdatePolicy.Keep);
        IReadOnlyList<Sequence> before = await old.RunAsync(s_request);
        foreach (Sequence sample in group.Sequences)
        {
            int swap = SwapAt(sample);
            Assert.Equal(0ul, sample.OldestKvVersion);
            Assert.Equal(before[sample.Index].Tokens(0, swap).ToArray(), sample.Tokens(0, swap).ToArray());
            GroupRequest rest = s_request with { Prompt = [.. s_request.Prompt, .. sample.Tokens(0, swap)], MaxTokens = 200 - swap };
            float[] recomputed = (await fresh.RunAsync(rest))[sample.Index].LogProbs(0, 1).ToArray();
            Assert.NotEqual(recomputed[0], sample.LogProbs(swap, swap + 1)[0]); // it did not recompute
        }
    }

    [Theory]
    [InlineData(UpdateMode.Staged)]
    [InlineData(UpdateMode.InPlace)]
    public async Task Under_keep_tokens_after_the_swap_are_the_new_models_on_the_old_keys_and_values(UpdateMode mode)
    {
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        using CpuBackend backend = new(1);
        using TwoModels models = new(backend, TestModels.Folder("qwen3"), payload.Folder);
        Group group = await UpdateInFlightAsync(payload, UpdatePolicy.Keep, mode);
        foreach (Sequence sample in group.Sequences)
        {
            (int[] tokens, float[] logProbs) = models.Run(s_request, sample.Index, SwapAt(sample));
            Assert.Equal(tokens, sample.Tokens(0, 200).ToArray());
            Assert.Equal(logProbs, sample.LogProbs(0, 200).ToArray());
        }
    }

    [Fact]
    public async Task Under_drain_what_began_ends_on_the_old_weights_and_what_waits_begins_on_the_new()
    {
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        ScriptedBackend backend = new();
        await using RolloutEngine engine = TestModels.Load("qwen3", backend);
        (Group begun, Task<CommitResult> commit, WeightUpdate update) =
            await CommitInFlightAsync(engine, backend, payload, UpdatePolicy.Drain, Cancelled);
        Group later = engine.Submit(s_request with { Id = "later" });
        backend.LetGo();
        await commit.WaitAsync(Cancelled);
        Assert.True(begun.Completed.IsCompleted);
        await later.Completed.WaitAsync(Cancelled);
        foreach (Sequence sample in begun.Sequences)
        {
            Assert.Equal(FinishReason.Length, sample.FinishReason);
            Assert.All(sample.Versions(0, 200).ToArray(), version => Assert.Equal(0ul, version));
        }

        Assert.All(later.Sequences.SelectMany(sample => sample.Versions(0, 200).ToArray()), version => Assert.Equal(1ul, version));
        update.Dispose();
    }

    [Fact]
    public async Task A_drain_past_its_deadline_is_taken_back_and_service_goes_on()
    {
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        ScriptedBackend backend = new();
        await using RolloutEngine engine = TestModels.Load("qwen3", backend);
        using CancellationTokenSource deadline = new();
        (Group begun, Task<CommitResult> commit, WeightUpdate update) =
            await CommitInFlightAsync(engine, backend, payload, UpdatePolicy.Drain, deadline.Token);
        Task paused = engine.PauseAsync(PauseMode.Keep, "delays the drain", TimeSpan.FromMinutes(1), Cancelled);
        backend.LetGo();
        await paused;
        deadline.Cancel();
        UpdateFailedException e = await Assert.ThrowsAsync<UpdateFailedException>(() => commit);
        Assert.Contains("withdrawn", e.Message, StringComparison.Ordinal);
        update.Dispose();
        await engine.ResumeAsync();
        await engine.RunAsync(s_request with { Id = "later" });
        Assert.Equal((0ul, null), (engine.Version, engine.Status.UpdateOwner));
        await begun.Completed.WaitAsync(Cancelled);
    }

    [Fact]
    public async Task Under_abort_what_began_returns_its_partial_tokens()
    {
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        ScriptedBackend backend = new();
        await using RolloutEngine engine = TestModels.Load("qwen3", backend);
        (Group begun, Task<CommitResult> commit, WeightUpdate update) =
            await CommitInFlightAsync(engine, backend, payload, UpdatePolicy.Abort, Cancelled);
        backend.LetGo();
        await commit.WaitAsync(Cancelled);
        await begun.Completed.WaitAsync(Cancelled);
        Assert.All(begun.Sequences, sample => Assert.Equal(FinishReason.Abort, sample.FinishReason));
        Assert.All(begun.Sequences, sample => Assert.InRange(sample.Published, 20, 199));
        Assert.All(begun.Sequences.SelectMany(s => s.Versions(0, s.Published).ToArray()), version => Assert.Equal(0ul, version));
        update.Dispose();
    }

    [Theory]
    [InlineData(UpdatePolicy.Keep)]
    [InlineData(UpdatePolicy.Recompute)]
    public async Task A_sample_ends_when_its_oldest_token_is_staler_than_it_allows(UpdatePolicy policy)
    {
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        ScriptedBackend backend = new();
        await using RolloutEngine engine = TestModels.Load("qwen3", backend);
        backend.HoldAfter(10);
        Group strict = engine.Submit(s_request with { Id = "strict", MaxStaleness = 1 });
        Group loose = engine.Submit(s_request with { Id = "loose" });
        for (ulong version = 1; version <= 2; version++)
        {
            // Every sample has drawn a token from the weights that are about to be replaced.
            backend.WaitUntilHeld();
            Assert.All(strict.Sequences, sample => Assert.Equal(version - 1, sample.Versions(0, sample.Published)[^1]));
            using WeightUpdate update = await engine.OpenUpdateAsync(payload.Manifest(version - 1, version) with { Policy = policy });
            update.Write(0, payload.Bytes);
            Task committed = update.CommitAsync(payload.Digest, Cancelled);
            backend.LetGo(thenHoldAfter: 10);
            await committed;
        }

        backend.LetGo();

        await Task.WhenAll(strict.Completed, loose.Completed).WaitAsync(Cancelled);
        Assert.All(strict.Sequences, sample => Assert.Equal(FinishReason.Abort, sample.FinishReason));
        Assert.All(strict.Sequences, sample => Assert.Equal([0ul, 1ul], sample.Versions(0, sample.Published).ToArray().Distinct()));
        Assert.All(loose.Sequences, sample => Assert.Equal(FinishReason.Length, sample.FinishReason));
    }

    /// <summary>Two updates while its prompt is half computed, and not a token drawn.</summary>
    [Theory]
    [InlineData(UpdatePolicy.Keep, 1, false, true)]
    [InlineData(UpdatePolicy.Keep, 2, false, false)]
    [InlineData(UpdatePolicy.Keep, 0, true, true)] // the first update ends it already
    [InlineData(UpdatePolicy.Keep, 1, true, false)] // nothing of version 0 is left
    [InlineData(UpdatePolicy.Recompute, 0, false, false)]
    public async Task A_sample_without_a_token_is_as_old_as_the_keys_and_values_it_keeps(
        UpdatePolicy policy, int most, bool sleeps, bool ends)
    {
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        ScriptedBackend backend = new();
        await using RolloutEngine engine = RolloutEngine.Load(TestModels.Folder("qwen3"), backend, new() { MaxBatchTokens = 16 });
        backend.HoldAfter(1);
        Group group = engine.Submit(s_request with { N = 1, MaxStaleness = most, MaxTokens = 5 });
        backend.WaitUntilHeld();
        Task paused = engine.PauseAsync(PauseMode.Keep, "the test", TimeSpan.FromMinutes(10), Cancelled);
        backend.LetGo();
        await paused;
        for (ulong version = 1; version <= 2; version++)
        {
            using WeightUpdate update = await engine.OpenUpdateAsync(payload.Manifest(version - 1, version) with { Policy = policy });
            update.Write(0, payload.Bytes);
            await update.CommitAsync(payload.Digest, Cancelled);
            if (!sleeps) continue;
            await engine.SleepAsync(MemoryTags.KvCache);
            await engine.WakeUpAsync(MemoryTags.KvCache);
        }

        await engine.ResumeAsync();
        await group.Completed.WaitAsync(TimeSpan.FromSeconds(30), Cancelled);
        Sequence sample = group.Sequences[0];
        Assert.Equal(ends ? (FinishReason.Abort, 0) : (FinishReason.Length, 5), (sample.FinishReason, sample.Published));
    }

    [Fact]
    public async Task Every_difference_from_the_model_is_listed_before_a_byte_moves()
    {
        using UpdatePayload payload = UpdatePayload.Of("qwen2");
        await using RolloutEngine engine = TestModels.Load("qwen2");
        List<ManifestTensor> tensors = [.. payload.Manifest(0, 1).Tensors];
        ManifestTensor first = tensors[0];
        tensors[1] = tensors[1] with { Shape = [3, 5] };
        tensors[2] = tensors[2] with { Name = "model.layers.9.mystery" };
        tensors.RemoveAt(3);
        tensors.Add(first with { Offset = payload.Bytes.Length });
        UpdateManifest manifest = new() { Tensors = tensors, PayloadBytes = payload.Bytes.Length, BaseVersion = 7, NewVersion = 0 };
        UpdateRejectedException e = Assert.Throws<UpdateRejectedException>(() => engine.BeginUpdate(manifest));
        string all = string.Join('\n', e.Problems);
        string[] parts = ["BaseVersion", "NewVersion", "[3, 5]", "mystery", "missing", "named twice", "past the payload"];
        foreach (string part in parts)
            Assert.Contains(part, all, StringComparison.Ordinal);
        Assert.Null(engine.Status.UpdateOwner);
    }

    [Fact]
    public async Task A_second_updater_is_told_who_holds_the_seat()
    {
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        await using RolloutEngine engine = TestModels.Load("qwen3");
        using (engine.BeginUpdate(payload.Manifest(0, 1) with { Owner = "trainer A" }))
        {
            EngineStateException e = Assert.Throws<EngineStateException>(() => engine.BeginUpdate(payload.Manifest(0, 2)));
            Assert.Contains("trainer A", e.Message, StringComparison.Ordinal);
        }

        engine.BeginUpdate(payload.Manifest(0, 2)).Dispose();
    }

    [Fact]
    public async Task A_failed_update_leaves_the_old_weights()
    {
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        await using RolloutEngine engine = TestModels.Load("qwen3");
        string old = (await engine.RunAsync(s_request))[0].Bits();
        byte[] bytes = payload.Bytes;

        async Task Fails(string reason, Func<WeightUpdate, Task> act)
        {
            using WeightUpdate update = await engine.OpenUpdateAsync(payload.Manifest(0, 1));
            UpdateFailedException e = await Assert.ThrowsAsync<UpdateFailedException>(() => act(update));
            Assert.Contains(reason, e.Message, StringComparison.Ordinal);
            await Assert.ThrowsAsync<UpdateFailedException>(() => update.CommitAsync(default)); // it cannot be committed afterwards
        }

        await Fails("have arrived", update => update.CommitAsync(default));
        await Fails("digest", update =>
        {
            byte[] flipped = [.. bytes];
            flipped[bytes.Length / 2] ^= 1;
            update.Write(0, flipped);
            return update.CommitAsync(payload.Digest, Cancelled);
        });
        await Fails("expected payload byte 100 next", update =>
        {
            update.Write(0, bytes.AsSpan(0, 100));
            update.Write(200, bytes.AsSpan(200, 100));
            return Task.CompletedTask;
        });
        await Fails("of a payload of", update =>
        {
            update.Write(0, bytes);
            update.Write(bytes.Length, [1]);
            return Task.CompletedTask;
        });
        await Fails("the file ends inside", update =>
        {
            string file = Path.Combine(payload.Folder, "short");
            File.WriteAllBytes(file, bytes[..(bytes.Length / 2)]);
            using Microsoft.Win32.SafeHandles.SafeFileHandle handle = File.OpenHandle(file);
            update.ReadFrom(handle, 0, 0, payload.Bytes.Length, Cancelled);
            return Task.CompletedTask;
        });

        Assert.Equal(0ul, engine.Version);
        Assert.Equal(old, (await engine.RunAsync(s_request))[0].Bits());
    }

    [Fact]
    public async Task NaN_weights_end_samples_with_an_error_and_the_next_update_repairs_that()
    {
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        await using RolloutEngine engine = TestModels.Load("qwen3");
        byte[] broken = [.. payload.Bytes];
        long norm = payload.Manifest(0, 1).Tensors.Single(tensor => tensor.Name == "model.norm.weight").Offset;
        (broken[norm], broken[norm + 1]) = (0xFF, 0x7F); // NaN
        foreach ((byte[] bytes, ulong version) in ((byte[], ulong)[])[(broken, 1), (payload.Bytes, 2)])
        {
            using WeightUpdate update = await engine.OpenUpdateAsync(payload.Manifest(version - 1, version));
            update.Write(0, bytes);
            await update.CommitAsync(default, Cancelled);
            Sequence sample = (await engine.RunAsync(s_request))[0];
            Assert.Equal(version == 1 ? FinishReason.Error : FinishReason.Length, sample.FinishReason);
            if (version == 1) Assert.Contains("version 1", sample.Error, StringComparison.Ordinal);
        }
    }

    /// <summary>A group that has begun, all bytes staged, the commit ordered, and the loop held.</summary>
    private static async Task<(Group Begun, Task<CommitResult> Commit, WeightUpdate Update)> CommitInFlightAsync(
        RolloutEngine engine, ScriptedBackend backend, UpdatePayload payload, UpdatePolicy policy, CancellationToken deadline)
    {
        WeightUpdate update = await engine.OpenUpdateAsync(payload.Manifest(0, 1) with { Policy = policy });
        update.Write(0, payload.Bytes);
        Group begun = engine.SubmitAndHold(backend, s_request, tokens: 20);
        return (begun, update.CommitAsync(payload.Digest, deadline), update);
    }

    private static async Task<Group> UpdateInFlightAsync(UpdatePayload payload, UpdatePolicy policy, UpdateMode mode = UpdateMode.Staged)
    {
        ScriptedBackend backend = new();
        await using RolloutEngine engine = TestModels.Load("qwen3", backend);
        using WeightUpdate update = engine.BeginUpdate(payload.Manifest(0, 1) with { Policy = policy, Mode = mode });
        string file = Path.Combine(payload.Folder, "payload");
        await File.WriteAllBytesAsync(file, payload.Bytes, Cancelled);
        using Microsoft.Win32.SafeHandles.SafeFileHandle handle = File.OpenHandle(file);
        Group group = engine.SubmitAndHold(backend, s_request, tokens: 20);
        Task opened = update.OpenAsync(Cancelled);
        if (mode == UpdateMode.InPlace) backend.LetGo();
        await opened;
        update.ReadFrom(handle, 0, 0, payload.Bytes.Length, Cancelled);
        Task committed = update.CommitAsync(payload.Digest, Cancelled);
        backend.LetGo();
        await committed;
        await group.Completed.WaitAsync(Cancelled);
        return group;
    }

    private static int SwapAt(Sequence sample)
    {
        ulong[] versions = sample.Versions(0, sample.Published).ToArray();
        Assert.Equal(versions.Order(), versions);
        int swap = Array.IndexOf(versions, 1ul);
        Assert.InRange(swap, 20, 199);
        return swap;
    }
}
