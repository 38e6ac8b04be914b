using Rollout.Kernels;
using Rollout.Kernels.Cuda;
using Rollout.Kernels.Tests.Cuda;
using Xunit;

namespace Rollout.Engine.Tests;

/// <summary>Graphs are captured at start, and for a spare set of weights before it serves: later steps only launch them.</summary>
[Collection(nameof(CudaTests))]
public sealed class CudaGraphTests
{
    private static CancellationToken Cancelled => TestContext.Current.CancellationToken;

    /// <summary>
    /// 64 prompts of 150 tokens, 16 samples each of different lengths, 256 seats. Only the host's part: the device does no work.
    /// </summary>
    [Fact]
    public async Task No_step_of_a_grpo_rollout_captures_a_graph_and_each_decode_step_launches_one()
    {
        SimulatedDevice.RequireSimulated();
        SimulatedDevice.Idle(true);
        try
        {
            CudaBackend backend = new(0);
            await using RolloutEngine engine = RolloutEngine.Load(
                TestModels.Folder("qwen3"), backend, new EngineOptions { MaxSequences = 256 });
            (long graphs, long launches, long steps) = (SimulatedDevice.Count().Graphs, backend.GraphLaunches, engine.Status.Steps);
            Random random = new(1);
            Group[] groups = [.. Enumerable.Range(0, 64).Select(g => engine.Submit(new GroupRequest
            {
                Id = $"{g}",
                Prompt = [.. Enumerable.Range(0, 150).Select(_ => random.Next(3, 300))],
                N = 16,
                MaxTokens = (int)Math.Clamp(Math.Exp(4 + (random.NextDouble() * 2)), 1, engine.MaxContext - 150),
                Seed = (ulong)g,
                IgnoreEos = true,
            }))];
            await Task.WhenAll(groups.Select(group => group.Completed)).WaitAsync(TimeSpan.FromSeconds(60), Cancelled);
            Assert.Equal(0, SimulatedDevice.Count().Graphs - graphs);
            // The others compute prompts.
            Assert.InRange(backend.GraphLaunches - launches, 0.75 * (engine.Status.Steps - steps), engine.Status.Steps - steps);
        }
        finally
        {
            SimulatedDevice.Idle(false);
        }
    }

    [Fact]
    public async Task After_a_staged_update_steps_are_graphs_and_a_second_update_captures_none()
    {
        SimulatedDevice.RequireSimulated();
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        CudaBackend backend = new(0);
        await using RolloutEngine engine = Load(backend);
        Assert.Equal((0, 9), await Decode()); // after the prompt's step
        for (ulong version = 0; version < 3; version++)
        {
            long before = SimulatedDevice.Count().Graphs;
            await Push(engine, payload, payload.Manifest(version, version + 1));
            Assert.Equal(version == 0, SimulatedDevice.Count().Graphs > before);
            Assert.Equal((0, 9), await Decode());
        }

        async Task<(long Captured, long Launched)> Decode()
        {
            (long graphs, long launches) = (SimulatedDevice.Count().Graphs, backend.GraphLaunches);
            await engine.RunAsync(s_request);
            return (SimulatedDevice.Count().Graphs - graphs, backend.GraphLaunches - launches);
        }
    }

    /// <summary>
    /// Graphs are captured before new weights serve: where that fails, so does the commit, and the old version is reported.
    /// </summary>
    [Fact]
    public async Task A_commit_whose_graphs_cannot_be_captured_fails_and_does_not_hang()
    {
        SimulatedDevice.Require();
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        ScriptedBackend device = new(new CudaBackend(0));
        await using RolloutEngine engine = RolloutEngine.Load(
            TestModels.Folder("qwen3"), device, new EngineOptions { MaxBatchTokens = 64, MaxSequences = 4, MaxContext = 256 });
        device.RehearsalsFail = true;
        using WeightUpdate update = await engine.OpenUpdateAsync(payload.Manifest(0, 1));
        update.Write(0, payload.Bytes);
        UpdateFailedException error = await Assert.ThrowsAsync<UpdateFailedException>(
            () => update.CommitAsync(payload.Digest, Cancelled).WaitAsync(TimeSpan.FromSeconds(20), Cancelled));
        Assert.Equal(UpdateFailure.Engine, error.Failure);
        Assert.Equal("InvalidOperationException: no memory for graphs; the update was not committed", error.Message);
        Assert.Equal((EngineState.Faulted, 0ul), (engine.Status.State, engine.Version));
    }

    /// <summary>A simulated graph takes no memory; a real one takes megabytes, and there is one for every size of a step.</summary>
    [Fact]
    public async Task The_status_says_what_graphs_take_of_both_sets_of_weights()
    {
        SimulatedDevice.RequireSimulated();
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        ScriptedBackend backend = new(new CudaBackend(0)) { GraphBytes = 1 << 20 };
        await using RolloutEngine engine = RolloutEngine.Load(TestModels.Folder("qwen3"), backend, s_options);
        MemoryInUse loaded = engine.Status.Memory;
        Assert.Equal((0L, backend.HeldBytes), (loaded.Staging, loaded.Graphs));
        Assert.InRange(loaded.Graphs, 1 << 20, 64 << 20);
        await Push(engine, payload, payload.Manifest(0, 1) with { Mode = UpdateMode.Staged });
        Assert.Equal((loaded.Weights, 2 * loaded.Graphs), (engine.Status.Memory.Staging, engine.Status.Memory.Graphs));
        await Push(engine, payload, payload.Manifest(1, 2) with { Mode = UpdateMode.Staged });
        Assert.Equal((loaded.Weights, 2 * loaded.Graphs), (engine.Status.Memory.Staging, engine.Status.Memory.Graphs));
    }

    [Fact]
    public async Task Graphs_survive_sleep_because_memory_keeps_its_addresses()
    {
        SimulatedDevice.RequireSimulated();
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        CudaBackend backend = new(0);
        await using RolloutEngine engine = Load(backend);
        await engine.RunAsync(s_request);
        long graphs = SimulatedDevice.Count().Graphs;
        await engine.SleepAsync(MemoryTags.All);
        await engine.WakeUpAsync(MemoryTags.All);
        await Push(engine, payload, payload.Manifest(0, 1) with { Mode = UpdateMode.InPlace });
        long launches = backend.GraphLaunches;
        string[] bits = await Bits(engine);
        Assert.Equal((0, 9), (SimulatedDevice.Count().Graphs - graphs, backend.GraphLaunches - launches));
        await using RolloutEngine fresh = RolloutEngine.Load(payload.Folder, new CudaBackend(0), s_options);
        Assert.Equal(await Bits(fresh), bits);

        static async Task<string[]> Bits(RolloutEngine engine) => [.. (await engine.RunAsync(s_request)).Select(sample => sample.Bits())];
    }

    /// <summary>The buffers have room for thousands of tokens, biases, alternatives and long contexts; a step sends only its own.</summary>
    [Fact]
    public async Task A_step_sends_the_indices_that_it_has()
    {
        SimulatedDevice.RequireSimulated();
        CudaBackend backend = new(0);
        await using RolloutEngine engine = RolloutEngine.Load(
            TestModels.Folder("qwen3"), backend, new EngineOptions { MaxSequences = 256 });
        await engine.RunAsync(s_request with { N = 1 });
        long few = await Sent(10), many = await Sent(30);
        // Header, tokens, positions, sequences, output rows, slots, query, item, table: a cache line or two each.
        Assert.InRange((many - few) / 20, 1, 1200);

        async Task<long> Sent(int tokens)
        {
            SimulatedDevice.Counters before = SimulatedDevice.Count();
            await engine.RunAsync(s_request with { N = 1, MaxTokens = tokens });
            return (SimulatedDevice.Count() - before).HostToDeviceBytes;
        }
    }

    private static readonly GroupRequest s_request = new()
    {
        Id = "probe",
        Prompt = [5, 6, 7],
        N = 3,
        MaxTokens = 10,
        Seed = 3,
        IgnoreEos = true,
    };

    private static readonly EngineOptions s_options = new() { MaxBatchTokens = 64, MaxSequences = 4, MaxContext = 256 };

    private static async Task Push(RolloutEngine engine, UpdatePayload payload, UpdateManifest manifest)
    {
        using WeightUpdate update = await engine.OpenUpdateAsync(manifest);
        update.Write(0, payload.Bytes);
        await update.CommitAsync(payload.Digest, Cancelled);
    }

    private static RolloutEngine Load(CudaBackend backend)
        => RolloutEngine.Load(TestModels.Folder("qwen3"), backend, s_options);
}
