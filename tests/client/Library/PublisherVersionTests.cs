using CsCheck;
using Grpc.Core;
using Xunit;

namespace Rollout.Client.Tests;

/// <summary>The base version of a push, after any outcomes of the pushes before it.</summary>
public sealed class PublisherVersionTests : FakeSidecarTests
{
    private enum Push
    {
        Good,
        GoodWithVersion,
        SomebodyElses,
        Rejected,
        FailsAtCommit,
        LostAfterCommit,
        LostBeforeCommit,
        NeverDecided,
        SourceThrows,
        Cancelled,
        DigestDiffers,
    }

    /// <summary>
    /// After a successful push the next one uses its version without a status call, and so detects a push by another trainer; after a
    /// failed one the sidecar is asked for its version.
    /// </summary>
    [Fact]
    public async Task Pushes_build_on_what_is_served() => await Gen.Enum<Push>().Array[1, 10].SampleAsync(
        async pushes =>
        {
            FakeWeights weights = Fake.Weights;
            weights.Version = 5;
            await using WeightPublisher publisher = new(Client) { ResolveWithin = TimeSpan.FromMilliseconds(150) };
            ulong? known = null;
            foreach (Push push in pushes)
            {
                if (push == Push.SomebodyElses)
                {
                    weights.Version += 2;
                    continue;
                }

                ulong served = weights.Version;
                int asked = Fake.Calls.GetValueOrDefault("Status");
                bool overtaken = known is { } last && last != served;
                ulong expected = served;
                using CancellationTokenSource cancel = CancellationTokenSource.CreateLinkedTokenSource(Token);
                Prepare(push, weights);
                TensorSource[] tensors = [new TensorSource("t", TensorDType.BF16, [8], (_, bytes) =>
                {
                    if (push == Push.SourceThrows)
                        throw new NotSupportedException("mine");
                    if (push == Push.Cancelled)
                        cancel.Cancel();
                    bytes.Fill(1);
                })];
                PushOptions options = new() { Transport = PushTransport.Inline };
                Exception? error = null;
                PushResult? result = null;
                try
                {
                    result = await publisher.PushAsync(tensors, push == Push.GoodWithVersion ? served + 10 : null, options, cancel.Token);
                }
                catch (Exception e) when (e is RolloutException or NotSupportedException or OperationCanceledException)
                {
                    error = e;
                }

                if (known is not null && push is not (Push.LostAfterCommit or Push.LostBeforeCommit or Push.NeverDecided))
                    Assert.Equal(asked, Fake.Calls["Status"]);
                if (known is null)
                    Assert.True(Fake.Calls["Status"] > asked, "the sidecar was not asked what it serves");
                Assert.Equal(known ?? served, weights.Begin!.BaseVersion);
                if (overtaken)
                {
                    Assert.IsType<WeightUpdateRejectedException>(error);
                }
                else if (push is Push.Good or Push.GoodWithVersion or Push.LostAfterCommit)
                {
                    expected = push == Push.GoodWithVersion ? served + 10 : served + 1;
                    Assert.Equal((expected, push == Push.LostAfterCommit), (result!.Version, result.ConfirmedByStatus));
                }
                else
                {
                    Assert.Equal(Ends(push), (error!.GetType(), (error as WeightUpdateFailedException)?.Outcome));
                    expected = push == Push.DigestDiffers ? served + 1 : served;
                }

                Assert.Equal(expected, weights.Version);
                known = result?.Version;
                Prepare(Push.Good, weights);
            }
        },
        iter: 25,
        threads: 1);

    private static (Type, UpdateOutcome?) Ends(Push push) => push switch
    {
        Push.Rejected => (typeof(WeightUpdateRejectedException), null),
        Push.FailsAtCommit or Push.LostBeforeCommit => (typeof(WeightUpdateFailedException), UpdateOutcome.NotCommitted),
        Push.NeverDecided => (typeof(WeightUpdateFailedException), UpdateOutcome.Unknown),
        Push.SourceThrows => (typeof(NotSupportedException), null),
        Push.Cancelled => (typeof(OperationCanceledException), null),
        _ => (typeof(WeightDigestException), UpdateOutcome.Committed),
    };

    private static void Prepare(Push push, FakeWeights weights)
    {
        weights.Reject = push == Push.Rejected ? [new V1.Problem { Field = "manifest", Message = "no" }] : [];
        weights.FailAtCommit = push == Push.FailsAtCommit ? "no" : null;
        weights.LieAboutDigest = push == Push.DigestDiffers;
        weights.CommitBeforeBreaking = push == Push.LostAfterCommit;
        weights.Says = null;
        weights.BreakAtCommit = push is not (Push.LostAfterCommit or Push.LostBeforeCommit or Push.NeverDecided) ? null : _ =>
        {
            ulong served = weights.Version;
            if (push == Push.NeverDecided)
                weights.Says = _ => new V1.StatusReply { State = V1.EngineState.Running, Version = served, Updating = true };
            throw new RpcException(new Status(StatusCode.Unavailable, "gone"));
        };
    }

    [Fact]
    public async Task Pushes_at_once_go_one_after_the_other()
    {
        await using WeightPublisher publisher = new(Client);
        int inside = 0;
        PushResult[] results = await Task.WhenAll(Enumerable.Range(0, 6).Select(i => Task.Run(() => publisher.PushAsync(
            [new TensorSource("t", TensorDType.BF16, [8], (_, bytes) =>
            {
                Assert.Equal(1, Interlocked.Increment(ref inside));
                Thread.Sleep(2);
                bytes.Fill((byte)i);
                Interlocked.Decrement(ref inside);
            })],
            cancellationToken: Token))));
        Assert.Equal(Enumerable.Range(1, 6).Select(version => (ulong)version), results.Select(result => result.Version).Order());
        Assert.Equal(6UL, Fake.Weights.Version);
    }

    [Fact]
    public async Task Closing_waits_for_a_push_in_progress_and_refuses_the_next_one()
    {
        WeightPublisher publisher = new(Client);
        Task? closing = null;
        PushResult result = await publisher.PushAsync(
            [new TensorSource("t", TensorDType.BF16, [8], (_, bytes) =>
            {
                closing = publisher.DisposeAsync().AsTask();
                Assert.False(closing.IsCompleted);
            })],
            cancellationToken: Token);
        Assert.Equal(1UL, result.Version);
        await closing!;
        await publisher.DisposeAsync();
        await Assert.ThrowsAsync<ObjectDisposedException>(() =>
            publisher.PushAsync([TensorSource.FromMemory("t", TensorDType.BF16, [1], new byte[2])], cancellationToken: Token));
        Assert.Equal(1, Fake.Calls["Update"]);
    }

    [Fact]
    public async Task A_push_that_waits_for_another_can_be_cancelled()
    {
        await using WeightPublisher publisher = new(Client);
        using CancellationTokenSource cancel = new();
        Task? second = null;
        await publisher.PushAsync(
            [new TensorSource("t", TensorDType.BF16, [8], (_, bytes) =>
            {
                second = publisher.PushAsync(
                    [TensorSource.FromMemory("t", TensorDType.BF16, [1], new byte[2])], cancellationToken: cancel.Token);
                cancel.Cancel();
            })],
            cancellationToken: Token);
        await Assert.ThrowsAnyAsync<OperationCanceledException>(() => second!);
        Assert.Equal(1, Fake.Calls["Update"]);
        Assert.Equal(2UL, (await publisher.PushAsync(
            [TensorSource.FromMemory("t", TensorDType.BF16, [1], new byte[2])], cancellationToken: Token)).Version);
    }

    [Fact]
    public async Task The_largest_version_is_not_followed_by_nought()
    {
        Fake.Weights.Version = ulong.MaxValue;
        await using WeightPublisher publisher = new(Client);
        await Assert.ThrowsAsync<OverflowException>(() =>
            publisher.PushAsync([TensorSource.FromMemory("t", TensorDType.BF16, [1], new byte[2])], cancellationToken: Token));
        Assert.False(Fake.Calls.ContainsKey("Update"));
    }
}
