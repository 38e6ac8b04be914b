using System.Threading.Channels;
using Grpc.Core;
using Xunit;
using static Rollout.Client.Tests.GroupAssemblyTests;

namespace Rollout.Client.Tests;

public sealed class BatchTests : FakeSidecarTests
{
    public override async ValueTask InitializeAsync()
    {
        await base.InitializeAsync();
        Fake.Batch = AnswerAsync;
    }

    [Fact]
    public async Task Refused_groups_cost_no_sample_of_the_others()
    {
        RolloutRequest[] requests = [Request("a"), Request("bad"), Request("b"), Request("busy"), Request("c", n: -1), Request("d")];
        List<string> ids = [];
        RolloutBatchException error = await Assert.ThrowsAsync<RolloutBatchException>(async () =>
        {
            await foreach (Sample sample in Client.GenerateBatchAsync(requests, cancellationToken: Token))
                ids.Add($"{sample.RequestId}{sample.Index}");
        });
        Assert.Equal(["a0", "a1", "b0", "b1", "d0", "d1"], ids.Order());
        Assert.Equal(["bad", "busy", "c"], error.Refused.Select(refused => refused.RequestId).Order());
        Assert.Equal("n: must be at least 1", error.Refused.OfType<RolloutRequestException>().Single(e => e.RequestId == "bad").Problems);
        Assert.Single(error.Refused.OfType<RolloutBusyException>());
    }

    [Fact]
    public async Task With_a_callback_nothing_is_thrown()
    {
        List<RolloutException> refused = [];
        RolloutRequest[] requests = [Request("bad"), Request("a")];
        List<Sample> samples = await Client.GenerateBatchAsync(requests, refused.Add, cancellationToken: Token).ToListAsync(Token);
        Assert.Equal(2, samples.Count);
        Assert.Equal("bad", Assert.Single(refused).RequestId);
    }

    [Fact]
    public async Task A_duplicate_in_flight_is_refused_and_an_id_that_has_ended_is_free_again()
    {
        TaskCompletionSource firstEnded = new();
        async IAsyncEnumerable<RolloutRequest> RequestsAsync()
        {
            yield return Request("a");
            yield return Request("a");
            await firstEnded.Task;
            yield return Request("a");
        }

        List<RolloutException> refused = [];
        int samples = 0;
        await foreach (Sample sample in Client.GenerateBatchAsync(RequestsAsync(), refused.Add, cancellationToken: Token))
        {
            if (++samples == 2)
                firstEnded.SetResult();
        }

        Assert.Equal(4, samples);
        Assert.Equal(StatusCode.AlreadyExists, Assert.Single(refused).StatusCode);
    }

    [Fact]
    public async Task No_requests_are_no_samples() =>
        Assert.Equal(0, await Client.GenerateBatchAsync(Array.Empty<RolloutRequest>(), cancellationToken: Token).CountAsync(Token));

    /// <summary>Chunks of all groups interleave, and each group's seed and prompt come with its first reply.</summary>
    [Fact]
    public async Task Groups_that_interleave_keep_their_own_tokens_seeds_and_prompts()
    {
        string[] ids = ["a", "b", "c"];
        Fake.Batch = async (requests, replies, context) =>
        {
            while (await requests.MoveNext()) { }
            for (uint start = 0; start < 3; start++)
            {
                for (uint index = 2; index-- > 0;)
                {
                    foreach (string id in start % 2 == 0 ? ids : ids.Reverse())
                    {
                        uint token = (uint)(100 * Array.IndexOf(ids, id)) + (10 * index) + start + 1;
                        V1.FinishReason reason = start == 2 ? V1.FinishReason.Length : V1.FinishReason.Unspecified;
                        V1.GenerateReply reply = Reply(Chunk(index, start, [token], 7 + start, reason));
                        reply.RequestId = id;
                        if (start == 0 && index == 1)
                        {
                            reply.Seed = 40 + (ulong)Array.IndexOf(ids, id);
                            reply.Prompt = new V1.PromptInfo { CachedTokens = 16u * (uint)Array.IndexOf(ids, id) };
                        }

                        await replies.WriteAsync(reply);
                    }
                }
            }
        };
        List<Sample> samples = await Client.GenerateBatchAsync(ids.Select(id => Request(id)), cancellationToken: Token).ToListAsync(Token);
        Assert.Equal(6, samples.Select(sample => (sample.RequestId, sample.Index)).Distinct().Count());
        foreach (Sample sample in samples)
        {
            int group = Array.IndexOf(ids, sample.RequestId);
            int first = (100 * group) + (10 * sample.Index) + 1;
            Assert.Equal([first, first + 1, first + 2], sample.Ids);
            Assert.Equal((40 + (ulong)group, 16 * group), (sample.Seed, sample.Prompt!.CachedTokens));
            Assert.Equal([new VersionSpan(7, 0, 1), new VersionSpan(8, 1, 2), new VersionSpan(9, 2, 3)], sample.Versions);
        }
    }

    [Fact]
    public async Task A_batch_that_ends_before_its_samples_or_before_its_requests_is_an_error()
    {
        Fake.Batch = async (requests, replies, context) =>
        {
            while (await requests.MoveNext()) { }
            V1.GenerateReply reply = Reply(Chunk(0, 0, [5], 7, V1.FinishReason.Stop));
            reply.RequestId = "a";
            await replies.WriteAsync(reply);
        };
        RolloutException error = await Assert.ThrowsAsync<RolloutException>(async () =>
            await Client.GenerateBatchAsync([Request("a")], cancellationToken: Token).CountAsync(Token));
        Assert.Contains("'a'", error.Message, StringComparison.Ordinal);
        error = await Assert.ThrowsAsync<RolloutException>(async () =>
            await Client.GenerateBatchAsync([Request("a", n: 1), Request("b")], cancellationToken: Token).CountAsync(Token));
        Assert.Contains("'b'", error.Message, StringComparison.Ordinal);

        Fake.Batch = (_, _, _) => Task.CompletedTask;
        error = await Assert.ThrowsAsync<RolloutException>(async () =>
            await Client.GenerateBatchAsync(NeverEnding(), cancellationToken: Token).CountAsync(Token));
        Assert.Contains("before it had all requests", error.Message, StringComparison.Ordinal);
    }

    [Fact]
    public async Task An_answer_for_a_group_that_was_not_asked_for_is_an_error()
    {
        Fake.Batch = async (requests, replies, context) =>
        {
            while (await requests.MoveNext()) { }
            await replies.WriteAsync(Reply(Chunk(0, 0, [5], 7, V1.FinishReason.Stop)));
        };
        RolloutException error = await Assert.ThrowsAsync<RolloutException>(async () =>
            await Client.GenerateBatchAsync([Request("a")], cancellationToken: Token).CountAsync(Token));
        Assert.Contains("'id', which is not in flight", error.Message, StringComparison.Ordinal);
    }

    [Fact]
    public async Task Many_batches_at_once_over_one_client_do_not_mix()
    {
        await Task.WhenAll(Enumerable.Range(0, 8).Select(async batch =>
        {
            RolloutRequest[] requests = [.. Enumerable.Range(0, 40).Select(i => Request($"{batch}-{i}", n: 1 + (i % 3)))];
            List<Sample> samples = await Client.GenerateBatchAsync(requests, cancellationToken: Token).ToListAsync(Token);
            Assert.Equal(
                requests.SelectMany(request => Enumerable.Range(0, request.Options.N).Select(i => (request.RequestId, i))).Order(),
                samples.Select(sample => (sample.RequestId, sample.Index)).Order());
        }));
    }

    [Fact]
    public async Task Requests_may_depend_on_samples()
    {
        Channel<RolloutRequest> next = Channel.CreateUnbounded<RolloutRequest>();
        next.Writer.TryWrite(Request("0"));
        int turns = 0;
        await foreach (Sample sample in Client.GenerateBatchAsync(next.Reader.ReadAllAsync(Token), cancellationToken: Token))
        {
            if (sample.Index == 0)
                continue;
            if (++turns == 5)
                next.Writer.Complete();
            else
                next.Writer.TryWrite(Request($"{turns}"));
        }

        Assert.Equal(5, turns);
    }

    [Fact]
    public async Task An_exception_of_the_callers_requests_is_what_is_thrown()
    {
        IEnumerable<RolloutRequest> Requests()
        {
            yield return Request("a");
            throw new InvalidOperationException("mine");
        }

        InvalidOperationException error = await Assert.ThrowsAsync<InvalidOperationException>(async () =>
            await Client.GenerateBatchAsync(Requests(), cancellationToken: Token).CountAsync(Token));
        Assert.Equal("mine", error.Message);
    }

    [Fact]
    public async Task Leaving_early_ends_the_servers_call_even_if_requests_never_end()
    {
        TaskCompletionSource ended = new();
        Fake.Batch = async (requests, replies, context) =>
        {
            context.CancellationToken.Register(ended.SetResult);
            await AnswerAsync(requests, replies, context);
        };
        await foreach (Sample sample in Client.GenerateBatchAsync(NeverEnding(), cancellationToken: Token))
            break;
        await ended.Task.WaitAsync(TimeSpan.FromSeconds(20), Token);
    }

    [Fact]
    public async Task A_broken_call_is_thrown_though_requests_never_end()
    {
        Fake.Batch = async (requests, _, _) =>
        {
            await requests.MoveNext();
            throw new RpcException(new Status(StatusCode.Unavailable, "the engine has failed"));
        };
        RolloutUnavailableException error = await Assert.ThrowsAsync<RolloutUnavailableException>(async () =>
            await Client.GenerateBatchAsync(NeverEnding(), cancellationToken: Token).CountAsync(Token));
        Assert.Contains("the engine has failed", error.Message);
    }

    // Uses no cancellation token on purpose, as a caller may not either.
    private static async IAsyncEnumerable<RolloutRequest> NeverEnding()
    {
        yield return Request("a");
        await new TaskCompletionSource().Task;
    }

    private static RolloutRequest Request(string id, int n = 2) => new(new[] { 1 }, new GenerateOptions { N = n }) { RequestId = id };

    private static async Task AnswerAsync(
        IAsyncStreamReader<V1.GenerateRequest> requests, IServerStreamWriter<V1.GenerateReply> replies, ServerCallContext context)
    {
        while (await requests.MoveNext())
        {
            V1.GenerateRequest request = requests.Current;
            V1.Refusal? refusal = request.RequestId switch
            {
                "bad" => new V1.Refusal { Code = 3, Message = "n: must be at least 1" },
                "busy" => new V1.Refusal { Code = 8, Message = "no room" },
                _ => null,
            };
            if (refusal is not null)
            {
                await replies.WriteAsync(new V1.GenerateReply { RequestId = request.RequestId, Refused = refusal });
                continue;
            }

            for (uint i = 0; i < request.N; i++)
            {
                V1.GenerateReply reply = Reply(Chunk(i, 0, [5], 7, V1.FinishReason.Stop));
                reply.RequestId = request.RequestId;
                await replies.WriteAsync(reply);
            }
        }
    }
}
