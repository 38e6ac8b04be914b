using Rollout.Kernels;
using Rollout.Kernels.Cuda;
using Rollout.Kernels.Tests.Cuda;
using Xunit;

namespace Rollout.Engine.Tests;

/// <summary>
/// A GPU lent to a trainer and taken back. The cases are those in which other engines have crashed, hung or served wrong tokens after
/// waking: waking in parts, in the wrong order, twice, without memory, with requests waiting, and memory with undefined contents.
/// </summary>
[Collection(nameof(CudaTests))]
public sealed class CudaSleepTests
{
    private static readonly EngineOptions s_options = new() { MaxBatchTokens = 64, MaxSequences = 4, MaxContext = 256 };

    private static readonly GroupRequest s_request = new()
    {
        Id = "probe",
        Prompt = [.. Enumerable.Range(3, 40)],
        N = 2,
        MaxTokens = 12,
        Seed = 9,
        IgnoreEos = true,
    };

    private static CancellationToken Cancelled => TestContext.Current.CancellationToken;

    [Fact]
    public async Task Weights_kept_by_the_host_serve_the_same_bits_without_a_push()
    {
        SimulatedDevice.RequireSimulated();
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        await using RolloutEngine engine = RolloutEngine.Load(TestModels.Folder("qwen3"), new CudaBackend(0), s_options);
        await PushAsync(engine, payload.Manifest(0, 1), payload);
        string[] expected = await BitsAsync(engine);
        (long graphs, long awake, long pinned) =
            (SimulatedDevice.Count().Graphs, engine.Backend.AvailableBytes, SimulatedDevice.PinnedBytes);
        for (int cycle = 0; cycle < 3; cycle++)
        {
            IReadOnlyList<FreedMemory> freed = await engine.SleepAsync(MemoryTags.All, keepWeights: true);
            Assert.Equal([MemoryTags.Weights, MemoryTags.KvCache], freed.Select(one => one.Tag));
            Assert.All(freed, one => Assert.Equal(one.FreedBytes, one.FreeBytesAfter - one.FreeBytesBefore));
            Assert.All(freed, one => Assert.InRange(one.FreedBytes, one.AllocatedBytes, long.MaxValue));
            Assert.Equal(awake + freed.Sum(one => one.FreedBytes), engine.Backend.AvailableBytes);
            Assert.Equal(new MemoryInUse(0, 0, 0, 0, 0, engine.Backend.AvailableBytes), engine.Status.Memory);
            Assert.Equal(0, freed[1].HostBytes);
            Assert.InRange(SimulatedDevice.PinnedBytes - pinned, freed[0].HostBytes, freed[0].HostBytes + 4096);
            Assert.Empty(await engine.SleepAsync(MemoryTags.All, keepWeights: true));
            Assert.Empty(await engine.SleepAsync(MemoryTags.All)); // what is kept stays kept
            Assert.Equal(MemoryTags.None, await engine.WakeUpAsync(MemoryTags.All));
            Assert.Equal((EngineState.Running, 1ul), (engine.Status.State, engine.Version));
            Assert.Equal(pinned, SimulatedDevice.PinnedBytes);
            // The spare set of the update is gone until the next one.
            awake = cycle == 0 ? engine.Backend.AvailableBytes : awake;
            Assert.Equal(awake, engine.Backend.AvailableBytes);
            Assert.Equal(expected, await BitsAsync(engine));
        }

        Assert.Equal(graphs, SimulatedDevice.Count().Graphs);
        Assert.Equal(0, engine.Status.Memory.Staging);
        await PushAsync(engine, payload.Manifest(1, 2), payload); // the spare set is allocated again
        Assert.Equal(expected, await BitsAsync(engine));
    }

    /// <summary>The trainer needs most of the device: what it holds cannot be woken, and nothing is lost by trying.</summary>
    [Fact]
    public async Task Memory_wakes_in_parts_as_the_trainer_gives_it_back()
    {
        SimulatedDevice.RequireSimulated();
        await using RolloutEngine engine = RolloutEngine.Load(TestModels.Folder("qwen3"), new CudaBackend(0), s_options);
        string[] expected = await BitsAsync(engine);
        IReadOnlyList<FreedMemory> freed = await engine.SleepAsync(MemoryTags.All, keepWeights: true);
        long used = engine.Backend.HeldBytes, weights = freed[0].FreedBytes;
        using (SimulatedDevice.WithBytes(used + weights - 1))
            await Assert.ThrowsAsync<NoRoomException>(() => engine.WakeUpAsync(MemoryTags.Weights));
        using (SimulatedDevice.WithBytes(used + weights))
        {
            Assert.Equal(MemoryTags.KvCache, await engine.WakeUpAsync(MemoryTags.Weights));
            Assert.Equal(MemoryTags.KvCache, await engine.WakeUpAsync(MemoryTags.Weights));
            await Assert.ThrowsAsync<NoRoomException>(() => engine.WakeUpAsync(MemoryTags.All));
            Assert.Equal((EngineState.Sleeping, MemoryTags.KvCache), (engine.Status.State, engine.Status.Asleep));
            Assert.Equal(EngineState.Sleeping, Assert.Throws<EngineStateException>(() => engine.Submit(s_request)).State);
        }

        Assert.Equal(MemoryTags.None, await engine.WakeUpAsync(MemoryTags.All));
        Assert.Equal(expected, await BitsAsync(engine));
    }

    [Theory]
    [InlineData(MemoryTags.Weights, MemoryTags.KvCache)]
    [InlineData(MemoryTags.KvCache, MemoryTags.Weights)]
    public async Task A_sample_in_flight_survives_a_pause_and_either_order_of_waking(MemoryTags first, MemoryTags second)
    {
        SimulatedDevice.RequireSimulated();
        await using RolloutEngine undisturbed = RolloutEngine.Load(TestModels.Folder("qwen3"), new CudaBackend(0), s_options);
        ScriptedBackend backend = new(new CudaBackend(0));
        await using RolloutEngine engine = RolloutEngine.Load(TestModels.Folder("qwen3"), backend, s_options);
        GroupRequest request = s_request with { MaxTokens = 60, StreamTokens = true };
        Group group = engine.SubmitAndHold(backend, request, tokens: 10);
        Task paused = engine.PauseAsync(PauseMode.Keep, "trainer", TimeSpan.FromMinutes(1), Cancelled);
        backend.LetGo();
        await paused;
        await engine.SleepAsync(MemoryTags.KvCache);
        // Samples in flight need their weights.
        await Assert.ThrowsAsync<EngineStateException>(() => engine.SleepAsync(MemoryTags.Weights));
        await engine.ResumeAsync();
        Assert.Equal(EngineState.Sleeping, engine.Status.State); // resumed, and no step runs without the cache
        await engine.WakeUpAsync(first);
        await engine.WakeUpAsync(second);
        await group.Completed.WaitAsync(TimeSpan.FromSeconds(60), Cancelled);
        Assert.Equal(
            (await undisturbed.RunAsync(request)).Select(sample => sample.Bits()), group.Sequences.Select(sample => sample.Bits()));
    }

    [Fact]
    public async Task Poisoned_weights_that_are_kept_stay_poisoned()
    {
        SimulatedDevice.RequireSimulated();
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        await using RolloutEngine engine = RolloutEngine.Load(TestModels.Folder("qwen3"), new CudaBackend(0), s_options);
        string[] expected = await BitsAsync(engine);
        using (WeightUpdate broken = await engine.OpenUpdateAsync(payload.Manifest(0, 1) with { Mode = UpdateMode.InPlace }))
            broken.Write(0, payload.Bytes.AsSpan(0, 1000));
        Assert.Equal(EngineState.Poisoned, engine.Status.State);
        string reason = engine.Status.Reason;
        await engine.SleepAsync(MemoryTags.All, keepWeights: true);
        await engine.WakeUpAsync(MemoryTags.All);
        Assert.Equal((EngineState.Poisoned, reason), (engine.Status.State, engine.Status.Reason));
        await PushAsync(engine, payload.Manifest(0, 1) with { Mode = UpdateMode.InPlace }, payload);
        Assert.Equal(EngineState.Running, engine.Status.State);
        string[] pushed = await BitsAsync(engine);
        Assert.NotEqual(expected, pushed);
        await using RolloutEngine fresh = RolloutEngine.Load(payload.Folder, new CudaBackend(0), s_options);
        Assert.Equal(await BitsAsync(fresh), pushed);
    }

    [Fact]
    public async Task Weights_kept_by_the_host_are_freed_with_the_engine()
    {
        SimulatedDevice.RequireSimulated();
        long pinned = SimulatedDevice.PinnedBytes;
        await using (RolloutEngine engine = RolloutEngine.Load(TestModels.Folder("qwen3"), new CudaBackend(0), s_options))
            await engine.SleepAsync(MemoryTags.All, keepWeights: true);
        Assert.Equal(pinned, SimulatedDevice.PinnedBytes);
    }

    private static async Task<string[]> BitsAsync(RolloutEngine engine)
        => [.. (await engine.RunAsync(s_request)).Select(sample => sample.Bits())];

    private static async Task PushAsync(RolloutEngine engine, UpdateManifest manifest, UpdatePayload payload)
    {
        using WeightUpdate update = await engine.OpenUpdateAsync(manifest);
        update.Write(0, payload.Bytes);
        await update.CommitAsync(payload.Digest, Cancelled);
    }
}
