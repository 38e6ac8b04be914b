using System.Net.Sockets;
using Grpc.Core;
using Xunit;
using static Rollout.Client.Tests.GroupAssemblyTests;

namespace Rollout.Client.Tests;

/// <summary>Every call, with its answer lost before the call arrived, after it was carried out, half-way, or never sent.</summary>
public sealed class LostAnswerTests : FakeSidecarTests
{
    private static readonly int[] s_prompt = [1, 2, 3];
    private static readonly GenerateOptions s_two = new() { N = 2 };

    private static readonly Dictionary<string, Func<RolloutClient, TimeSpan?, CancellationToken, Task>> s_calls = new()
    {
        ["Status"] = (client, timeout, token) => client.StatusAsync(timeout, token),
        ["Pause"] = (client, timeout, token) => client.PauseAsync(PauseMode.Wait, "me", TimeSpan.FromSeconds(9), timeout, token),
        ["Resume"] = (client, timeout, token) => client.ResumeAsync(timeout, token),
        ["Sleep"] = (client, timeout, token) => client.SleepAsync(MemoryTags.All, timeout: timeout, cancellationToken: token),
        ["WakeUp"] = (client, timeout, token) => client.WakeUpAsync(MemoryTags.All, timeout, token),
        ["Describe"] = (client, timeout, token) => client.DescribeWeightsAsync(timeout, token),
        ["Score"] = (client, timeout, token) => client.ScoreAsync(s_prompt, timeout: timeout, cancellationToken: token),
        ["Abort"] = (client, timeout, token) => client.AbortAllAsync(timeout, token),
        ["Generate"] = (client, timeout, token) => client.GenerateAsync(s_prompt, s_two, timeout, token).CountAsync(token).AsTask(),
        ["Stream"] = (client, timeout, token) => client.StreamAsync(s_prompt, s_two, timeout, token).CountAsync(token).AsTask(),
        ["GenerateBatch"] = (client, timeout, token) =>
            client.GenerateBatchAsync([new RolloutRequest(s_prompt, s_two)], null, timeout, token).CountAsync(token).AsTask(),
        ["GenerateGroups"] = (client, timeout, token) =>
            client.GenerateGroupsAsync([new RolloutRequest(s_prompt, s_two)], null, timeout, token).CountAsync(token).AsTask(),
    };

    public static TheoryData<string> Calls => [.. s_calls.Keys];

    public static TheoryData<string> Streams => ["Generate", "Stream", "GenerateBatch"];

    public override async ValueTask InitializeAsync()
    {
        await base.InitializeAsync();
        Fake.Pause = _ => new V1.PauseReply { State = V1.EngineState.Paused };
        Fake.Resume = _ => new V1.ResumeReply { State = V1.EngineState.Running };
        Fake.Sleep = _ => new V1.SleepReply { State = V1.EngineState.Sleeping };
        Fake.WakeUp = _ => new V1.WakeUpReply { State = V1.EngineState.Running };
        Fake.Score = request => new V1.ScoreReply { Ids = { request.Ids.Ids } };
        Fake.Abort = _ => new V1.AbortReply();
        Answer((_, _) => Task.CompletedTask);
    }

    [Theory, MemberData(nameof(Calls))]
    public async Task A_request_that_never_arrived_is_unavailable(string call)
    {
        string path = Path.Combine(Path.GetTempPath(), $"deaf-{Guid.NewGuid():n}.sock");
        using Socket listener = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        listener.Bind(new UnixDomainSocketEndPoint(path));
        listener.Listen();
        using CancellationTokenSource stop = new();
        Task deaf = CloseAllAsync();
        await using (RolloutClient client = RolloutClient.Connect($"unix:{path}"))
        {
            RolloutUnavailableException error = await Assert.ThrowsAsync<RolloutUnavailableException>(
                () => s_calls[call](client, null, Token).WaitAsync(Patience, Token));
            Assert.Equal(StatusCode.Unavailable, error.StatusCode);
        }

        await stop.CancelAsync();
        await Assert.ThrowsAnyAsync<OperationCanceledException>(() => deaf);
        File.Delete(path);

        async Task CloseAllAsync()
        {
            while (true)
            {
                using Socket accepted = await listener.AcceptAsync(stop.Token);
                await accepted.ReceiveAsync(new byte[100], stop.Token);
            }
        }
    }

    [Theory, MemberData(nameof(Calls))]
    public async Task A_request_that_arrived_is_not_sent_twice_when_its_answer_is_lost(string call)
    {
        Fake.Arrived = CutAsync;
        await UnavailableAsync(call, 1);
        Fake.Arrived = null;
        await s_calls[call](Client, null, Token); // over another connection

        Fake.Done = CutAsync;
        Answer((_, context) => CutAsync(context));
        await UnavailableAsync(call, 3);

        // A failure reported by the sidecar must not be retried either.
        Answer((_, _) => Task.CompletedTask);
        Fake.Done = null;
        Fake.Arrived = _ => throw new RpcException(new Status(StatusCode.Unavailable, "the engine has failed"));
        Assert.Contains("the engine has failed", (await UnavailableAsync(call, 4)).Message);
    }

    [Theory, MemberData(nameof(Streams))]
    public async Task A_stream_that_is_cut_after_the_first_sample_hands_that_out_and_then_says_so(string call)
    {
        TaskCompletionSource received = new();
        Answer(async (index, context) =>
        {
            if (index == 0)
                return;
            await received.Task;
            FakeSidecar.Cut(context);
        });
        IAsyncEnumerable<int> samples = call switch
        {
            "Generate" => Client.GenerateAsync(s_prompt, s_two, cancellationToken: Token).Select(sample => sample.Index),
            "Stream" => Client.StreamAsync(s_prompt, s_two, cancellationToken: Token).Select(chunk => chunk.Index),
            _ => Client.GenerateBatchAsync([new RolloutRequest(s_prompt, s_two)], cancellationToken: Token).Select(sample => sample.Index),
        };
        List<int> indexes = [];
        await Assert.ThrowsAsync<RolloutUnavailableException>(async () =>
        {
            await foreach (int index in samples)
            {
                indexes.Add(index);
                received.TrySetResult();
            }
        });
        Assert.Equal([0], indexes);
        Assert.Equal(1, Fake.Calls.Values.Sum());
    }

    [Fact]
    public async Task An_answer_that_does_not_come_is_a_timeout_and_the_sidecar_is_told()
    {
        (Task arrived, Task ended) = HangAll();
        await Task.WhenAll(s_calls.Select(async call =>
        {
            Exception error = (await Record.ExceptionAsync(
                () => call.Value(Client, TimeSpan.FromSeconds(2), Token).WaitAsync(Patience, Token)))!;
            Assert.True(error is RolloutTimeoutException { StatusCode: StatusCode.DeadlineExceeded }, $"{call.Key}: {error}");
        }));
        await arrived.WaitAsync(Patience, Token);
        await ended.WaitAsync(Patience, Token);
    }

    /// <summary>Both sides watch the deadline. A sidecar that sees it pass first breaks the call: a timeout all the same.</summary>
    [Theory]
    [InlineData(StatusCode.Cancelled)]
    [InlineData(StatusCode.Unavailable)]
    public async Task A_call_that_is_broken_at_its_deadline_is_a_timeout(StatusCode code)
    {
        Fake.Arrived = async context =>
        {
            // If this comes late, the client has seen the deadline itself.
            while (context.Deadline - DateTime.UtcNow > TimeSpan.FromMilliseconds(12))
                await Task.Delay(1);
            throw new RpcException(new Status(code, "the stream was broken"));
        };
        for (int i = 0; i < 4; i++)
            await Assert.ThrowsAsync<RolloutTimeoutException>(() => Client.StatusAsync(TimeSpan.FromSeconds(0.2), Token));
    }

    [Fact]
    public async Task A_cancelled_wait_says_it_was_cancelled_and_the_sidecar_is_told()
    {
        (Task arrived, Task ended) = HangAll();
        using CancellationTokenSource cancel = new();
        Task all = Task.WhenAll(s_calls.Select(async call =>
        {
            Exception error = (await Record.ExceptionAsync(() => call.Value(Client, null, cancel.Token).WaitAsync(Patience, Token)))!;
            Assert.True(error is OperationCanceledException, $"{call.Key}: {error}");
        }));
        await arrived.WaitAsync(Patience, Token);
        await cancel.CancelAsync();
        await all;
        await ended.WaitAsync(Patience, Token);
    }

    [Fact]
    public async Task Closing_the_client_ends_every_call_that_waits()
    {
        (Task arrived, _) = HangAll();
        Task all = Task.WhenAll(s_calls.Select(async call =>
        {
            Exception error = (await Record.ExceptionAsync(() => call.Value(Client, null, Token).WaitAsync(Patience, Token)))!;
            Assert.True(error is (RolloutException and not RolloutTimeoutException) or OperationCanceledException, $"{call.Key}: {error}");
        }));
        await arrived.WaitAsync(Patience, Token);
        await Client.DisposeAsync();
        await all;
    }

    [Fact]
    public async Task A_restarted_sidecar_is_found_again_by_the_same_client()
    {
        await Client.StatusAsync(cancellationToken: Token);
        await Fake.DieAsync();
        await Assert.ThrowsAsync<RolloutUnavailableException>(() => Client.StatusAsync(cancellationToken: Token));
        File.Delete(Fake.Socket);
        await Fake.ListenAsync();
        await Client.WaitUntilReadyAsync(Patience, Token);
        await Client.StatusAsync(cancellationToken: Token);
    }

    private static TimeSpan Patience => TimeSpan.FromSeconds(60);

    private async Task<RolloutUnavailableException> UnavailableAsync(string call, int called)
    {
        RolloutUnavailableException error = await Assert.ThrowsAsync<RolloutUnavailableException>(
            () => s_calls[call](Client, null, Token).WaitAsync(Patience, Token));
        Assert.Equal(called, Assert.Single(Fake.Calls).Value);
        return error;
    }

    /// <summary>No call is answered. Completes when every call has arrived and the sidecar has seen all of them cancelled.</summary>
    private (Task Arrived, Task Ended) HangAll()
    {
        (TaskCompletionSource arrived, TaskCompletionSource ended) = (new(), new());
        (int coming, int going) = (s_calls.Count, s_calls.Count);
        Fake.Arrived = context =>
        {
            context.CancellationToken.Register(() =>
            {
                if (Interlocked.Decrement(ref going) == 0)
                    ended.TrySetResult();
            });
            if (Interlocked.Decrement(ref coming) == 0)
                arrived.TrySetResult();
            return FakeSidecar.HangAsync(context);
        };
        return (arrived.Task, ended.Task);
    }

    private static Task CutAsync(ServerCallContext context)
    {
        FakeSidecar.Cut(context);
        return Task.CompletedTask;
    }

    /// <summary>Answers generate calls with two samples; before each runs what is given, with its index.</summary>
    private void Answer(Func<int, ServerCallContext, Task> before)
    {
        Fake.Generate = (request, replies, context) => SamplesAsync(request.RequestId, replies, context);
        Fake.Batch = async (requests, replies, context) =>
        {
            while (await requests.MoveNext())
                await SamplesAsync(requests.Current.RequestId, replies, context);
        };

        async Task SamplesAsync(string requestId, IServerStreamWriter<V1.GenerateReply> replies, ServerCallContext context)
        {
            for (int i = 0; i < 2; i++)
            {
                await before(i, context);
                V1.GenerateReply reply = Reply(Chunk((uint)i, 0, [5], 7, V1.FinishReason.Stop));
                reply.RequestId = requestId;
                await replies.WriteAsync(reply);
            }
        }
    }
}
