using Grpc.Core;
using Xunit;

namespace Rollout.Client.Tests;

/// <summary>A push that breaks at any of its messages: the outcome that the client reports is right.</summary>
public sealed class LostUpdateTests : FakeSidecarTests
{
    private const ulong Base = 7;

    private readonly string _folder = Directory.CreateTempSubdirectory("rollout-test-").FullName;
    private WeightPublisher _publisher = null!;

    /// <summary>Where a push may break.</summary>
    public enum At
    {
        Begin,
        FirstPayload,
        LastPayload,
        Commit,
    }

    /// <summary>How it breaks there.</summary>
    public enum Break
    {
        /// <summary>The connection breaks before the message is handled.</summary>
        Before,

        /// <summary>The connection breaks after the message is handled, and the answer is lost.</summary>
        After,

        /// <summary>The sidecar ends the stream with an error of its own.</summary>
        Error,

        /// <summary>The sidecar sends nothing more, until the timeout.</summary>
        Hang,
    }

    public static MatrixTheoryData<PushTransport, UpdateMode, At, Break> Everywhere => new(
        [PushTransport.SharedMemory, PushTransport.Inline, PushTransport.File],
        [UpdateMode.Staged, UpdateMode.InPlace],
        Enum.GetValues<At>(),
        [Break.Before, Break.After, Break.Error]);

    public override async ValueTask InitializeAsync()
    {
        await base.InitializeAsync();
        Fake.Weights.Version = Base;
        _publisher = new WeightPublisher(Client) { ResolveWithin = TimeSpan.FromSeconds(30), MaxSharedMemoryBytes = 1_000_000 };
    }

    public override async ValueTask DisposeAsync()
    {
        await _publisher.DisposeAsync();
        await base.DisposeAsync();
        Assert.Empty(Directory.GetFiles(_folder));
        Directory.Delete(_folder);
    }

    [Theory, MemberData(nameof(Everywhere))]
    public Task Wherever_a_push_breaks_its_outcome_is_true_and_the_next_one_succeeds(
        PushTransport transport, UpdateMode mode, At at, Break how) => BreakAsync(Fake, _publisher, transport, mode, at, how);

    [Fact]
    public async Task A_sidecar_that_hangs_at_any_message_costs_no_more_than_the_timeout()
    {
        await Task.WhenAll(
            from transport in (PushTransport[])[PushTransport.SharedMemory, PushTransport.Inline]
            from at in Enum.GetValues<At>()
            select HangAsync(transport, at));

        async Task HangAsync(PushTransport transport, At at)
        {
            await using FakeSidecar fake = await FakeSidecar.StartAsync();
            fake.Weights.Version = Base;
            await using RolloutClient client = RolloutClient.Connect(fake.Address);
            await using WeightPublisher publisher = new(client) { ResolveWithin = TimeSpan.FromSeconds(30) };
            await BreakAsync(fake, publisher, transport, UpdateMode.Staged, at, Break.Hang);
        }
    }

    private async Task BreakAsync(
        FakeSidecar fake, WeightPublisher publisher, PushTransport transport, UpdateMode mode, At at, Break how)
    {
        FakeWeights weights = fake.Weights;
        weights.Mode = mode == UpdateMode.InPlace ? V1.UpdateMode.InPlace : V1.UpdateMode.Staged;
        long payload = 0;
        Func<V1.UpdateRequest, ServerCallContext, Task> breaks = async (request, context) =>
        {
            payload = request.Begin is { } begin ? (long)begin.PayloadBytes : payload;
            long end = request switch
            {
                { Chunk: { } chunk } => (long)chunk.Offset + chunk.Data.Length,
                { SharedMemory: { } window } => (long)(window.PayloadOffset + window.Bytes),
                _ => payload,
            };
            bool here = request.StepCase switch
            {
                V1.UpdateRequest.StepOneofCase.Begin => at == At.Begin,
                V1.UpdateRequest.StepOneofCase.Commit => at == At.Commit,
                _ => at == At.FirstPayload || (at == At.LastPayload && end == payload),
            };
            if (!here)
                return;
            if (how == Break.Hang)
                await FakeSidecar.HangAsync(context);
            if (how == Break.Error)
                throw new RpcException(new Status(StatusCode.Internal, "a bug"));
            FakeSidecar.Cut(context);
            throw new IOException("cut");
        };
        if (how == Break.After)
            weights.Done = breaks;
        else
            weights.Arrived = breaks;
        PushOptions options = new()
        {
            Transport = transport,
            Mode = mode,
            Folder = _folder,
            Timeout = TimeSpan.FromSeconds(how == Break.Hang ? 2 : 60),
        };

        ulong served = Base;
        if (at == At.Commit && how == Break.After)
        {
            PushResult result = await PushAsync(publisher, options);
            Assert.Equal((Base + 1, true, mode), (result.Version, result.ConfirmedByStatus, result.Mode));
            served = Base + 1;
        }
        else
        {
            WeightUpdateFailedException error = await Assert.ThrowsAsync<WeightUpdateFailedException>(() => PushAsync(publisher, options));
            UpdateOutcome expected = mode == UpdateMode.Staged || at == At.Begin ? UpdateOutcome.NotCommitted
                : at == At.Commit ? UpdateOutcome.Poisoned // as the sidecar says when it is asked
                : UpdateOutcome.Unknown;
            Assert.Equal(expected, error.Outcome);
            StatusCode cause = how switch
            {
                Break.Hang => StatusCode.DeadlineExceeded,
                Break.Error => StatusCode.Internal,
                _ => StatusCode.Unavailable,
            };
            Assert.Equal(cause, error.StatusCode);
        }

        Assert.Equal((served, 1), (weights.Version, fake.Calls["Update"]));
        (weights.Arrived, weights.Done) = (null, null);
        PushResult next = await PushAsync(publisher, options with { Timeout = TimeSpan.FromSeconds(60) });
        Assert.Equal((served + 1, false), (next.Version, next.ConfirmedByStatus));
        Assert.Equal(Contents(), weights.Tensors["t0"]);
        Assert.False(weights.Poisoned);
    }

    /// <summary>The sidecar's status at each call; the last one repeats. Updating at the base version means undecided.</summary>
    public static TheoryData<string, string> Decisions => new()
    {
        { "updating updating updating committed", "committed" },
        { "updating updating updating old", "NotCommitted" },
        { "updating updating poisoned", "Poisoned" },
        { "gone gone updating gone committed", "committed" },
        { "gone old", "NotCommitted" },
        { "gone poisoned", "Poisoned" },
        { "updating overtaken", "Unknown" },
        { "gone restarted", "Unknown" }, // it serves its checkpoint again: neither the old weights nor the new
        { "committed", "committed" },
    };

    [Theory, MemberData(nameof(Decisions))]
    public async Task While_the_sidecar_has_not_decided_it_is_asked_again(string answers, string expected)
    {
        string[] said = answers.Split(' ');
        FakeWeights weights = Fake.Weights;
        weights.CommitBeforeBreaking = expected == "committed";
        weights.BreakAtCommit = context =>
        {
            int asked = 0;
            weights.Says = _ =>
            {
                V1.StatusReply status = new() { State = V1.EngineState.Running, Version = Base };
                switch (said[Math.Min(asked++, said.Length - 1)])
                {
                    case "updating":
                        status.Updating = true;
                        break;
                    case "committed":
                        status.Version = Base + 1;
                        break;
                    case "overtaken":
                        status.Version = Base + 5;
                        break;
                    case "restarted":
                        status.Version = 0;
                        break;
                    case "poisoned":
                        status.State = V1.EngineState.Poisoned;
                        break;
                    case "gone":
                        throw new RpcException(new Status(StatusCode.Unavailable, "not yet"));
                }

                return status;
            };
            FakeSidecar.Cut(context);
            throw new IOException("cut");
        };

        if (expected == "committed")
        {
            Assert.True((await PushAsync(new PushOptions())).ConfirmedByStatus);
        }
        else
        {
            WeightUpdateFailedException error = await Assert.ThrowsAsync<WeightUpdateFailedException>(() => PushAsync(new PushOptions()));
            Assert.Equal(expected, $"{error.Outcome}");
        }

        Assert.InRange(Fake.Calls["Status"], 1 + said.Length, int.MaxValue); // 1 for the base version
    }

    [Theory]
    [InlineData(true)] // it answers that it is still updating
    [InlineData(false)] // it does not answer at all
    public async Task A_sidecar_that_never_decides_is_asked_no_longer_than_it_takes(bool answers)
    {
        await using WeightPublisher publisher = new(Client) { ResolveWithin = TimeSpan.FromSeconds(0.5) };
        Fake.Weights.BreakAtCommit = context =>
        {
            Fake.Weights.Says = _ => new V1.StatusReply { State = V1.EngineState.Running, Version = Base, Updating = true };
            if (!answers)
                Fake.Arrived = FakeSidecar.HangAsync;
            FakeSidecar.Cut(context);
            throw new IOException("cut");
        };
        WeightUpdateFailedException error = await Assert.ThrowsAsync<WeightUpdateFailedException>(() =>
            publisher.PushAsync(Tensors(), cancellationToken: Token).WaitAsync(TimeSpan.FromSeconds(60), Token));
        Assert.Equal((UpdateOutcome.Unknown, StatusCode.Unavailable), (error.Outcome, error.StatusCode));
        Assert.Contains("did not say within 0.5 s whether version 8 is served", error.Message, StringComparison.Ordinal);
    }

    [Fact]
    public async Task A_version_that_was_replaced_while_its_digests_were_asked_for_is_not_claimed()
    {
        Fake.Weights.CommitBeforeBreaking = true;
        Fake.Weights.BreakAtCommit = context =>
        {
            int asked = 0;
            Fake.Weights.Says = _ =>
            {
                ulong version = Fake.Weights.Version;
                if (asked++ == 0)
                    Fake.Weights.Version += 4; // right after the status reply
                return new V1.StatusReply { State = V1.EngineState.Running, Version = version };
            };
            FakeSidecar.Cut(context);
            throw new IOException("cut");
        };
        WeightUpdateFailedException error = await Assert.ThrowsAsync<WeightUpdateFailedException>(() => PushAsync(new PushOptions()));
        Assert.Equal(UpdateOutcome.Unknown, error.Outcome);
    }

    /// <summary>The sidecar describes whole tensors.</summary>
    [Fact]
    public async Task Digests_of_a_sparse_push_are_not_compared_with_what_is_described()
    {
        Fake.Weights.CommitBeforeBreaking = true;
        Fake.Weights.BreakAtCommit = context =>
        {
            Fake.Weights.Tensors["t1"] = new byte[2000];
            FakeSidecar.Cut(context);
            throw new IOException("cut");
        };
        TensorSource sparse = TensorSource.Sparse("t1", TensorDType.BF16, [1000], new uint[] { 3, 7 }, new byte[] { 1, 2, 3, 4 });
        PushOptions options = new() { Partial = true };
        PushResult pushed = await _publisher.PushAsync([.. Tensors(), sparse], options: options, cancellationToken: Token);
        Assert.Equal((8ul, true, ""), (pushed.Version, pushed.ConfirmedByStatus, pushed.Digest));
    }

    [Theory]
    [InlineData(true)]
    [InlineData(false)]
    public async Task Digests_of_another_algorithm_are_not_compared(bool verify)
    {
        Fake.Weights.DigestAlgorithm = "xxh3-128-tree-4096";
        Fake.Weights.CommitBeforeBreaking = true;
        Fake.Weights.BreakAtCommit = context =>
        {
            FakeSidecar.Cut(context);
            throw new IOException("cut");
        };
        Task<PushResult> push = PushAsync(new PushOptions { VerifyDigest = verify });
        if (!verify)
        {
            Assert.True((await push).ConfirmedByStatus);
            return;
        }

        WeightUpdateFailedException error = await Assert.ThrowsAsync<WeightUpdateFailedException>(() => push);
        Assert.Equal((UpdateOutcome.Unknown, StatusCode.Unavailable), (error.Outcome, error.StatusCode));
        Assert.Contains("'xxh3-128-tree-4096', this client as 'xxh3-128-tree-131072'", error.Message, StringComparison.Ordinal);
    }

    private Task<PushResult> PushAsync(PushOptions options) => PushAsync(_publisher, options);

    private static Task<PushResult> PushAsync(WeightPublisher publisher, PushOptions options) =>
        publisher.PushAsync(Tensors(), options: options, cancellationToken: Token).WaitAsync(TimeSpan.FromSeconds(60), Token);

    /// <summary>More than one chunk, and more than one window.</summary>
    private static TensorSource[] Tensors() => [TensorSource.FromMemory("t0", TensorDType.BF16, [1_100_000], Contents())];

    private static byte[] Contents()
    {
        byte[] bytes = new byte[2_200_000];
        new Random(1).NextBytes(bytes);
        return bytes;
    }
}
