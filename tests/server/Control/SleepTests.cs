using Grpc.Core;
using Grpc.Health.V1;
using Rollout.V1;
using ServingStatus = Grpc.Health.V1.HealthCheckResponse.Types.ServingStatus;
using Update = Grpc.Core.AsyncDuplexStreamingCall<Rollout.V1.UpdateRequest, Rollout.V1.UpdateReply>;

namespace Rollout.Server.Tests;

/// <summary>Sleep and WakeUp over the wire: memory given back for a trainer on the same machine, and calls during sleep.</summary>
public sealed class SleepTests
{
    private static readonly Golden.Case s_golden = Golden.Cases("qwen3")[1];

    /// <summary>Far more samples than seats, so that it runs for a while on any machine.</summary>
    private static readonly GenerateRequest s_long = Calls.Sampled(s_golden.Prompt, 490, seed: 2, n: 32, change: r => r.Stream = true);

    [Fact]
    public async Task A_trainers_cycle_gives_the_memory_back_and_takes_it_again()
    {
        // 27 MB of weights, 32 KB of keys and values a token.
        HandMadeModel model = HandMadeModel.Random(hidden: 1024, intermediate: 512, layers: 2, vocabulary: 1024, seed: 7);
        using TemporaryFolder folder = new();
        model.Write(folder.Path);
        Payload payload = Payload.Of(model);
        const long PromptTokens = 4 * 500;
        const long KeysValues = PromptTokens * 2 * 2 * 1024 * sizeof(float);
        await using ServerProcess server = await ServerProcess.StartAsync(
            folder.Path, "--kv-cache", "64MiB", "--max-batch-tokens", "64");
        List<double> asleep = [];
        uint[]? expected = null;
        for (ulong cycle = 0; cycle < 5; cycle++)
        {
            List<SampleChunk>[] samples = await Task.WhenAll(Enumerable.Range(0, 4).Select(prompt => server.SamplesAsync(
                Calls.Greedy([.. Enumerable.Range(0, 500).Select(i => (uint)(i * (prompt + 3) % 1024))], 8))));
            uint[] ids = [.. samples.SelectMany(group => group[0].Ids)];
            Assert.Equal(expected ??= ids, ids); // the same weights come back every time
            double awake = server.ResidentBytes;

            SleepReply slept = await server.Control.SleepAsync(new SleepRequest());
            asleep.Add(server.ResidentBytes);
            double freed = awake - asleep[^1];
            Assert.Equal(EngineState.Sleeping, slept.State);
            Assert.Equal([MemoryTag.Weights, MemoryTag.KvCache], slept.Freed.Select(memory => memory.Tag));
            TestContext.Current.TestOutputHelper!.WriteLine(
                $"resident {awake / 1e6:F1} MB fell by {freed / 1e6:F1} MB; the server says {slept.Freed}");
            // One set, although two are allocated from the second cycle on: the set that slept has no pages until it is written again.
            Assert.InRange(slept.Freed[0].FreedBytes, payload.Bytes.Length * 0.9, payload.Bytes.Length * 1.15);
            Assert.InRange(slept.Freed[1].FreedBytes, KeysValues * 0.9, 64 << 20);
            Assert.InRange(slept.Freed[1].AllocatedBytes, 60ul << 20, 64ul << 20);
            // The freed bytes agree with the process's resident memory, which also changes for other reasons.
            double said = slept.Freed.Sum(memory => (double)memory.FreedBytes);
            Assert.InRange(freed, said * 0.9, said * 1.1);

            WakeUpReply woken = await server.Control.WakeUpAsync(new WakeUpRequest { Tags = { MemoryTag.Weights } });
            Assert.Equal(EngineState.Sleeping, woken.State);
            Assert.Equal([MemoryTag.KvCache], woken.Asleep);
            await server.CommitAsync(payload, cycle, cycle + 1, begin => begin.Mode = UpdateMode.Staged);
            woken = await server.Control.WakeUpAsync(new WakeUpRequest { Tags = { MemoryTag.KvCache } });
            Assert.Equal(EngineState.Running, woken.State);
            Assert.Empty(woken.Asleep);
        }

        // Before the first push there were no buffers for one. A cycle that kept a weight set would show three of them here; .NET's own
        // heap moves by less than half of one.
        Assert.InRange(asleep[4], 0, asleep[1] + payload.Bytes.Length);
    }

    [Fact]
    public async Task Sleeping_is_idempotent_refused_by_state_and_seen_by_health()
    {
        Payload payload = Payload.Reversed("qwen3");
        await using ServerProcess server = await ServerProcess.StartAsync("qwen3", "--max-sequences", "4");
        SleepRequest odd = new() { Tags = { MemoryTag.KvCache, (MemoryTag)9 } };
        RpcException unknown = await Calls.FailsAsync(() => server.Control.SleepAsync(odd).ResponseAsync, StatusCode.InvalidArgument);
        Assert.Contains("memory tag 9", unknown.Status.Detail, StringComparison.Ordinal);
        SleepRequest kept = new() { KeepWeights = true };
        unknown = await Calls.FailsAsync(() => server.Control.SleepAsync(kept).ResponseAsync, StatusCode.InvalidArgument);
        Assert.StartsWith("keep_weights: needs a device", unknown.Status.Detail, StringComparison.Ordinal);
        WakeUpRequest unnamed = new() { Tags = { MemoryTag.Unspecified } };
        await Calls.FailsAsync(() => server.Control.WakeUpAsync(unnamed).ResponseAsync, StatusCode.InvalidArgument);
        await HealthAsync(server, generates: true);

        // Awake already.
        Assert.Equal(EngineState.Running, (await server.Control.WakeUpAsync(new WakeUpRequest())).State);

        SleepReply weights = await server.Control.SleepAsync(new SleepRequest { Tags = { MemoryTag.Weights } });
        Assert.Equal([MemoryTag.Weights], weights.Freed.Select(memory => memory.Tag));
        SleepReply rest = await server.Control.SleepAsync(new SleepRequest());
        Assert.Equal([MemoryTag.KvCache], rest.Freed.Select(memory => memory.Tag));
        Assert.Equal([MemoryTag.Weights, MemoryTag.KvCache], rest.Asleep);
        SleepReply again = await server.Control.SleepAsync(new SleepRequest());
        Assert.Empty(again.Freed);
        Assert.Equal([MemoryTag.Weights, MemoryTag.KvCache], again.Asleep);

        StatusReply status = await server.Control.StatusAsync(new StatusRequest());
        Assert.Equal(EngineState.Sleeping, status.State);
        Assert.Equal([MemoryTag.Weights, MemoryTag.KvCache], status.Asleep);
        Assert.Contains("asleep", status.Reason, StringComparison.Ordinal);
        await HealthAsync(server, generates: false);
        await RefusedAsync("SLEEPING", () => server.SamplesAsync(Calls.Greedy(s_golden.Prompt, 4)));
        ScoreRequest score = new() { Ids = new TokenIds { Ids = { 1, 2 } } };
        await RefusedAsync("SLEEPING", () => server.Rollout.ScoreAsync(score).ResponseAsync);
        await RefusedAsync("SLEEPING", () => server.UpdateAsync([payload.Begin(0, 1)]));

        // Awake, the engine is poisoned; until the cache is awake too it reports sleeping, with both reasons.
        Assert.Equal(EngineState.Sleeping, (await server.Control.WakeUpAsync(new WakeUpRequest { Tags = { MemoryTag.Weights } })).State);
        status = await server.Control.StatusAsync(new StatusRequest());
        Assert.Equal(EngineState.Sleeping, status.State);
        Assert.StartsWith("asleep: KvCache; poisoned: ", status.Reason, StringComparison.Ordinal);
        Assert.Equal(EngineState.Poisoned, (await server.Control.WakeUpAsync(new WakeUpRequest())).State);
        await HealthAsync(server, generates: false);
        await RefusedAsync("POISONED", () => server.SamplesAsync(Calls.Greedy(s_golden.Prompt, 4)));
        Rejected partial = (await server.UpdateAsync([payload.Begin(0, 1, begin => begin.Partial = true)]))[^1].Rejected;
        Assert.Contains("discarded by sleep", partial.Problems[0].Message, StringComparison.Ordinal);
        await server.CommitAsync(payload, 0, 1);
        await HealthAsync(server, generates: true);
        Assert.Equal(4, (await server.SamplesAsync(Calls.Greedy(s_golden.Prompt, 4)))[0].Ids.Count);
    }

    [Fact]
    public async Task Work_keeps_memory_awake_and_a_pause_lets_keys_and_values_sleep()
    {
        Payload payload = Payload.Reversed("qwen3");
        await using ServerProcess server = await ServerProcess.StartAsync("qwen3", "--max-sequences", "4");
        SleepRequest cache = new() { Tags = { MemoryTag.KvCache } };
        List<SampleChunk> expected = await server.SamplesAsync(s_long);
        using AsyncServerStreamingCall<GenerateReply> call = server.Rollout.Generate(s_long, deadline: Calls.Deadline());
        Assert.True(await call.ResponseStream.MoveNext(default));
        GenerateReply first = call.ResponseStream.Current;
        await RefusedAsync("RUNNING", () => server.Control.SleepAsync(cache).ResponseAsync);
        PauseRequest pause = new() { Mode = PauseMode.Keep, Owner = "trainer", LeaseMilliseconds = 60_000 };
        await server.Control.PauseAsync(pause);
        await RefusedAsync("PAUSED", () => server.Control.SleepAsync(new SleepRequest()).ResponseAsync);
        Assert.Equal([MemoryTag.KvCache], (await server.Control.SleepAsync(cache)).Asleep);
        await server.Control.ResumeAsync(new ResumeRequest());
        // The engine is not paused now.
        Assert.Equal(EngineState.Sleeping, (await server.Control.StatusAsync(new StatusRequest())).State);
        Assert.Equal(EngineState.Running, (await server.Control.WakeUpAsync(new WakeUpRequest())).State);
        List<SampleChunk> samples = Calls.Join([first, .. await call.ResponseStream.ReadAllAsync().ToListAsync()]);
        Assert.Equal(expected.Select(sample => sample.Ids), samples.Select(sample => sample.Ids));
        Assert.Equal(expected.Select(sample => sample.Logprobs), samples.Select(sample => sample.Logprobs));

        (UpdateMode Mode, string State)[] modes = [(UpdateMode.Staged, "RUNNING"), (UpdateMode.InPlace, "UPDATING")];
        foreach ((UpdateMode mode, string state) in modes)
        {
            UpdateRequest begin = payload.Begin(0, 1, begin => (begin.Mode, begin.Owner) = (mode, "trainer-7"));
            using Update update = await server.BeginUpdateAsync(begin);
            Assert.Equal(mode, (await update.NextAsync()).Ready.Mode);
            await update.SendAsync(payload.Chunks(1 << 24).First()); // all of it
            Assert.NotNull((await update.NextAsync()).Progress);
            RpcException refused = await RefusedAsync(state, () => server.Control.SleepAsync(new SleepRequest()).ResponseAsync);
            Assert.Contains("trainer-7", refused.Status.Detail, StringComparison.Ordinal);
            if (mode == UpdateMode.InPlace) await update.SendAsync(payload.Commit());
            else await update.SendAsync(new UpdateRequest { Abort = new AbortUpdate() });
            Assert.Equal(mode == UpdateMode.InPlace, (await update.NextAsync()).Committed is not null);
        }
    }

    private static async Task<RpcException> RefusedAsync(string state, Func<Task> call)
    {
        RpcException refused = await Calls.FailsAsync(call, StatusCode.FailedPrecondition);
        Assert.StartsWith($"{state}: ", refused.Status.Detail, StringComparison.Ordinal);
        return refused;
    }

    private static async Task HealthAsync(ServerProcess server, bool generates)
    {
        foreach (string service in (string[])["", "rollout.v1.WeightsService", "rollout.v1.ControlService", "rollout.v1.RolloutService"])
        {
            HealthCheckResponse health = await server.Health.CheckAsync(new HealthCheckRequest { Service = service });
            bool serving = generates || service != "rollout.v1.RolloutService";
            Assert.Equal((service, serving ? ServingStatus.Serving : ServingStatus.NotServing), (service, health.Status));
        }
    }
}
