using System.Net.Sockets;
using Grpc.Core;
using Grpc.Net.Client;
using Rollout.Server.Grpc;
using Rollout.Server.Weights;
using Rollout.V1;
using Update = Grpc.Core.AsyncDuplexStreamingCall<Rollout.V1.UpdateRequest, Rollout.V1.UpdateReply>;

namespace Rollout.Server.Tests;

/// <summary>
/// Every way in which an update can end without a commit, at every step, while samples are in flight: a pause holds them, so that under
/// DRAIN the update has to wait.
/// </summary>
public sealed class TransactionEndTests : IDisposable
{
    private const uint Milliseconds = 3000; // to come to the step

    private static readonly Payload s_payload = Payload.Reversed("qwen3");
    private static readonly GenerateRequest s_long = Calls.Sampled(Golden.Cases("qwen3")[1].Prompt, 60, seed: 4, n: 2);

    private readonly TemporaryFolder _shm = new("/dev/shm/rollout-test-");

    public TransactionEndTests() => File.WriteAllBytes(Bytes, s_payload.Bytes);

    private string Bytes => _shm["payload"];

    public void Dispose() => _shm.Dispose();

    /// <summary>Only a DRAIN waits: staged at the commit, in place before the first byte.</summary>
    private static readonly (UpdateMode Mode, UpdatePolicy Policy, string Step)[] s_steps =
    [
        (UpdateMode.Staged, UpdatePolicy.Drain, "opened"),
        (UpdateMode.Staged, UpdatePolicy.Drain, "ready"),
        (UpdateMode.Staged, UpdatePolicy.Drain, "sending"),
        (UpdateMode.Staged, UpdatePolicy.Drain, "sent"),
        (UpdateMode.Staged, UpdatePolicy.Drain, "committing"),
        (UpdateMode.InPlace, UpdatePolicy.Drain, "sending"),
        (UpdateMode.InPlace, UpdatePolicy.Keep, "ready"),
        (UpdateMode.InPlace, UpdatePolicy.Keep, "sending"),
        (UpdateMode.InPlace, UpdatePolicy.Keep, "sent"),
    ];

    [Theory]
    [InlineData("deadline")]
    [InlineData("call's deadline")]
    [InlineData("cancelled")]
    [InlineData("connection lost")]
    [InlineData("stopping")]
    [InlineData("closed")]
    [InlineData("aborted")]
    public async Task Samples_go_on_with_the_old_weights_and_the_next_update_commits(string way)
    {
        bool Possible(UpdateMode mode, UpdatePolicy policy, string step) => way switch
        {
            "deadline" or "stopping" or "aborted" => step != "opened",
            _ => true,
        } && (way is not ("closed" or "aborted") || !Waits(mode, policy, step)); // the server reads no messages meanwhile
        await Task.WhenAll(s_steps.Where(s => Possible(s.Mode, s.Policy, s.Step)).Select(async s =>
        {
            try
            {
                await EndAsync(s.Mode, s.Policy, s.Step, way);
            }
            catch (Exception e)
            {
                throw new InvalidOperationException($"{s.Mode}, {s.Policy}, {s.Step}: {e.Message}", e);
            }
        }));
    }

    private static bool Waits(UpdateMode mode, UpdatePolicy policy, string step)
        => policy == UpdatePolicy.Drain && step == (mode == UpdateMode.Staged ? "committing" : "sending");

    private async Task EndAsync(UpdateMode mode, UpdatePolicy policy, string step, string way)
    {
        await using HeldServer server = await HeldServer.StartAsync();
        List<SampleChunk> alone = await server.SamplesAsync(s_long);
        Task<List<SampleChunk>> begun = await server.BeginAndPauseAsync(s_long);
        bool touched = mode == UpdateMode.InPlace && policy == UpdatePolicy.Keep && (step is "sending" or "sent");

        Socket? socket = null;
        using GrpcChannel channel = Open(server.Address, opened => socket = opened);
        await new ControlService.ControlServiceClient(channel).StatusAsync(new StatusRequest(), deadline: Calls.Deadline()); // connects
        using Update update = new WeightsService.WeightsServiceClient(channel).Update(
            deadline: Calls.Deadline(way == "call's deadline" ? Milliseconds / 1000.0 : 20));
        DateTime late = DateTime.UtcNow.AddMilliseconds(Milliseconds);
        try
        {
            await ToStepAsync(update, mode, policy, step, way == "deadline" ? Milliseconds : 60_000);
        }
        catch (Exception) when (way is "deadline" or "call's deadline" && DateTime.UtcNow > late)
        {
            return; // a machine so busy does not come to this step in time
        }

        switch (way)
        {
            case "deadline":
                Aborted passed = (await LastAsync(update)).Aborted;
                Assert.Equal(($"the deadline of {Milliseconds} ms for the whole update passed", touched), (passed.Reason, passed.Poisoned));
                break;
            case "call's deadline":
                await Assert.ThrowsAsync<RpcException>(() => LastAsync(update));
                break;
            case "cancelled":
                update.Dispose();
                break;
            case "connection lost":
                socket!.Close();
                break;
            case "stopping":
                server.Host.Stop();
                UpdateReply stopped = await LastAsync(update);
                // The samples that it waits for end too, so it may commit before it is withdrawn: the reply says what happened.
                bool committed = stopped.Committed is not null && Waits(mode, policy, step);
                if (!committed) Assert.Equal("the server is stopping", stopped.Aborted.Reason);
                Assert.Equal((committed ? 1ul : 0ul, null), (server.Engine.Version, server.Engine.Status.UpdateOwner));
                Assert.Equal(server.Engine.Status.State == Engine.EngineState.Poisoned, stopped.Aborted?.Poisoned ?? false);
                if (!Waits(mode, policy, step)) Assert.Equal(touched, stopped.Aborted!.Poisoned);
                return; // and so does everything else
            case "closed":
                await update.RequestStream.CompleteAsync();
                UpdateReply closed = await LastAsync(update);
                string reason = step == "opened" ? closed.Failed.Reason : closed.Aborted.Reason;
                Assert.Contains("closed its side", reason, StringComparison.Ordinal);
                Assert.Equal(touched, closed.Aborted?.Poisoned ?? closed.Failed.Poisoned);
                break;
            default:
                await update.SendAsync(new UpdateRequest { Abort = new AbortUpdate { Reason = "changed my mind" } });
                Aborted aborted = (await LastAsync(update)).Aborted;
                Assert.Equal(("changed my mind", touched), (aborted.Reason, aborted.Poisoned));
                break;
        }

        // The next update may begin while the samples are still held: nothing of the ended one waits for them.
        StatusReply ended = await server.StatusAsync(status => !status.Updating);
        Assert.Equal((touched ? EngineState.Poisoned : EngineState.Paused, 0ul), (ended.State, ended.Version));
        string why = way == "deadline" ? "half-way (deadline)" : "half-way (sender)";
        if (touched) Assert.Contains(why, ended.Reason, StringComparison.Ordinal);
        await server.Control.ResumeAsync(new ResumeRequest(), deadline: Calls.Deadline());
        List<SampleChunk> samples = await begun;
        Assert.All(samples.SelectMany(sample => sample.Versions), span => Assert.Equal(0ul, span.Version));
        if (touched) Assert.All(samples, sample => Assert.Equal(FinishReason.Abort, sample.FinishReason));
        else Assert.Equal(alone.Select(Bits), samples.Select(Bits));

        await NextUpdateCommitsAsync(server);
        Assert.NotEqual(alone[0].Ids, (await server.SamplesAsync(s_long))[0].Ids);
    }

    [Theory]
    [InlineData(UpdateMode.Staged)]
    [InlineData(UpdateMode.InPlace)]
    public async Task A_drain_that_is_in_time_commits_when_the_samples_have_ended(UpdateMode mode)
    {
        await using HeldServer server = await HeldServer.StartAsync();
        Task<List<SampleChunk>> begun = await server.BeginAndPauseAsync(s_long);
        using Update update = server.Weights.Update(deadline: Calls.Deadline());
        await ToStepAsync(update, mode, UpdatePolicy.Drain, mode == UpdateMode.Staged ? "committing" : "sending", 60_000);
        Task<List<SampleChunk>> waits = server.SamplesAsync(s_long);
        await server.Control.ResumeAsync(new ResumeRequest(), deadline: Calls.Deadline());
        Assert.All((await begun).SelectMany(sample => sample.Versions), span => Assert.Equal(0ul, span.Version));
        if (mode == UpdateMode.InPlace)
        {
            Assert.Equal((ulong)s_payload.Bytes.Length / 2, (await update.NextAsync()).Progress.PayloadBytes);
            await update.SendAsync(Updates.Window(Bytes, (ulong)s_payload.Bytes.Length / 2, (ulong)s_payload.Bytes.Length / 2, 0));
            await update.SendAsync(s_payload.Commit());
        }

        Assert.Equal(1ul, (await LastAsync(update)).Committed.Version);
        await waits;
        Assert.Equal(1ul, (await server.StatusAsync(status => status.Running + status.Waiting == 0)).Version);
    }

    [Fact]
    public async Task Under_abort_samples_end_at_the_commit_with_what_they_have()
    {
        await using HeldServer server = await HeldServer.StartAsync();
        List<SampleChunk> alone = await server.SamplesAsync(s_long);
        Task<List<SampleChunk>> begun = await server.BeginAndPauseAsync(s_long);
        await server.CommitAsync(s_payload, 0, 1, begin => begin.Policy = UpdatePolicy.Abort);
        foreach (SampleChunk sample in await begun) // while the pause goes on
        {
            Assert.Equal(FinishReason.Abort, sample.FinishReason);
            Assert.InRange(sample.Ids.Count, 3, 59);
            Assert.Equal(alone[(int)sample.Index].Ids.Take(sample.Ids.Count), sample.Ids);
        }
    }

    /// <summary>A trainer may begin its next update as soon as it has read the last reply.</summary>
    [Fact]
    public async Task The_update_and_the_segment_are_free_before_the_last_reply_is_sent()
    {
        await using HeldServer server = await HeldServer.StartAsync();
        UpdateRequest begin = s_payload.Begin(0, 1, b => b.SegmentBytes = 1000);
        UpdateRequest[] all = [begin, .. s_payload.Chunks(1 << 20)];
        UpdateRequest wrong = new() { Commit = new Commit { Digest = Google.Protobuf.ByteString.CopyFrom(new byte[16]) } };
        UpdateRequest[][] ends =
        [
            [begin, new UpdateRequest { Abort = new AbortUpdate() }],
            [begin],
            [.. all, wrong],
            [.. all, s_payload.Commit()],
            [begin], // by now for a version that is not served
        ];
        using SharedSegment segment = new();
        using OpenMemory memory = new();
        List<UpdateReply.StepOneofCase> seen = [];
        foreach (UpdateRequest[] requests in ends)
        {
            UpdateReply? last = null;
            LastReply replies = new(reply =>
            {
                last = reply;
                if (reply.StepCase is UpdateReply.StepOneofCase.Ready or UpdateReply.StepOneofCase.Progress) return;
                Assert.Null(server.Engine.Status.UpdateOwner);
                Assert.NotNull(segment.Lend(0, 1000, () => 0));
                segment.GiveBack(0);
            });
            using PartStream stream = new(server.Engine, segment, memory, new Requests(requests), replies);
            await using UpdateTransaction transaction = new(server.Engine, new OpenUpdates(), stream, server.Log);
            await transaction.RunAsync(CancellationToken.None, CancellationToken.None);
            seen.Add(last!.StepCase);
        }

        Assert.Equal([UpdateReply.StepOneofCase.Aborted, UpdateReply.StepOneofCase.Aborted, UpdateReply.StepOneofCase.Failed,
            UpdateReply.StepOneofCase.Committed, UpdateReply.StepOneofCase.Rejected], seen);
    }

    private sealed class Requests(UpdateRequest[] requests) : IAsyncStreamReader<UpdateRequest>
    {
        private int _next = -1;

        public UpdateRequest Current => requests[_next];

        public Task<bool> MoveNext(CancellationToken cancellationToken) => Task.FromResult(++_next < requests.Length);
    }

    private sealed class LastReply(Action<UpdateReply> sent) : IServerStreamWriter<UpdateReply>
    {
        public WriteOptions? WriteOptions { get; set; }

        public Task WriteAsync(UpdateReply message)
        {
            sent(message);
            return Task.CompletedTask;
        }
    }

    private async Task ToStepAsync(Update update, UpdateMode mode, UpdatePolicy policy, string step, uint milliseconds)
    {
        if (step == "opened") return;
        await update.SendAsync(s_payload.Begin(0, 1, begin => (begin.Mode, begin.Policy, begin.DeadlineMilliseconds, begin.SegmentBytes)
            = (mode, policy, milliseconds, 1 << 20)));
        Ready ready = (await update.NextAsync()).Ready;
        Assert.Equal((mode, 1ul << 20), (ready.Mode, ready.Segment.Bytes));
        if (step == "ready") return;
        ulong half = (ulong)s_payload.Bytes.Length / 2;
        await update.SendAsync(Updates.Window(Bytes, 0, 0, half));
        if (mode == UpdateMode.InPlace && policy == UpdatePolicy.Drain) return; // waits to drain
        Assert.Equal(half, (await update.NextAsync()).Progress.PayloadBytes);
        if (step == "sending") return;
        await update.SendAsync(Updates.Window(Bytes, half, half, 0)); // all that is left
        Assert.Equal((ulong)s_payload.Bytes.Length, (await update.NextAsync()).Progress.PayloadBytes);
        if (step == "committing") await update.SendAsync(s_payload.Commit());
    }

    private static async Task<UpdateReply> LastAsync(Update update)
    {
        UpdateReply reply = await update.NextAsync();
        while (reply.Progress is not null) reply = await update.NextAsync();
        Assert.False(await update.ResponseStream.MoveNext(default));
        return reply;
    }

    /// <summary>Checks that another trainer can use the segment and the spare set.</summary>
    private async Task NextUpdateCommitsAsync(HeldServer server)
    {
        using Update next = server.Weights.Update(deadline: Calls.Deadline());
        await ToStepAsync(next, UpdateMode.Staged, UpdatePolicy.Recompute, "committing", 60_000);
        Assert.Equal(1ul, (await LastAsync(next)).Committed.Version);
    }

    private static string Bits(SampleChunk sample)
        => string.Join(' ', sample.Ids.Zip(sample.Logprobs, (id, logprob) => $"{id}:{BitConverter.SingleToInt32Bits(logprob):x}"));

    /// <summary>A channel whose socket the test can close.</summary>
    private static GrpcChannel Open(string address, Action<Socket> opened)
    {
        UnixDomainSocketEndPoint endPoint = new(address["unix:".Length..]);
        return GrpcChannel.ForAddress("http://localhost", new GrpcChannelOptions
        {
            DisposeHttpClient = true,
            HttpHandler = new SocketsHttpHandler
            {
                ConnectCallback = async (_, cancellation) =>
                {
                    NetworkStream connection = await SidecarSocket.ConnectAsync(endPoint, cancellation);
                    opened(connection.Socket);
                    return connection;
                },
            },
        });
    }
}
