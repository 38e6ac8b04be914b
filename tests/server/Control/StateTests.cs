using Google.Protobuf;
using Grpc.Core;
using Grpc.Health.V1;
using Rollout.Engine;
using Rollout.V1;
using EngineState = Rollout.V1.EngineState;
using FinishReason = Rollout.V1.FinishReason;
using SampleChunk = Rollout.V1.SampleChunk;
using ServingStatus = Grpc.Health.V1.HealthCheckResponse.Types.ServingStatus;

namespace Rollout.Server.Tests;

/// <summary>
/// The answer of every call in every state, as defined in control.proto. A client decides by it whether to wait, to fix its request, or to
/// give up.
/// </summary>
public sealed class StateTests
{
    private const string Generation = "rollout.v1.RolloutService";
    private const string Weights = "rollout.v1.WeightsService";
    private const string Control = "rollout.v1.ControlService";

    private static readonly uint[] s_prompt = Golden.Cases("qwen3")[1].Prompt;
    private static readonly Payload s_payload = Payload.Reversed("qwen3");

    [Theory]
    // State; health of the whole, generation, weights; then how Generate, Update and Sleep, and Pause are refused.
    [InlineData(EngineState.Loading, "...", StatusCode.Unavailable, StatusCode.Unavailable, StatusCode.Unavailable)]
    [InlineData(EngineState.Running, "SSS", StatusCode.OK, StatusCode.OK, StatusCode.OK)]
    [InlineData(EngineState.Sleeping, "S.S", StatusCode.FailedPrecondition, StatusCode.FailedPrecondition, StatusCode.OK)]
    [InlineData(EngineState.Poisoned, "S.S", StatusCode.FailedPrecondition, StatusCode.OK, StatusCode.OK)]
    [InlineData(EngineState.Faulted, "...", StatusCode.Unavailable, StatusCode.Unavailable, StatusCode.Unavailable)]
    public async Task Calls_and_health_answer_as_the_state_says(
        EngineState state, string health, StatusCode generate, StatusCode update, StatusCode pause)
    {
        await using HeldServer server = await HeldServer.StartAsync(loaded: state != EngineState.Loading);
        await ToStateAsync(server, state);
        Assert.Equal(state, (await server.Control.StatusAsync(new StatusRequest(), deadline: Calls.Deadline())).State);
        await HealthAsync(server, health);
        await AnswersAsync(generate, () => server.SamplesAsync(Calls.Greedy(s_prompt, 2)));
        await AnswersAsync(generate, () => server.Rollout.ScoreAsync(
            new ScoreRequest { Ids = new TokenIds { Ids = { 1, 2 } } }, deadline: Calls.Deadline()).ResponseAsync);
        using (AsyncDuplexStreamingCall<GenerateRequest, GenerateReply> batch = server.Rollout.GenerateBatch(deadline: Calls.Deadline()))
        {
            await batch.RequestStream.WriteAsync(Calls.Greedy(s_prompt, 2, r => r.RequestId = "one"));
            Assert.True(await batch.ResponseStream.MoveNext(default)); // and the call goes on
            Assert.Equal("one", batch.ResponseStream.Current.RequestId);
            Assert.Equal((int)generate, batch.ResponseStream.Current.Refused?.Code ?? 0);
        }

        UpdateRequest begin = s_payload.Begin(0, 1);
        UpdateRequest abort = new() { Abort = new AbortUpdate { Reason = "only asking" } };
        await AnswersAsync(update, async () => Assert.NotNull((await server.UpdateAsync([begin, abort]))[0].Ready));
        await AnswersAsync(pause, () => server.Control.PauseAsync(
            new PauseRequest { Mode = V1.PauseMode.Keep, LeaseMilliseconds = 60_000 }, deadline: Calls.Deadline()).ResponseAsync);
        await AnswersAsync(pause, () => server.Control.ResumeAsync(new ResumeRequest(), deadline: Calls.Deadline()).ResponseAsync);
        await AnswersAsync(pause, () => server.Control.WakeUpAsync(
            new WakeUpRequest { Tags = { MemoryTag.KvCache } }, deadline: Calls.Deadline()).ResponseAsync);
        await AnswersAsync(pause, () => server.Control.SleepAsync(new SleepRequest(), deadline: Calls.Deadline()).ResponseAsync);
        if (state != EngineState.Loading) return;
        server.Host.Publish(server.Engine);
        await HealthAsync(server, "SSS");
        Assert.Single(await server.SamplesAsync(Calls.Greedy(s_prompt, 2)));
    }

    [Fact]
    public async Task A_server_that_stops_takes_nothing_new_and_says_so()
    {
        await using HeldServer server = await HeldServer.StartAsync();
        server.Host.Stop();
        await HealthAsync(server, "...");
        RpcException refused = await Calls.FailsAsync(() => server.SamplesAsync(Calls.Greedy(s_prompt, 2)), StatusCode.Unavailable);
        Assert.Equal("the server is stopping", refused.Status.Detail);
        await Calls.FailsAsync(() => server.UpdateAsync([s_payload.Begin(0, 1)]), StatusCode.Unavailable);
        await Calls.FailsAsync(() => server.Rollout.ScoreAsync(new ScoreRequest { Ids = new TokenIds { Ids = { 1 } } }).ResponseAsync,
            StatusCode.Unavailable);
    }

    [Fact]
    public async Task A_watcher_of_health_hears_every_change_once()
    {
        await using HeldServer server = await HeldServer.StartAsync();
        using AsyncServerStreamingCall<HealthCheckResponse> watch = server.Health.Watch(
            new HealthCheckRequest { Service = Generation }, deadline: Calls.Deadline());
        using AsyncServerStreamingCall<HealthCheckResponse> whole = server.Health.Watch(
            new HealthCheckRequest(), deadline: Calls.Deadline());
        async Task HearsAsync(AsyncServerStreamingCall<HealthCheckResponse> call, ServingStatus status)
        {
            Assert.True(await call.ResponseStream.MoveNext(default));
            Assert.Equal(status, call.ResponseStream.Current.Status);
        }

        await HearsAsync(watch, ServingStatus.Serving);
        await server.Control.SleepAsync(new SleepRequest());
        await HearsAsync(watch, ServingStatus.NotServing);
        await server.Control.WakeUpAsync(new WakeUpRequest()); // poisoned: as before
        await server.CommitAsync(s_payload, 0, 1);
        await HearsAsync(watch, ServingStatus.Serving);
        server.Device.StepsLeft = 0;
        await Calls.FailsAsync(() => server.SamplesAsync(Calls.Greedy(s_prompt, 2)), StatusCode.Unavailable);
        await HearsAsync(watch, ServingStatus.NotServing);
        await HearsAsync(whole, ServingStatus.Serving); // all the time until now
        await HearsAsync(whole, ServingStatus.NotServing);
        HealthCheckRequest unknown = new() { Service = "no.such.Service" };
        await Calls.FailsAsync(() => server.Health.CheckAsync(unknown).ResponseAsync, StatusCode.NotFound);
    }

    /// <summary>A stream that ends with OK is a whole one.</summary>
    [Fact]
    public async Task A_lost_device_ends_all_in_flight_with_what_it_has_and_an_error()
    {
        await using HeldServer server = await HeldServer.StartAsync(HeldServer.Small with { MaxSequences = 16 });
        GenerateRequest Long(string id) => Calls.Sampled(s_prompt, 200, seed: 2, n: 2, change: r => (r.RequestId, r.Stream) = (id, true));
        using AsyncDuplexStreamingCall<GenerateRequest, GenerateReply> batch = server.Rollout.GenerateBatch(deadline: Calls.Deadline());
        // Paused, so that nothing ends before all are there.
        Task<List<SampleChunk>> begun = await server.BeginAndPauseAsync(Calls.Sampled(s_prompt, 200, seed: 1));
        using AsyncServerStreamingCall<GenerateReply> call = server.Rollout.Generate(Long("alone"), deadline: Calls.Deadline());
        await batch.RequestStream.WriteAsync(Long("first"));
        await batch.RequestStream.WriteAsync(Long("second"));
        await batch.RequestStream.CompleteAsync();
        Task<ScoreReply> score = server.Rollout.ScoreAsync(
            new ScoreRequest { Ids = new TokenIds { Ids = { s_prompt } } }, deadline: Calls.Deadline()).ResponseAsync;
        using AsyncDuplexStreamingCall<UpdateRequest, UpdateReply> update = await server.BeginUpdateAsync(
            s_payload.Begin(0, 1, begin => begin.Policy = V1.UpdatePolicy.Drain));
        await server.StatusAsync(status => status is { Running: 1, Waiting: 7, Updating: true });
        server.Device.StepsLeft = 5; // the score goes through
        await server.Control.ResumeAsync(new ResumeRequest());

        await Calls.FailsAsync(() => begun, StatusCode.Unavailable);
        Assert.Equal(s_prompt.Length - 1, (await score).Logprobs.Count);
        IAsyncStreamReader<GenerateReply>[] streams = [call.ResponseStream, batch.ResponseStream];
        foreach (IAsyncStreamReader<GenerateReply> stream in streams)
        {
            List<GenerateReply> replies = [];
            RpcException lost = await Calls.FailsAsync(async () =>
            {
                while (await stream.MoveNext(default)) replies.Add(stream.Current);
            }, StatusCode.Unavailable);
            Assert.Contains("device lost", lost.Status.Detail, StringComparison.Ordinal);
            foreach (IGrouping<string, GenerateReply> group in replies.GroupBy(reply => reply.RequestId))
            {
                List<SampleChunk> samples = Calls.Join(group);
                Assert.Equal(2, samples.Count);
                Assert.All(samples, sample => Assert.Equal(FinishReason.Error, sample.FinishReason));
                Assert.All(samples, sample => Assert.NotEmpty(sample.Ids));
                Assert.All(group.SelectMany(reply => reply.Samples).Where(chunk => chunk.FinishReason == FinishReason.Error),
                    chunk => Assert.Contains("device lost", chunk.Error, StringComparison.Ordinal));
            }

            Assert.Equal(stream == call.ResponseStream ? ["alone"] : ["first", "second"],
                replies.Select(reply => reply.RequestId).Distinct().Order());
        }

        while (!server.Log.Lines.Any(line => line.Event == 5)) await Task.Delay(20, new CancellationTokenSource(30_000).Token);
        Assert.Contains("device lost", server.Log.Lines.Single(line => line.Event == 5).Text, StringComparison.Ordinal);
        Assert.DoesNotContain(server.Log.Lines, line => line.Event == 103); // no unexpected error
    }

    [Fact]
    public async Task Status_says_what_the_engine_says()
    {
        await using HeldServer server = await HeldServer.StartAsync();
        uint[] prompt = [.. Enumerable.Range(0, 40).Select(i => (uint)i + 3)];
        await server.SamplesAsync(Calls.Greedy(prompt, 3));
        Task<List<SampleChunk>> begun = await server.BeginAndPauseAsync(Calls.Sampled([.. prompt, 9], 100, seed: 1, n: 2));
        Task<List<SampleChunk>> waits = server.SamplesAsync(Calls.Sampled(prompt, 100, seed: 1, n: 3));
        StatusReply status = await server.StatusAsync(status => status.Waiting > 0);
        EngineStatus said = server.Engine.Status;
        // Each has a different value, so that swapped fields are detected.
        long[] numbers = [said.Running, said.Waiting, said.KvBlocksTotal, said.KvBlocksUsed, said.KvBlocksCached, said.Steps,
            said.GeneratedTokens, said.PrefixHitTokens];
        Assert.Equal(numbers, numbers.Distinct());
        Assert.Equal((2u, 3u), (status.Running, status.Waiting));
        Assert.Equal(((ulong)said.KvBlocksTotal, (ulong)said.KvBlocksUsed, (ulong)said.KvBlocksCached),
            (status.KvBlocksTotal, status.KvBlocksUsed, status.KvBlocksCached));
        Assert.Equal(((ulong)said.Steps, (ulong)said.GeneratedTokens, (ulong)said.PrefilledTokens, (ulong)said.PrefixHitTokens),
            (status.Steps, status.GeneratedTokens, status.PrefilledTokens, status.PrefixHitTokens));
        Assert.Equal((EngineState.Paused, "test", "qwen3", "scripted"), (status.State, status.Reason, status.Model, status.Backend));
        await server.Control.ResumeAsync(new ResumeRequest());
        await Task.WhenAll(begun, waits);
    }

    [Fact]
    public async Task Pauses_wait_abort_or_keep_as_asked_and_count_what_they_end()
    {
        await using HeldServer server = await HeldServer.StartAsync();
        GenerateRequest request = Calls.Sampled(s_prompt, 60, seed: 3, n: 2);
        Task<List<SampleChunk>> begun = await server.BeginAndPauseAsync(request);
        Task<List<SampleChunk>> waits = server.SamplesAsync(Calls.Sampled(s_prompt, 60, seed: 3, n: 3));
        await server.StatusAsync(status => status.Waiting == 3);
        PauseReply kept = await server.Control.PauseAsync(new PauseRequest { Mode = V1.PauseMode.Keep, LeaseMilliseconds = 60_000 });
        Assert.Equal((EngineState.Paused, 0u), (kept.State, kept.AbortedSamples));
        PauseReply aborted = await server.Control.PauseAsync(new PauseRequest { Mode = V1.PauseMode.Abort, LeaseMilliseconds = 60_000 });
        Assert.Equal((EngineState.Paused, 5u), (aborted.State, aborted.AbortedSamples));
        Assert.All([.. await begun, .. await waits], sample => Assert.Equal(FinishReason.Abort, sample.FinishReason));
        await server.Control.ResumeAsync(new ResumeRequest());

        // The reply to WAIT comes when the groups that had begun have ended; the others begin after the pause.
        using AsyncServerStreamingCall<GenerateReply> call = server.Rollout.Generate(
            Calls.Sampled(s_prompt, 300, seed: 3, n: 4, change: r => r.Stream = true), deadline: Calls.Deadline());
        Assert.True(await call.ResponseStream.MoveNext(default));
        List<GenerateReply> replies = [call.ResponseStream.Current];
        PauseReply waited = await server.Control.PauseAsync(
            new PauseRequest { Mode = V1.PauseMode.Wait, LeaseMilliseconds = 60_000 }, deadline: Calls.Deadline());
        Assert.Equal((EngineState.Paused, 0u), (waited.State, waited.AbortedSamples));
        replies.AddRange(await call.ResponseStream.ReadAllAsync().ToListAsync());
        Assert.All(Calls.Join(replies), sample => Assert.Equal((FinishReason.Length, 300), (sample.FinishReason, sample.Ids.Count)));
    }

    private static async Task ToStateAsync(HeldServer server, EngineState state)
    {
        switch (state)
        {
            case EngineState.Sleeping:
                await server.Control.SleepAsync(new SleepRequest { Tags = { MemoryTag.Weights } });
                break;
            case EngineState.Poisoned:
                UpdateRequest begin = s_payload.Begin(0, 1, b => b.Mode = V1.UpdateMode.InPlace);
                UpdateRequest abort = new() { Abort = new AbortUpdate() };
                Assert.True((await server.UpdateAsync([begin, s_payload.Chunks(1000).First(), abort]))[^1].Aborted.Poisoned);
                break;
            case EngineState.Faulted:
                server.Device.StepsLeft = 0;
                await Calls.FailsAsync(() => server.SamplesAsync(Calls.Greedy(s_prompt, 2)), StatusCode.Unavailable);
                break;
        }
    }

    private static async Task AnswersAsync(StatusCode code, Func<Task> call)
    {
        if (code == StatusCode.OK) await call();
        else await Calls.FailsAsync(call, code);
    }

    /// <param name="server">The server.</param>
    /// <param name="expected">S where it serves: the whole, generation, weights. Control always does.</param>
    private static async Task HealthAsync(HeldServer server, string expected)
    {
        string heard = "";
        foreach (string service in (string[])["", Generation, Weights, Control])
        {
            HealthCheckResponse health = await server.Health.CheckAsync(
                new HealthCheckRequest { Service = service }, deadline: Calls.Deadline());
            heard += health.Status == ServingStatus.Serving ? 'S' : '.';
        }

        Assert.Equal($"{expected}S", heard);
    }
}
