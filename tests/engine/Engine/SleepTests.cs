using Rollout.Kernels;
using Xunit;

namespace Rollout.Engine.Tests;

/// <summary>Sleep gives memory back, and nothing is served from discarded memory.</summary>
public sealed class SleepTests
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

    [Fact]
    public async Task Sleep_and_wake_are_idempotent_and_refuse_by_state()
    {
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        await using RolloutEngine fresh = RolloutEngine.Load(payload.Folder, new CpuBackend(1), new EngineOptions());
        await using RolloutEngine engine = TestModels.Load("qwen3");
        await engine.RunAsync(s_request); // leaves a cached prefix behind
        Assert.Equal([MemoryTags.Weights, MemoryTags.KvCache], (await engine.SleepAsync(MemoryTags.All)).Select(freed => freed.Tag));
        Assert.Empty(await engine.SleepAsync(MemoryTags.All));
        Assert.Equal((EngineState.Sleeping, MemoryTags.All, 0), (engine.Status.State, engine.Status.Asleep, engine.Status.KvBlocksCached));
        Assert.Equal(EngineState.Sleeping, Assert.Throws<EngineStateException>(() => engine.Submit(s_request)).State);
        Assert.Equal(EngineState.Sleeping, Assert.Throws<EngineStateException>(() => engine.BeginUpdate(payload.Manifest(0, 1))).State);

        // The order of a trainer that shares the device: weights first, then the update, then room for keys and values.
        Assert.Equal(MemoryTags.KvCache, await engine.WakeUpAsync(MemoryTags.Weights));
        Assert.Equal(MemoryTags.KvCache, await engine.WakeUpAsync(MemoryTags.Weights));
        using (WeightUpdate update = await engine.OpenUpdateAsync(payload.Manifest(0, 1)))
        {
            update.Write(0, payload.Bytes);
            await update.CommitAsync(payload.Digest, Cancelled);
        }

        Assert.Equal((EngineState.Sleeping, 1ul), (engine.Status.State, engine.Version));
        Assert.Equal(MemoryTags.None, await engine.WakeUpAsync(MemoryTags.All));
        Assert.Equal(EngineState.Running, engine.Status.State);
        Assert.Equal((await fresh.RunAsync(s_request))[0].Bits(), (await engine.RunAsync(s_request))[0].Bits());
    }

    [Fact]
    public async Task Each_kind_of_memory_sleeps_and_wakes_by_itself()
    {
        await using RolloutEngine engine = TestModels.Load("qwen3");
        MemoryTags asleep = MemoryTags.None;
        MemoryTags[] kinds = [MemoryTags.None, MemoryTags.KvCache, MemoryTags.Weights, MemoryTags.All];
        foreach (MemoryTags first in kinds)
        {
            foreach (MemoryTags second in kinds)
            {
                IReadOnlyList<FreedMemory> freed = await engine.SleepAsync(first);
                // What slept is not given back again.
                Assert.Equal(first & ~asleep, freed.Aggregate(MemoryTags.None, (all, one) => all | one.Tag));
                Assert.All(freed, one => Assert.InRange(one.AllocatedBytes, 1, long.MaxValue));
                asleep |= first;
                Assert.Equal(asleep, engine.Status.Asleep);
                asleep &= ~second;
                Assert.Equal(asleep, await engine.WakeUpAsync(second));
                Assert.Equal(asleep, engine.Status.Asleep);
                Assert.Equal(asleep == MemoryTags.None, engine.Status.State != EngineState.Sleeping);
            }
        }
    }

    [Fact]
    public async Task A_cpu_keeps_no_weights_because_they_are_in_the_hosts_memory_already()
    {
        await using RolloutEngine engine = TestModels.Load("qwen3");
        foreach (MemoryTags tags in (MemoryTags[])[MemoryTags.All, MemoryTags.Weights, MemoryTags.KvCache])
        {
            InvalidRequestException e = await Assert.ThrowsAsync<InvalidRequestException>(() => engine.SleepAsync(tags, keepWeights: true));
            Assert.Equal("keepWeights", Assert.Single(e.Problems).Field);
        }

        Assert.Equal(EngineState.Running, engine.Status.State);
    }

    [Fact]
    public async Task Weights_that_slept_are_not_served()
    {
        await using RolloutEngine engine = TestModels.Load("qwen3");
        await engine.SleepAsync(MemoryTags.Weights);
        await engine.WakeUpAsync(MemoryTags.All);
        Assert.Equal(EngineState.Poisoned, engine.Status.State);
        Assert.Contains("sleep", Assert.Throws<EngineStateException>(() => engine.Submit(s_request)).Message, StringComparison.Ordinal);
    }

    [Fact]
    public async Task What_cannot_be_allocated_on_waking_stays_asleep()
    {
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        ScriptedBackend backend = new();
        await using RolloutEngine engine = TestModels.Load("qwen3", backend);
        await engine.SleepAsync(MemoryTags.All);
        backend.RestoresFail = true;
        NoRoomException e = await Assert.ThrowsAsync<NoRoomException>(() => engine.WakeUpAsync(MemoryTags.All));
        Assert.Contains("the trainer has it", e.Message, StringComparison.Ordinal);
        Assert.Equal((EngineState.Sleeping, MemoryTags.Weights), (engine.Status.State, engine.Status.Asleep));
        Assert.Equal(EngineState.Sleeping, Assert.Throws<EngineStateException>(() => engine.BeginUpdate(payload.Manifest(0, 1))).State);
        Assert.Equal(EngineState.Sleeping, Assert.Throws<EngineStateException>(() => engine.Submit(s_request)).State);
        backend.RestoresFail = false;
        Assert.Equal(MemoryTags.None, await engine.WakeUpAsync(MemoryTags.Weights));
        Assert.Equal(EngineState.Poisoned, engine.Status.State);
    }

    /// <summary>Both sets are freed; no later update builds on their content, whatever its version.</summary>
    [Theory]
    [InlineData(UpdateMode.Staged)]
    [InlineData(UpdateMode.InPlace)]
    public async Task After_sleep_a_full_update_is_served_and_partial_ones_build_on_it(UpdateMode mode)
    {
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        await using RolloutEngine fresh = RolloutEngine.Load(payload.Folder, new CpuBackend(1), new EngineOptions());
        await using RolloutEngine engine = TestModels.Load("qwen3");
        string expected = (await fresh.RunAsync(s_request))[0].Bits();
        for (ulong version = 0; version < 12; version += 4)
        {
            await PushAsync(payload.Manifest(version, version + 1) with { Mode = version == 0 ? UpdateMode.Staged : mode });
            Assert.Single(await engine.SleepAsync(MemoryTags.Weights));
            await engine.WakeUpAsync(MemoryTags.Weights);
            Assert.Equal((EngineState.Poisoned, version + 1), (engine.Status.State, engine.Version));
            ManifestTensor norm = payload.Manifest(0, 1).Tensors.Single(tensor => tensor.Name == "model.norm.weight");
            UpdateManifest partial = payload.Manifest(version + 1, version + 2) with { Partial = true, Tensors = [norm] };
            Assert.Throws<UpdateRejectedException>(() => engine.BeginUpdate(partial));
            await PushAsync(payload.Manifest(version + 1, version + 2) with { Mode = mode });
            Assert.Equal(EngineState.Running, engine.Status.State);
            for (ulong again = version + 2; again < version + 4; again++)
            {
                await PushAsync(partial with { BaseVersion = again, NewVersion = again + 1, Mode = UpdateMode.Staged });
                Assert.Equal(expected, (await engine.RunAsync(s_request))[0].Bits());
            }
        }

        async Task PushAsync(UpdateManifest manifest)
        {
            using WeightUpdate update = await engine.OpenUpdateAsync(manifest);
            update.Write(0, payload.Bytes);
            await update.CommitAsync(default, Cancelled);
        }
    }

    [Fact]
    public async Task Samples_in_flight_keep_the_weights_awake_and_survive_the_sleep_of_the_cache()
    {
        await using RolloutEngine undisturbed = TestModels.Load("qwen3");
        ScriptedBackend backend = new();
        await using RolloutEngine engine = TestModels.Load("qwen3", backend);
        Group group = engine.SubmitAndHold(backend, s_request, tokens: 20);
        Task refused = engine.SleepAsync(MemoryTags.KvCache);
        Task paused = engine.PauseAsync(PauseMode.Keep, "sleeper", TimeSpan.FromMinutes(1), Cancelled);
        backend.LetGo();
        await Assert.ThrowsAsync<EngineStateException>(() => refused);
        await paused;
        EngineStateException e = await Assert.ThrowsAsync<EngineStateException>(() => engine.SleepAsync(MemoryTags.All));
        Assert.Equal(EngineState.Paused, e.State);
        await engine.SleepAsync(MemoryTags.KvCache);
        await engine.ResumeAsync();
        Assert.Equal(EngineState.Sleeping, engine.Status.State);
        await engine.WakeUpAsync(MemoryTags.KvCache);
        await group.Completed.WaitAsync(Cancelled);
        IReadOnlyList<Sequence> expected = await undisturbed.RunAsync(s_request);
        Assert.Equal(expected.Select(sample => sample.Bits()), group.Sequences.Select(sample => sample.Bits()));
    }

    [Fact]
    public async Task An_update_in_progress_keeps_the_weights_awake()
    {
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        await using RolloutEngine engine = TestModels.Load("qwen3");
        using WeightUpdate update = engine.BeginUpdate(payload.Manifest(0, 1) with { Owner = "trainer A" });
        EngineStateException e = await Assert.ThrowsAsync<EngineStateException>(() => engine.SleepAsync(MemoryTags.Weights));
        Assert.Contains("trainer A", e.Message, StringComparison.Ordinal);
    }

    [Fact]
    public async Task The_machine_really_has_the_memory()
    {
        using TemporaryFolder folder = new();
        File.WriteAllText(folder["config.json"], """
            {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 1024,
             "intermediate_size": 4096, "num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 16,
             "vocab_size": 4096, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "tie_word_embeddings": true}
            """);
        TensorDeclaration[] tensors = [.. ModelSpec.Load(folder.Path).CheckpointTensors()
            .Select(tensor => new TensorDeclaration(tensor.Name, DType.BFloat16, tensor.Shape))];
        SafetensorsWriter.Write(folder["model.safetensors"], [.. tensors.Select(tensor => (tensor, new byte[tensor.Bytes]))]);
        EngineOptions options = new() { MaxSequences = 1, KvCacheBytes = 64 << 20 };
        await using RolloutEngine engine = RolloutEngine.Load(folder.Path, new CpuBackend(1), options);
        await engine.RunAsync(new GroupRequest { Id = "fill", Prompt = [.. Enumerable.Range(0, 1000)], MaxTokens = 1 });
        IReadOnlyList<FreedMemory> freed = await engine.SleepAsync(MemoryTags.All);
        long weights = tensors.Sum(tensor => tensor.Bytes);
        const long KeysValues = 1000 * 2 * 2 * 1024 * sizeof(float); // written pages; more was allocated

        // Measured for the whole process, which also does other work: nine tenths.
        Assert.InRange(freed[0].FreedBytes, weights * 9 / 10, weights * 12 / 10);
        Assert.InRange(freed[1].FreedBytes, KeysValues * 9 / 10, 64 << 20);
        Assert.InRange(freed[1].AllocatedBytes, 60 << 20, 64 << 20);
    }
}
