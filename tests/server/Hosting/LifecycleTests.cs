using Grpc.Core;
using Grpc.Health.V1;
using Grpc.Net.Client;
using Grpc.Reflection.V1Alpha;
using Rollout.Server.Commands;
using Rollout.V1;

namespace Rollout.Server.Tests;

/// <summary>Aborts, cancellation, deadlines and pauses, on a server of their own.</summary>
public sealed class LifecycleTests : IAsyncLifetime
{
    private static readonly uint[] s_prompt = Golden.Cases("qwen3")[1].Prompt;

    private ServerProcess _server = null!;

    // Few seats and many samples: a long group takes seconds on any machine.
    public async ValueTask InitializeAsync() => _server = await ServerProcess.StartAsync("qwen3", "--max-sequences", "4");

    public ValueTask DisposeAsync() => _server.DisposeAsync();

    [Fact]
    public async Task Abort_returns_the_partial_tokens_of_every_sample()
    {
        using AsyncServerStreamingCall<GenerateReply> call = await BeginLongAsync("a");
        using AsyncServerStreamingCall<GenerateReply> other = _server.Rollout.Generate(Long("b"), deadline: Calls.Deadline());
        for (int i = 0; i < 500 && (await _server.Control.StatusAsync(new StatusRequest())).Waiting < LongN; i++) await Task.Delay(5);
        AbortReply counts = await _server.Rollout.AbortAsync(new AbortRequest { All = true });
        Assert.Equal(2u, counts.Groups);
        Assert.InRange(counts.Samples, 1u, 2 * LongN);
        foreach (AsyncServerStreamingCall<GenerateReply> each in (AsyncServerStreamingCall<GenerateReply>[])[call, other])
        {
            List<SampleChunk> samples = Calls.Join([.. each == call ? [each.ResponseStream.Current] : (GenerateReply[])[],
                .. await each.ResponseStream.ReadAllAsync().ToListAsync()]);
            Assert.Equal(LongN, (uint)samples.Count);
            Assert.Equal(FinishReason.Abort, samples[^1].FinishReason);
            if (each == call) Assert.Contains(samples, sample => sample.Ids.Count > 0);
            Assert.All(samples, sample => Assert.Equal(sample.Ids.Count, sample.Logprobs.Count));
            Assert.All(samples, sample => Assert.NotEqual(FinishReason.Unspecified, sample.FinishReason));
        }

        await IdleAsync();
    }

    [Fact]
    public async Task Cancelled_calls_and_passed_deadlines_leave_nothing_running()
    {
        using (AsyncServerStreamingCall<GenerateReply> call = await BeginLongAsync("cancelled")) Assert.NotNull(call);
        await IdleAsync();

        using AsyncServerStreamingCall<GenerateReply> late = _server.Rollout.Generate(Long("late"), deadline: Calls.Deadline(0.2));
        RpcException passed = await Assert.ThrowsAsync<RpcException>(() => late.ResponseStream.ReadAllAsync().ToListAsync().AsTask());
        // Depends on which side sees the deadline pass first: the client reports it, the server resets the stream.
        Assert.Contains(passed.StatusCode, (StatusCode[])[StatusCode.DeadlineExceeded, StatusCode.Unavailable, StatusCode.Cancelled]);
        await IdleAsync();

        using AsyncDuplexStreamingCall<GenerateRequest, GenerateReply> batch = _server.Rollout.GenerateBatch();
        for (int i = 0; i < 10; i++) await batch.RequestStream.WriteAsync(Long($"batch-{i}"));
        Assert.True(await batch.ResponseStream.MoveNext(default));
        batch.Dispose();
        await IdleAsync();

        // The ids are free again, and the engine is healthy.
        using AsyncServerStreamingCall<GenerateReply> again = await BeginLongAsync("cancelled");
    }

    [Fact]
    public async Task A_reader_that_does_not_read_holds_up_nobody()
    {
        using AsyncServerStreamingCall<GenerateReply> slow = _server.Rollout.Generate(Long("slow"), deadline: Calls.Deadline());
        using AsyncDuplexStreamingCall<GenerateRequest, GenerateReply> batch = _server.Rollout.GenerateBatch(deadline: Calls.Deadline());
        for (int i = 0; i < 100; i++)
            await batch.RequestStream.WriteAsync(Calls.Sampled(s_prompt, 4, 1, change: r => r.RequestId = $"unread-{i}"));
        Assert.Equal(4, (await _server.SamplesAsync(Calls.Greedy(s_prompt, 4)))[0].Ids.Count);
        await batch.RequestStream.CompleteAsync();
        Assert.Equal(100, (await batch.ResponseStream.ReadAllAsync().ToListAsync()).Count);
    }

    [Fact]
    public async Task A_pause_freezes_and_resume_or_its_lease_ends_it()
    {
        List<SampleChunk> expected = await _server.SamplesAsync(Calls.Greedy(s_prompt, 8));
        PauseReply paused = await _server.Control.PauseAsync(
            new PauseRequest { Mode = PauseMode.Keep, Owner = "trainer", LeaseMilliseconds = 60_000 });
        Assert.Equal(EngineState.Paused, paused.State);
        Task<List<SampleChunk>> frozen = _server.SamplesAsync(Calls.Greedy(s_prompt, 8));
        await Task.Delay(100);
        Assert.False(frozen.IsCompleted);
        StatusReply status = await _server.Control.StatusAsync(new StatusRequest(), deadline: Calls.Deadline(5));
        Assert.Equal(EngineState.Paused, status.State);
        Assert.Equal("trainer", status.Reason);
        Assert.Equal(EngineState.Running, (await _server.Control.ResumeAsync(new ResumeRequest())).State);
        Assert.Equal(expected[0].Ids, (await frozen)[0].Ids);
        Assert.Equal(EngineState.Running, (await _server.Control.ResumeAsync(new ResumeRequest())).State); // idempotent

        await _server.Control.PauseAsync(new PauseRequest { Mode = PauseMode.Abort, Owner = "dies", LeaseMilliseconds = 150 });
        Assert.Equal(expected[0].Ids, (await _server.SamplesAsync(Calls.Greedy(s_prompt, 8)))[0].Ids);
    }

    [Fact]
    public async Task Status_health_and_reflection_answer()
    {
        StatusReply status = await _server.Control.StatusAsync(new StatusRequest());
        Assert.Equal(EngineState.Running, status.State);
        Assert.Equal("qwen3", status.Model);
        Assert.Equal(320u, status.VocabSize);
        Assert.Equal(512u, status.MaxContext);
        foreach (string service in (string[])["", "rollout.v1.RolloutService", "rollout.v1.WeightsService", "rollout.v1.ControlService"])
        {
            HealthCheckResponse health = await _server.Health.CheckAsync(new HealthCheckRequest { Service = service });
            Assert.Equal(HealthCheckResponse.Types.ServingStatus.Serving, health.Status);
        }

        ServerReflection.ServerReflectionClient reflection = new(_server.Channel);
        using AsyncDuplexStreamingCall<ServerReflectionRequest, ServerReflectionResponse> call =
            reflection.ServerReflectionInfo(deadline: Calls.Deadline());
        await call.RequestStream.WriteAsync(new ServerReflectionRequest { ListServices = "" });
        Assert.True(await call.ResponseStream.MoveNext(default));
        Assert.Contains(call.ResponseStream.Current.ListServicesResponse.Service, s => s.Name == "rollout.v1.WeightsService");
        await call.RequestStream.CompleteAsync();
    }

    private const uint LongN = 64;

    private static GenerateRequest Long(string id) => Calls.Sampled(s_prompt, 490, seed: 5, n: LongN, change: r =>
    {
        r.RequestId = id;
        r.Stream = true;
    });

    /// <summary>A group that has begun, with seconds still to go.</summary>
    private async Task<AsyncServerStreamingCall<GenerateReply>> BeginLongAsync(string id)
    {
        AsyncServerStreamingCall<GenerateReply> call = _server.Rollout.Generate(Long(id), deadline: Calls.Deadline());
        Assert.True(await call.ResponseStream.MoveNext(default));
        return call;
    }

    private async Task IdleAsync()
    {
        for (int i = 0; i < 200; i++)
        {
            StatusReply status = await _server.Control.StatusAsync(new StatusRequest());
            if (status.Running + status.Waiting == 0 && status.KvBlocksUsed == 0) return;
            await Task.Delay(20);
        }

        Assert.Fail("samples of a client that has gone are still running");
    }
}
