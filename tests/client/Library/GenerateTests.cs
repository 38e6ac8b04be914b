using Grpc.Core;
using Grpc.Health.V1;
using Xunit;
using static Rollout.Client.Tests.GroupAssemblyTests;

namespace Rollout.Client.Tests;

public sealed class GenerateTests : FakeSidecarTests
{
    private static readonly int[] s_prompt = [1, 2, 3];

    [Fact]
    public async Task Samples_come_as_they_end()
    {
        TaskCompletionSource second = new();
        Fake.Generate = async (request, replies, _) =>
        {
            Assert.False(request.Stream);
            await replies.WriteAsync(Reply(Chunk(1, 0, [5], 7, V1.FinishReason.Stop)));
            await second.Task;
            await replies.WriteAsync(Reply(Chunk(0, 0, [6, 7], 7, V1.FinishReason.Length)));
        };
        List<int> indexes = [];
        await foreach (Sample sample in Client.GenerateAsync(s_prompt, new GenerateOptions { N = 2 }, cancellationToken: Token))
        {
            indexes.Add(sample.Index);
            second.TrySetResult();
        }

        Assert.Equal([1, 0], indexes);
    }

    [Fact]
    public async Task Streaming_yields_every_chunk()
    {
        Fake.Generate = async (request, replies, _) =>
        {
            Assert.True(request.Stream);
            await replies.WriteAsync(Reply(Chunk(0, 0, [5], 7)));
            await replies.WriteAsync(Reply(Chunk(0, 1, [6], 7, V1.FinishReason.Stop)));
        };
        List<SampleChunk> chunks = await Client.StreamAsync(s_prompt, cancellationToken: Token).ToListAsync(Token);
        Assert.Equal([0, 1], chunks.Select(chunk => chunk.Start));
        Assert.Equal([null, FinishReason.Stop], chunks.Select(chunk => chunk.FinishReason));
    }

    [Theory]
    [InlineData(StatusCode.InvalidArgument, typeof(RolloutRequestException))]
    [InlineData(StatusCode.ResourceExhausted, typeof(RolloutBusyException))]
    [InlineData(StatusCode.FailedPrecondition, typeof(RolloutStateException))]
    [InlineData(StatusCode.Unavailable, typeof(RolloutUnavailableException))]
    [InlineData(StatusCode.Internal, typeof(RolloutException))]
    public async Task Statuses_are_typed_and_keep_the_message(StatusCode code, Type type)
    {
        Fake.Generate = (_, _, _) => throw new RpcException(new Status(code, "n: must be at least 1; top_p: is NaN"));
        RolloutRequest request = new(s_prompt) { RequestId = "mine" };
        RolloutException error = await Assert.ThrowsAnyAsync<RolloutException>(async () =>
            await Client.GenerateAsync(request, null, Token).CountAsync(Token));
        Assert.IsType(type, error);
        Assert.Equal(("mine", code), (error.RequestId, error.StatusCode));
        Assert.Contains("n: must be at least 1; top_p: is NaN", error.Message);
    }

    [Fact]
    public async Task A_timeout_is_the_servers_deadline_too()
    {
        TaskCompletionSource<DateTime> deadline = new();
        Fake.Generate = async (_, _, context) =>
        {
            deadline.TrySetResult(context.Deadline);
            await Task.Delay(Timeout.Infinite, context.CancellationToken);
        };
        await Assert.ThrowsAsync<RolloutTimeoutException>(async () =>
            await Client.GenerateAsync(s_prompt, timeout: TimeSpan.FromSeconds(1), cancellationToken: Token).CountAsync(Token));
        Assert.InRange(await deadline.Task.WaitAsync(TimeSpan.FromSeconds(20), Token), DateTime.UtcNow.AddSeconds(-30),
            DateTime.UtcNow.AddSeconds(5)); // sent as remaining time, so the two clocks differ by the transfer time
    }

    [Fact]
    public async Task Cancelling_and_leaving_early_end_the_servers_call()
    {
        foreach (bool leave in (bool[])[false, true])
        {
            TaskCompletionSource ended = new();
            Fake.Generate = async (_, replies, context) =>
            {
                await replies.WriteAsync(Reply(Chunk(0, 0, [5], 7, V1.FinishReason.Stop)));
                context.CancellationToken.Register(ended.SetResult);
                await ended.Task;
            };
            using CancellationTokenSource cancel = new();
            Task read = Task.Run(
                async () =>
                {
                    await foreach (Sample _ in Client.GenerateAsync(s_prompt, new GenerateOptions { N = 2 }, null, cancel.Token))
                    {
                        if (leave)
                            break;
                        cancel.Cancel();
                    }
                },
                Token);
            if (leave)
                await read;
            else
                await Assert.ThrowsAnyAsync<OperationCanceledException>(() => read);
            await ended.Task.WaitAsync(TimeSpan.FromSeconds(20), Token);
        }
    }

    [Fact]
    public async Task A_stream_that_ends_before_its_samples_is_an_error()
    {
        Fake.Generate = (_, replies, _) => replies.WriteAsync(Reply(Chunk(0, 0, [5], 7, V1.FinishReason.Stop)));
        await Assert.ThrowsAsync<RolloutException>(async () =>
            await Client.GenerateAsync(s_prompt, new GenerateOptions { N = 2 }, cancellationToken: Token).CountAsync(Token));
    }

    [Fact]
    public async Task Score_pause_and_abort_carry_their_fields()
    {
        Fake.Score = request => new V1.ScoreReply
        {
            Ids = { request.Ids.Ids },
            Logprobs = { -1, -2 },
            Top = new V1.TopLogprobs { K = request.Top, Ids = { 1, 2, 3, 4, 5, 6 }, Logprobs = { 1, 2, 3, 4, 5, 6 } },
            Version = 9,
        };
        ScoreResult score = await Client.ScoreAsync(s_prompt, top: 2, cancellationToken: Token);
        Assert.Equal(s_prompt, score.Ids);
        Assert.Equal((2, 3, 9UL), (score.LogProbs.Length, score.Top!.Rows, score.Version));

        Fake.Pause = request =>
        {
            Assert.Equal(new V1.PauseRequest { Mode = V1.PauseMode.Abort, Owner = "me", LeaseMilliseconds = 1500 }, request);
            return new V1.PauseReply { State = V1.EngineState.Paused, AbortedSamples = 3 };
        };
        Assert.Equal(
            new PauseResult(EngineState.Paused, 3),
            await Client.PauseAsync(PauseMode.Abort, "me", TimeSpan.FromSeconds(1.5), cancellationToken: Token));

        Fake.Abort = request => new V1.AbortReply { Groups = request.All ? 2u : 0, Unknown = { request.Ids?.Ids ?? [] } };
        Assert.Equal(2, (await Client.AbortAllAsync(cancellationToken: Token)).Groups);
        Assert.Equal(["a", "b"], (await Client.AbortAsync(["a", "b"], cancellationToken: Token)).Unknown);
    }

    [Fact]
    public async Task Waiting_for_readiness_names_the_last_answer()
    {
        await Client.WaitUntilReadyAsync(TimeSpan.FromSeconds(20), Token);
        Fake.Health = HealthCheckResponse.Types.ServingStatus.NotServing;
        RolloutTimeoutException error = await Assert.ThrowsAsync<RolloutTimeoutException>(
            () => Client.WaitUntilReadyAsync(TimeSpan.FromSeconds(0.3), Token));
        Assert.Contains("NotServing", error.Message);
        Assert.Contains(Fake.Address, error.Message);

        await using RolloutClient absent = RolloutClient.Connect("unix:/tmp/no-such-rollout.sock");
        error = await Assert.ThrowsAsync<RolloutTimeoutException>(() => absent.WaitUntilReadyAsync(TimeSpan.FromSeconds(0.3), Token));
        Assert.Contains("Unavailable", error.Message);
        await Assert.ThrowsAsync<RolloutUnavailableException>(() => absent.StatusAsync(cancellationToken: Token));
    }

    [Fact]
    public async Task A_sidecar_that_starts_late_is_waited_for()
    {
        await using FakeSidecar late = new();
        await using RolloutClient client = RolloutClient.Connect(late.Address);
        Task ready = client.WaitUntilReadyAsync(TimeSpan.FromSeconds(30), Token);
        await Task.Delay(200, Token);
        Assert.False(ready.IsCompleted);
        await late.ListenAsync();
        await ready;
    }
}
