using System.Threading.Channels;
using Grpc.Core;
using Xunit;
using static Rollout.Client.Tests.GroupAssemblyTests;

namespace Rollout.Client.Tests;

/// <summary>A batch read group by group: each group complete, once, as soon as its last sample has ended.</summary>
public sealed class GroupsTests : FakeSidecarTests
{
    [Fact]
    public async Task Groups_come_in_order_of_ending_and_their_samples_in_order_of_index()
    {
        Answer(("a", 2), ("b", 1), ("c", 0), ("a", 0), ("b", 0), ("a", 1));
        RolloutRequest[] requests = [Request("a", n: 3), Request("b", n: 2), Request("c", n: 1)];
        List<SampleGroup> groups = await Client.GenerateGroupsAsync(requests, cancellationToken: Token).ToListAsync(Token);
        Assert.Equal(["c", "b", "a"], groups.Select(group => group.Request.RequestId));
        foreach (SampleGroup group in groups)
        {
            Assert.Same(requests.Single(request => request.RequestId == group.Request.RequestId), group.Request);
            Assert.Equal(Enumerable.Range(0, group.Request.Options.N), group.Samples.Select(sample => sample.Index));
            Assert.All(group.Samples, sample => Assert.Equal(group.Request.RequestId, sample.RequestId));
        }
    }

    [Fact]
    public async Task A_group_is_handed_out_while_others_still_run()
    {
        TaskCompletionSource seen = new();
        Fake.Batch = async (requests, replies, _) =>
        {
            while (await requests.MoveNext()) { }
            await WriteAsync(replies, "b", 0, V1.FinishReason.Stop);
            await seen.Task.WaitAsync(TimeSpan.FromSeconds(20));
            await WriteAsync(replies, "a", 0, V1.FinishReason.Stop);
        };
        List<string> ids = [];
        await foreach (SampleGroup group in Client.GenerateGroupsAsync([Request("a", n: 1), Request("b", n: 1)], cancellationToken: Token))
        {
            ids.Add(group.Request.RequestId);
            seen.TrySetResult();
        }

        Assert.Equal(["b", "a"], ids);
    }

    [Fact]
    public async Task Refused_groups_cost_the_others_nothing_and_are_thrown_after_them()
    {
        Answer(("bad", -1), ("a", 0), ("a", 1));
        RolloutRequest[] requests = [Request("bad", n: 2), Request("a", n: 2), Request("c", n: -1)];
        List<string> ids = [];
        RolloutBatchException error = await Assert.ThrowsAsync<RolloutBatchException>(async () =>
        {
            await foreach (SampleGroup group in Client.GenerateGroupsAsync(requests, cancellationToken: Token))
                ids.Add(group.Request.RequestId);
        });
        Assert.Equal(["a"], ids);
        Assert.Equal(["bad", "c"], error.Refused.Select(refused => refused.RequestId).Order());

        List<RolloutException> refused = [];
        Assert.Single(await Client.GenerateGroupsAsync(requests, refused.Add, cancellationToken: Token).ToListAsync(Token));
        Assert.Equal(["bad", "c"], refused.Select(one => one.RequestId).Order());
    }

    [Fact]
    public async Task A_failed_sample_is_part_of_its_group()
    {
        Fake.Batch = async (requests, replies, _) =>
        {
            while (await requests.MoveNext()) { }
            await WriteAsync(replies, "a", 1, V1.FinishReason.Error);
            await WriteAsync(replies, "a", 2, V1.FinishReason.Abort);
            await WriteAsync(replies, "a", 0, V1.FinishReason.Length);
        };
        SampleGroup group = await Client.GenerateGroupsAsync([Request("a", n: 3)], cancellationToken: Token).SingleAsync(Token);
        Assert.Equal([FinishReason.Length, FinishReason.Error, FinishReason.Abort], group.Samples.Select(sample => sample.FinishReason));
    }

    [Fact]
    public async Task A_call_that_ends_before_a_groups_last_sample_is_an_error()
    {
        Answer(("a", 0), ("b", 0), ("b", 1));
        List<string> ids = [];
        RolloutException error = await Assert.ThrowsAsync<RolloutException>(async () =>
        {
            RolloutRequest[] requests = [Request("a", n: 2), Request("b", n: 2)];
            await foreach (SampleGroup group in Client.GenerateGroupsAsync(requests, cancellationToken: Token))
                ids.Add(group.Request.RequestId);
        });
        Assert.Equal(["b"], ids);
        Assert.Contains("'a'", error.Message, StringComparison.Ordinal);
    }

    [Fact]
    public async Task Requests_may_depend_on_groups_and_use_their_ids_again()
    {
        Fake.Batch = async (requests, replies, _) =>
        {
            while (await requests.MoveNext())
            {
                for (uint i = 0; i < requests.Current.N; i++)
                    await WriteAsync(replies, requests.Current.RequestId, i, V1.FinishReason.Stop);
            }
        };
        Channel<RolloutRequest> next = Channel.CreateUnbounded<RolloutRequest>();
        next.Writer.TryWrite(Request("a", n: 1));
        List<int> sizes = [];
        await foreach (SampleGroup group in Client.GenerateGroupsAsync(next.Reader.ReadAllAsync(Token), cancellationToken: Token))
        {
            sizes.Add(group.Samples.Count);
            if (sizes.Count == 4)
                next.Writer.Complete();
            else
                next.Writer.TryWrite(Request("a", n: sizes.Count + 1));
        }

        Assert.Equal([1, 2, 3, 4], sizes);
    }

    [Fact]
    public async Task Leaving_early_ends_the_servers_call()
    {
        TaskCompletionSource ended = new();
        Fake.Batch = async (requests, replies, context) =>
        {
            context.CancellationToken.Register(ended.SetResult);
            await requests.MoveNext();
            await WriteAsync(replies, "a", 0, V1.FinishReason.Stop);
            await FakeSidecar.HangAsync(context);
        };
        await foreach (SampleGroup group in Client.GenerateGroupsAsync([Request("a", n: 1), Request("b", n: 1)], cancellationToken: Token))
            break;
        await ended.Task.WaitAsync(TimeSpan.FromSeconds(20), Token);
    }

    private static RolloutRequest Request(string id, int n) => new(new[] { 1 }, new GenerateOptions { N = n }) { RequestId = id };

    /// <summary>Answers, once all requests have come, with whole samples in this order; an index below 0 refuses the group.</summary>
    private void Answer(params (string Id, int Index)[] samples) => Fake.Batch = async (requests, replies, _) =>
    {
        while (await requests.MoveNext()) { }
        foreach ((string id, int index) in samples)
        {
            if (index >= 0)
                await WriteAsync(replies, id, (uint)index, V1.FinishReason.Stop);
            else
                await replies.WriteAsync(new V1.GenerateReply { RequestId = id, Refused = new() { Code = 8, Message = "no room" } });
        }
    };

    private static Task WriteAsync(IServerStreamWriter<V1.GenerateReply> replies, string id, uint index, V1.FinishReason reason)
    {
        V1.GenerateReply reply = Reply(Chunk(index, 0, [5], 7, reason));
        reply.RequestId = id;
        return replies.WriteAsync(reply);
    }
}
