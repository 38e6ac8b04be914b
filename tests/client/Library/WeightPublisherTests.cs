using Grpc.Core;
using Xunit;

namespace Rollout.Client.Tests;

public sealed class WeightPublisherTests : FakeSidecarTests
{
    private static readonly PushOptions s_inline = new() { Transport = PushTransport.Inline };

    private WeightPublisher _publisher = null!;

    public static TheoryData<PushTransport> Transports => [PushTransport.SharedMemory, PushTransport.Inline];

    public override async ValueTask InitializeAsync()
    {
        await base.InitializeAsync();
        _publisher = new WeightPublisher(Client) { ResolveWithin = TimeSpan.FromSeconds(1) };
    }

    public override async ValueTask DisposeAsync()
    {
        await _publisher.DisposeAsync();
        await base.DisposeAsync();
        if (Fake.Weights.SharedMemoryPath is { } path)
            Assert.False(File.Exists(path), "something is left in /dev/shm");
    }

    [Theory, MemberData(nameof(Transports))]
    public async Task What_arrives_is_what_was_sent(PushTransport transport)
    {
        Fake.Weights.Version = 7;
        byte[][] contents = [Bytes(3_000_000, 1), Bytes(30, 2), Bytes(1 << 20, 3)];
        PushOptions options = new() { Transport = transport, Policy = UpdatePolicy.Keep, Owner = "me" };
        PushResult result = await PushAsync(Tensors(contents), options: options);

        for (int i = 0; i < contents.Length; i++)
            Assert.True(contents[i].AsSpan().SequenceEqual(Fake.Weights.Tensors[$"t{i}"]));
        V1.BeginUpdate begin = Fake.Weights.Begin!;
        Assert.Equal((7UL, 8UL, V1.UpdatePolicy.Keep, "me"), (begin.BaseVersion, begin.NewVersion, begin.Policy, begin.Owner));
        Assert.InRange(begin.DeadlineMilliseconds, 500_000u, 600_000u);
        Assert.Equal((8UL, (long)begin.PayloadBytes, false), (result.Version, result.PayloadBytes, result.ConfirmedByStatus));
        Assert.Matches("^[0-9a-f]{32}$", result.Digest);
        PushTimings timings = result.Timings;
        Assert.Equal((0.5, 0.25, 0.125), (timings.ServerTransfer, timings.ServerSwap, timings.ServerStall));
        double parts = timings.Preflight + timings.Write + timings.Transfer + timings.Commit;
        Assert.InRange(parts, timings.Total * 0.9, timings.Total);
    }

    [Fact]
    public async Task Versions_count_up_and_the_shared_memory_is_kept_until_it_is_too_small()
    {
        await PushAsync(Tensors(Bytes(1000, 1)));
        string first = Fake.Weights.SharedMemoryPath!;
        Assert.Equal(2UL, (await PushAsync(Tensors(Bytes(1000, 2)))).Version);
        Assert.Equal(first, Fake.Weights.SharedMemoryPath);
        Assert.Equal(9UL, (await PushAsync(Tensors(Bytes(9000, 2)), newVersion: 9)).Version);
        Assert.NotEqual(first, Fake.Weights.SharedMemoryPath);
        Assert.False(File.Exists(first));

        // As if a signal that the trainer handled had removed it.
        File.Delete(Fake.Weights.SharedMemoryPath!);
        await PushAsync(Tensors(Bytes(9000, 3)));
        Assert.Equal(Bytes(9000, 3), Fake.Weights.Tensors["t0"]);
    }

    [Fact]
    public async Task Shared_memory_smaller_than_the_payload_is_a_ring()
    {
        await using WeightPublisher publisher = new(Client) { MaxSharedMemoryBytes = 300_001 };
        byte[][] contents = [Bytes(1_000_000, 1), Bytes(2, 2), Bytes(500_000, 3)];
        await publisher.PushAsync(Tensors(contents), cancellationToken: Token);
        await publisher.PushAsync(Tensors(contents), cancellationToken: Token);
        Assert.Equal(300_001, new FileInfo(Fake.Weights.SharedMemoryPath!).Length);
        Assert.Equal(2 * 11, Fake.Weights.Windows);
        for (int i = 0; i < contents.Length; i++)
            Assert.True(contents[i].AsSpan().SequenceEqual(Fake.Weights.Tensors[$"t{i}"]));
    }

    /// <summary>
    /// The sidecar reads a window as late as the ring allows: when the client cannot write another one before. For any sizes, no unread
    /// window is overwritten.
    /// </summary>
    [Fact]
    public async Task A_ring_never_overtakes_a_slow_reader()
    {
        foreach ((int payload, int capacity, int parallelism) in (IEnumerable<(int, int, int)>)
            [(1_000_000, 200_000, 1), (1_000_000, 333_333, 3), (999_999, 499_999, 2), (30, 7, 1), (30, 29, 2), (3, 1, 1), (12, 2, 1)])
        {
            long window = SharedMemorySender.WindowBytes(2 * payload, capacity);
            long places = Math.Max(1, capacity / window);
            byte[] content = Bytes(2 * payload, payload);
            int behind = 0;
            TensorSource[] tensors = [new TensorSource("t0", TensorDType.BF16, [payload], (offset, destination) =>
            {
                if ((offset / window - places + 1) * window > Fake.Weights.Taken)
                    Interlocked.Increment(ref behind);
                content.AsSpan((int)offset, destination.Length).CopyTo(destination);
            })];
            Fake.Weights.WindowsBehind = (int)places - 1;
            await using WeightPublisher publisher = new(Client) { MaxSharedMemoryBytes = capacity };
            await publisher.PushAsync(tensors, options: new PushOptions { Parallelism = parallelism }, cancellationToken: Token);
            Assert.Equal((payload, capacity, 0), (payload, capacity, behind));
            Assert.True(content.AsSpan().SequenceEqual(Fake.Weights.Tensors["t0"]), $"{payload} elements through {capacity} bytes");
        }
    }

    [Fact]
    public async Task A_file_goes_through_a_folder_and_is_gone_afterwards()
    {
        string folder = Directory.CreateTempSubdirectory("rollout-test-").FullName;
        byte[][] contents = [Bytes(10, 1), Bytes(300_000, 3)];
        await PushAsync(Tensors(contents), options: new PushOptions { Transport = PushTransport.File, Folder = folder });
        Assert.Equal(300_010ul, Fake.Weights.Begin!.PayloadBytes);
        for (int i = 0; i < contents.Length; i++)
            Assert.True(contents[i].AsSpan().SequenceEqual(Fake.Weights.Tensors[$"t{i}"]));
        Assert.Empty(Directory.GetFiles(folder));
        Directory.Delete(folder);

        PushOptions fileInNoFolder = new() { Transport = PushTransport.File };
        await Assert.ThrowsAsync<ArgumentException>(() => PushAsync(Tensors(contents), options: fileInNoFolder));
    }

    [Fact]
    public async Task Sparse_tensors_are_indices_then_values()
    {
        uint[] indices = [.. Enumerable.Range(0, 700_000).Select(i => (uint)(3 * i))];
        byte[] values = Bytes(1_400_000, 5);
        TensorSource sparse = TensorSource.Sparse("s", TensorDType.BF16, [1000, 3000], indices, values);
        await PushAsync([sparse], options: s_inline with { Partial = true });
        V1.ManifestTensor tensor = Assert.Single(Fake.Weights.Begin!.Manifest);
        Assert.Equal((700_000ul, true), (tensor.SparseCount, Fake.Weights.Begin.Partial));
        byte[] sent = [.. System.Runtime.InteropServices.MemoryMarshal.AsBytes<uint>(indices), .. values];
        Assert.True(sent.AsSpan().SequenceEqual(Fake.Weights.Tensors["s"]));
        Assert.Throws<ArgumentException>(() => TensorSource.Sparse("s", TensorDType.F32, [9], indices, values));
    }

    [Fact]
    public async Task A_rejection_has_every_problem_and_no_byte_moves()
    {
        Fake.Weights.Reject =
        [
            new V1.Problem { Field = "manifest[0].shape", Message = "expected [4, 2]" },
            new V1.Problem { Field = "manifest", Message = "lm_head.weight is missing" },
        ];
        WeightUpdateRejectedException error = await Assert.ThrowsAsync<WeightUpdateRejectedException>(() =>
            PushAsync([new TensorSource("t", TensorDType.F32, [1], (_, _) => Assert.Fail("asked for bytes"))]));
        Assert.Equal(
            [new UpdateProblem("manifest[0].shape", "expected [4, 2]"), new UpdateProblem("manifest", "lm_head.weight is missing")],
            error.Problems);
        Assert.Null(Fake.Weights.SharedMemoryPath);
    }

    [Fact]
    public async Task Another_trainers_push_is_detected_and_a_retry_builds_on_it()
    {
        await PushAsync(Tensors(Bytes(10, 1)), options: s_inline);
        Fake.Weights.Version = 40;
        await Assert.ThrowsAsync<WeightUpdateRejectedException>(() => PushAsync(Tensors(Bytes(10, 1)), options: s_inline));
        Assert.Equal(41UL, (await PushAsync(Tensors(Bytes(10, 1)), options: s_inline)).Version);
        await Assert.ThrowsAsync<WeightUpdateRejectedException>(() =>
            PushAsync(Tensors(Bytes(10, 1)), options: s_inline with { BaseVersion = 40 }));
    }

    [Theory, MemberData(nameof(Transports))]
    public async Task A_digest_that_differs_is_thrown(PushTransport transport)
    {
        Fake.Weights.LieAboutDigest = true;
        WeightDigestException error = await Assert.ThrowsAsync<WeightDigestException>(() =>
            PushAsync(Tensors(Bytes(10, 1)), options: new PushOptions { Transport = transport }));
        Assert.Equal((UpdateOutcome.Committed, 1UL), (error.Outcome, error.Version));
        Assert.NotEqual(error.Sent, error.Received);

        PushOptions unverified = new() { Transport = transport, VerifyDigest = false };
        PushResult result = await PushAsync(Tensors(Bytes(10, 1)), options: unverified);
        Assert.Equal(error.Received, result.Digest);
    }

    [Fact]
    public async Task Failing_is_known_not_to_have_committed()
    {
        Fake.Weights.FailAtCommit = "the digests differ";
        WeightUpdateFailedException error = await FailsAsync(Tensors(Bytes(10, 1)));
        Assert.Equal(UpdateOutcome.NotCommitted, error.Outcome);
        Assert.Contains("the digests differ", error.Message);
    }

    [Theory]
    [InlineData(false, false, UpdateOutcome.NotCommitted)]
    [InlineData(false, true, UpdateOutcome.Poisoned)]
    [InlineData(true, false, UpdateOutcome.NotCommitted)]
    [InlineData(true, true, UpdateOutcome.Poisoned)]
    public async Task What_is_left_when_the_sidecar_gives_up_is_what_it_says(bool aborted, bool poisoned, UpdateOutcome outcome)
    {
        Fake.Weights.GivesUp = aborted
            ? new V1.UpdateReply { Aborted = new V1.Aborted { Reason = "the server stops", Poisoned = poisoned } }
            : new V1.UpdateReply { Failed = new V1.UpdateFailed { Reason = "the server stops", Poisoned = poisoned } };
        WeightUpdateFailedException error = await FailsAsync(Tensors(Bytes(10, 1)));
        Assert.Equal(outcome, error.Outcome);
        Assert.Contains("the server stops", error.Message, StringComparison.Ordinal);
    }

    [Fact]
    public async Task Every_policy_and_mode_arrives_as_the_one_that_was_meant()
    {
        foreach (UpdatePolicy policy in Enum.GetValues<UpdatePolicy>())
        {
            await PushAsync(Tensors(Bytes(10, 1)), options: s_inline with { Policy = policy });
            Assert.Equal($"{policy}", $"{Fake.Weights.Begin!.Policy}");
            Assert.Equal((false, 0UL), (Fake.Weights.Begin.Partial, Fake.Weights.Begin.SegmentBytes));
        }

        foreach (UpdateMode mode in (UpdateMode[])[UpdateMode.Auto, UpdateMode.Staged, UpdateMode.InPlace])
        {
            Fake.Weights.Mode = mode == UpdateMode.InPlace ? V1.UpdateMode.InPlace : V1.UpdateMode.Staged;
            PushResult result = await PushAsync(Tensors(Bytes(10, 1)), options: new PushOptions { Mode = mode });
            Assert.Equal(mode == UpdateMode.Auto ? "Unspecified" : $"{mode}", $"{Fake.Weights.Begin!.Mode}");
            Assert.Equal(mode == UpdateMode.Auto ? UpdateMode.Staged : mode, result.Mode);
            Assert.Equal(10UL, Fake.Weights.Begin.SegmentBytes);
        }
    }

    [Fact]
    public async Task A_sidecar_that_gives_up_ends_the_sending()
    {
        Fake.Weights.FailAfterChunks = 2;
        int asked = 0;
        TensorSource[] tensors = [new TensorSource("t", TensorDType.F32, [1 << 27], (_, bytes) =>
        {
            asked++;
            bytes.Clear();
        })];
        WeightUpdateFailedException error = await FailsAsync(tensors, s_inline);
        Assert.Contains("out of luck", error.Message);
        Assert.InRange(asked, 2, 400);
    }

    [Fact]
    public async Task A_source_that_throws_aborts_the_update_and_is_what_is_thrown()
    {
        TensorSource[] tensors = [new TensorSource("t", TensorDType.F32, [1], (_, _) => throw new NotSupportedException("quantised"))];
        foreach (PushOptions options in (PushOptions[])[s_inline, new()])
        {
            NotSupportedException error = await Assert.ThrowsAsync<NotSupportedException>(() => PushAsync(tensors, options: options));
            Assert.Equal("quantised", error.Message);
            Assert.Equal("quantised", Fake.Weights.AbortReason);
        }

        Assert.Equal(1UL, (await PushAsync(Tensors(Bytes(10, 1)))).Version);
    }

    [Theory, MemberData(nameof(Transports))]
    public async Task Cancelling_commits_nothing(PushTransport transport)
    {
        using CancellationTokenSource cancel = new();
        TensorSource[] tensors = [new TensorSource("t", TensorDType.F32, [1 << 20], (offset, bytes) =>
        {
            if (offset > 0)
                cancel.Cancel();
        })];
        await Assert.ThrowsAnyAsync<OperationCanceledException>(() =>
            _publisher.PushAsync(tensors, options: new PushOptions { Transport = transport }, cancellationToken: cancel.Token));
        Assert.NotNull(Fake.Weights.Begin);
        Assert.Equal(0UL, Fake.Weights.Version);
        Assert.Equal(1UL, (await PushAsync(Tensors(Bytes(10, 1)))).Version);
    }

    /// <summary>A commit that was sent cannot be cancelled: the caller gets its outcome.</summary>
    [Fact]
    public async Task Cancelling_after_the_commit_was_sent_changes_nothing()
    {
        using CancellationTokenSource cancel = new();
        Fake.Weights.Arrived = async (request, _) =>
        {
            if (request.Commit is not null)
                await cancel.CancelAsync();
        };
        PushResult result = await _publisher.PushAsync(Tensors(Bytes(10, 1)), cancellationToken: cancel.Token);
        Assert.Equal((1UL, 1UL, true), (result.Version, Fake.Weights.Version, cancel.IsCancellationRequested));
        Fake.Weights.Arrived = null;
        Assert.Equal(2UL, (await PushAsync(Tensors(Bytes(10, 1)))).Version);
    }

    [Fact]
    public async Task The_timeout_covers_a_sidecar_that_hangs()
    {
        Fake.Weights.BeforeReady = context => Task.Delay(Timeout.Infinite, context.CancellationToken);
        PushOptions options = new() { Timeout = TimeSpan.FromSeconds(0.3) };
        WeightUpdateFailedException error = await FailsAsync(Tensors(Bytes(10, 1)), options);
        Assert.Equal((UpdateOutcome.NotCommitted, StatusCode.DeadlineExceeded), (error.Outcome, error.StatusCode));
        Assert.Contains("0.3 s", error.Message);
    }

    [Fact]
    public async Task An_answer_lost_after_the_commit_is_asked_for()
    {
        Fake.Weights.BreakAtCommit = context => throw new RpcException(new Status(StatusCode.Unavailable, "gone"));
        Fake.Weights.CommitBeforeBreaking = true;
        PushResult result = await PushAsync(Tensors(Bytes(10, 1), Bytes(20, 2)));
        Assert.Equal((1UL, true), (result.Version, result.ConfirmedByStatus));
        Assert.Matches("^[0-9a-f]{32}$", result.Digest);
    }

    [Fact]
    public async Task An_answer_lost_before_the_commit_was_done_is_a_failure_that_says_so()
    {
        Fake.Weights.BreakAtCommit = context => throw new RpcException(new Status(StatusCode.Unavailable, "gone"));
        WeightUpdateFailedException error = await FailsAsync(Tensors(Bytes(10, 1)));
        Assert.Equal(UpdateOutcome.NotCommitted, error.Outcome);
        Assert.Contains("gone", error.Message);
    }

    [Fact]
    public async Task Another_trainers_version_of_the_same_number_is_not_taken_for_ours()
    {
        Fake.Weights.BreakAtCommit = context =>
        {
            Fake.Weights.Version = 1;
            Fake.Weights.Tensors["t0"] = Bytes(10, 99);
            throw new RpcException(new Status(StatusCode.Unavailable, "gone"));
        };
        await Assert.ThrowsAsync<WeightDigestException>(() => PushAsync(Tensors(Bytes(10, 1))));
    }

    [Fact]
    public async Task A_sidecar_that_dies_at_the_commit_leaves_the_outcome_open()
    {
        Fake.Weights.BreakAtCommit = async context =>
        {
            _ = Task.Run(Fake.DieAsync, CancellationToken.None);
            await Task.Delay(Timeout.Infinite, context.CancellationToken);
        };
        WeightUpdateFailedException error = await FailsAsync(Tensors(Bytes(10, 1)));
        Assert.Equal(UpdateOutcome.Unknown, error.Outcome);
    }

    [Fact]
    public async Task A_sidecar_that_dies_during_the_transfer_has_not_committed()
    {
        TensorSource[] tensors = [new TensorSource("t", TensorDType.F32, [1 << 22], (offset, bytes) =>
        {
            if (offset == 0)
                Fake.DieAsync().Wait(Token);
        })];
        Assert.Equal(UpdateOutcome.NotCommitted, (await FailsAsync(tensors)).Outcome);
    }

    [Fact]
    public async Task A_sidecar_that_is_not_there_is_unavailable()
    {
        await Fake.DieAsync();
        await Assert.ThrowsAsync<RolloutUnavailableException>(() => PushAsync(Tensors(Bytes(10, 1))));
    }

    private Task<PushResult> PushAsync(IReadOnlyList<TensorSource> tensors, ulong? newVersion = null, PushOptions? options = null) =>
        _publisher.PushAsync(tensors, newVersion, options, Token);

    private async Task<WeightUpdateFailedException> FailsAsync(IReadOnlyList<TensorSource> tensors, PushOptions? options = null) =>
        await Assert.ThrowsAsync<WeightUpdateFailedException>(() => PushAsync(tensors, options: options));

    private static TensorSource[] Tensors(params byte[][] contents) =>
        [.. contents.Select((bytes, i) => TensorSource.FromMemory($"t{i}", TensorDType.BF16, [bytes.Length / 2], bytes))];

    private static byte[] Bytes(int count, int seed)
    {
        byte[] bytes = new byte[count];
        new Random(seed).NextBytes(bytes);
        return bytes;
    }
}
