using Google.Protobuf;
using Grpc.Core;
using Rollout.V1;
using Batch = Grpc.Core.AsyncDuplexStreamingCall<Rollout.V1.GenerateRequest, Rollout.V1.GenerateReply>;

namespace Rollout.Server.Tests;

/// <summary>Many groups on one call do not wait for, affect or mix with each other.</summary>
public sealed class BatchTests
{
    private static readonly uint[] s_prompt = Golden.Cases("qwen3")[1].Prompt;

    [Fact]
    public async Task Every_reply_is_sent_without_waiting_for_the_next()
    {
        await using HeldServer server = await HeldServer.StartAsync();
        using Batch batch = server.Rollout.GenerateBatch(deadline: Calls.Deadline());
        for (int i = 0; i < 20; i++)
        {
            bool refused = i % 5 == 4;
            await batch.RequestStream.WriteAsync(Calls.Greedy(refused ? [999] : s_prompt, 2, r => r.RequestId = $"{i}"));
            Assert.True(await batch.ResponseStream.MoveNext(default));
            Assert.Equal(($"{i}", refused), (batch.ResponseStream.Current.RequestId, batch.ResponseStream.Current.Refused is not null));
        }

        await batch.RequestStream.CompleteAsync();
        Assert.False(await batch.ResponseStream.MoveNext(default));
    }

    [Fact]
    public async Task Groups_that_end_in_any_order_or_beside_refused_ones_have_what_they_have_alone()
    {
        await using HeldServer server = await HeldServer.StartAsync(HeldServer.Small with { MaxWaiting = 4 });
        GenerateRequest Request(string id, uint tokens, uint n)
            => Calls.Sampled(s_prompt, tokens, seed: 7, n, r => (r.RequestId, r.Stream) = (id, n == 2));
        GenerateRequest[] requests = [Request("long", 80, 1), Request("short", 5, 2), Request("middle", 40, 3)];
        Dictionary<string, List<SampleChunk>> alone = [];
        foreach (GenerateRequest request in requests) alone[request.RequestId] = await server.SamplesAsync(request);

        Task<List<SampleChunk>> held = await server.BeginAndPauseAsync(Calls.Sampled(s_prompt, 200, seed: 1));
        using Batch batch = server.Rollout.GenerateBatch(deadline: Calls.Deadline());
        foreach (GenerateRequest request in requests) await batch.RequestStream.WriteAsync(request);
        await batch.RequestStream.WriteAsync(Request("aborted", 60, 1));
        await server.StatusAsync(status => status.Running + status.Waiting == 8); // no room for more
        await batch.RequestStream.WriteAsync(Request("no room", 5, 1));
        await batch.RequestStream.WriteAsync(Request("long", 5, 1));              // in flight
        await batch.RequestStream.WriteAsync(Request("from the future", 5, 0).With(r => r.MergeFrom([0x98, 0x06, 0x01])));
        List<GenerateReply> replies = [];
        async Task NextAsync()
        {
            Assert.True(await batch.ResponseStream.MoveNext(default));
            replies.Add(batch.ResponseStream.Current);
        }

        for (int i = 0; i < 3; i++) await NextAsync();
        Assert.Equal([("no room", 8), ("long", 3), ("from the future", 3)], replies.Select(reply => (reply.RequestId, reply.Refused.Code)));
        AbortReply aborted = await server.Rollout.AbortAsync(new AbortRequest { Ids = new RequestIds { Ids = { "aborted" } } });
        Assert.Equal((1u, 1u), (aborted.Groups, aborted.Samples));
        await NextAsync(); // while the others wait
        Assert.Equal(("aborted", FinishReason.Abort), (replies[3].RequestId, replies[3].Samples[0].FinishReason));

        await server.Control.ResumeAsync(new ResumeRequest());
        await batch.RequestStream.CompleteAsync();
        while (await batch.ResponseStream.MoveNext(default)) replies.Add(batch.ResponseStream.Current);
        foreach (GenerateRequest request in requests)
        {
            List<SampleChunk> batched = Calls.Join(replies.Where(reply => reply.RequestId == request.RequestId && reply.Refused is null));
            Assert.Equal(alone[request.RequestId].Select(s => (s.Index, s.FinishReason)), batched.Select(s => (s.Index, s.FinishReason)));
            Assert.Equal(alone[request.RequestId].Select(s => s.Ids), batched.Select(s => s.Ids));
            Assert.Equal(alone[request.RequestId].Select(s => s.Logprobs), batched.Select(s => s.Logprobs));
        }

        string[] ends = [.. replies.Where(reply => reply.Samples.Any(sample => sample.FinishReason == FinishReason.Length))
            .Select(reply => reply.RequestId)];
        Assert.True(Array.IndexOf(ends, "short") < Array.IndexOf(ends, "long"), string.Join(", ", ends));
        await held;

        // Refused requests can be sent again now, with the same ids.
        Assert.Single(await server.SamplesAsync(Request("no room", 5, 1)));
        Assert.Single(await server.SamplesAsync(Request("long", 5, 1)));
    }

    [Fact]
    public async Task A_call_without_room_is_told_to_send_less_and_a_cancelled_batch_makes_room()
    {
        await using HeldServer server = await HeldServer.StartAsync(HeldServer.Small with { MaxSequences = 2, MaxWaiting = 2 });
        Task<List<SampleChunk>> held = await server.BeginAndPauseAsync(Calls.Sampled(s_prompt, 50, seed: 1));
        Batch batch = server.Rollout.GenerateBatch(deadline: Calls.Deadline());
        await batch.RequestStream.WriteAsync(Calls.Sampled(s_prompt, 50, seed: 1, n: 2));
        await batch.RequestStream.WriteAsync(Calls.Sampled(s_prompt, 50, seed: 2));
        await server.StatusAsync(status => status.Running + status.Waiting == 4);
        await Calls.FailsAsync(() => server.SamplesAsync(Calls.Greedy(s_prompt, 2)), StatusCode.ResourceExhausted);
        await Calls.FailsAsync(() => server.Rollout.ScoreAsync(new ScoreRequest { Ids = new TokenIds { Ids = { 1, 2 } } }).ResponseAsync,
            StatusCode.ResourceExhausted);
        batch.Dispose();
        await server.StatusAsync(status => status.Running + status.Waiting == 1); // paused: nothing ends by itself
        Task<List<SampleChunk>> fits = server.SamplesAsync(Calls.Greedy(s_prompt, 2, r => r.N = 3));
        await server.Control.ResumeAsync(new ResumeRequest());
        Assert.Equal(3, (await fits).Count);
        Assert.Single(await held);
    }

    [Fact]
    public async Task A_score_that_is_aborted_is_an_error_and_one_that_nobody_waits_for_ends()
    {
        await using HeldServer server = await HeldServer.StartAsync();
        await server.Control.PauseAsync(new PauseRequest { Mode = PauseMode.Keep, LeaseMilliseconds = 60_000 });
        ScoreRequest request = new() { RequestId = "score", Ids = new TokenIds { Ids = { s_prompt } } };
        Task score = server.Rollout.ScoreAsync(request, deadline: Calls.Deadline()).ResponseAsync;
        await server.StatusAsync(status => status.Waiting == 1);
        await server.Rollout.AbortAsync(new AbortRequest { Ids = new RequestIds { Ids = { "score" } } });
        await Calls.FailsAsync(() => score, StatusCode.Aborted);

        using (AsyncUnaryCall<ScoreReply> call = server.Rollout.ScoreAsync(request, deadline: Calls.Deadline()))
            await server.StatusAsync(status => status.Waiting == 1);
        await server.StatusAsync(status => status.Waiting == 0);
        await server.Control.ResumeAsync(new ResumeRequest());
        Assert.Equal(s_prompt.Length - 1, (await server.Rollout.ScoreAsync(request, deadline: Calls.Deadline())).Logprobs.Count);
    }

    [Fact]
    public async Task A_field_of_a_newer_client_is_refused_in_every_call()
    {
        await using HeldServer server = await HeldServer.StartAsync();
        static T Newer<T>(T message)
            where T : IMessage<T> => message.With(m => m.MergeFrom(new byte[] { 0x98, 0x06, 0x01 }));
        Func<Task>[] calls =
        [
            () => server.SamplesAsync(Newer(Calls.Greedy(s_prompt, 1))),
            () => server.Rollout.ScoreAsync(Newer(new ScoreRequest { Ids = new TokenIds { Ids = { 1, 2 } } })).ResponseAsync,
            () => server.Rollout.AbortAsync(Newer(new AbortRequest { All = true })).ResponseAsync,
            () => server.Control.PauseAsync(Newer(new PauseRequest { Mode = PauseMode.Keep, LeaseMilliseconds = 1 })).ResponseAsync,
            () => server.Control.ResumeAsync(Newer(new ResumeRequest())).ResponseAsync,
            () => server.Control.SleepAsync(Newer(new SleepRequest())).ResponseAsync,
            () => server.Control.WakeUpAsync(Newer(new WakeUpRequest())).ResponseAsync,
            () => server.Control.StatusAsync(Newer(new StatusRequest())).ResponseAsync,
            () => server.Weights.DescribeAsync(Newer(new DescribeRequest())).ResponseAsync,
        ];
        foreach (Func<Task> call in calls)
            Assert.Contains("99: ", (await Calls.FailsAsync(call, StatusCode.InvalidArgument)).Status.Detail, StringComparison.Ordinal);
        Assert.Equal(EngineState.Running, (await server.Control.StatusAsync(new StatusRequest())).State);

        Payload payload = Payload.Reversed("qwen3");
        byte[] unknown = [0x98, 0x06, 0x01];
        UpdateRequest[] all = [.. payload.Chunks(1 << 20)];
        UpdateRequest chunk = new() { Chunk = payload.Chunks(1000).First().Chunk.With(c => c.MergeFrom(unknown)) };
        UpdateRequest window = Updates.Window("/dev/shm/none", 0, 0, 0).With(u => u.SharedMemory.MergeFrom(unknown));
        UpdateRequest file = Updates.FileOf("/none", 0).With(u => u.File.MergeFrom(unknown));
        UpdateRequest commit = payload.Commit().With(u => u.Commit.MergeFrom(unknown));
        foreach ((string name, UpdateRequest[] requests) in ((string, UpdateRequest[])[])[
            ("chunk.99", [chunk]), ("shared_memory.99", [window]), ("file.99", [file]), ("commit.99", [.. all, commit])])
        {
            UpdateReply last = (await server.UpdateAsync([payload.Begin(0, 1), .. requests]))[^1];
            Assert.Contains($"{name}: ", last.Failed?.Reason, StringComparison.Ordinal);
        }
    }
}
