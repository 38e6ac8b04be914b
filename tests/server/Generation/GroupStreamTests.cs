using System.Globalization;
using System.Runtime.CompilerServices;
using Rollout.Engine;
using Rollout.Server.Generation;
using Rollout.V1;
using FinishReason = Rollout.Engine.FinishReason;

namespace Rollout.Server.Tests;

/// <summary>Generation for a surface that is not gRPC: the same tokens and text, and problems in the engine's names.</summary>
public sealed class GroupStreamTests
{
    private static readonly uint[] s_prompt = Golden.Cases("qwen3")[1].Prompt;

    private static readonly GroupRequest s_request = new()
    {
        Id = "mine",
        Prompt = [.. s_prompt.Select(id => (int)id)],
        N = 3,
        Seed = 5,
        MaxTokens = 60,
        IgnoreEos = true,
        StopStrings = ["ab"],
    };

    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public async Task It_has_what_grpc_replies_have(bool stream)
    {
        await using HeldServer server = await HeldServer.StartAsync();
        List<V1.SampleChunk> wire = await server.SamplesAsync(Calls.Sampled(s_prompt, 60, seed: 5, n: 3, change: r =>
        {
            (r.ReturnText, r.Stream) = (true, stream);
            r.Stopping.StopStrings.Add("ab");
        }));

        await using GroupStream group = GroupStream.Start(
            server.Engine, s_request with { StreamTokens = stream }, promptWasText: true, returnText: true, alsoWrong: []);
        SortedDictionary<int, (List<int> Ids, string Text)> samples = [];
        List<GroupHead?> heads = [];
        await foreach (GroupReply reply in group.ReadAsync(TestContext.Current.CancellationToken))
        {
            heads.Add(reply.Head);
            Assert.InRange(reply.Chunks.Count, 1, stream ? 3 : 1);
            foreach ((Engine.SequenceChunk chunk, string text) in reply.Chunks)
            {
                (List<int> ids, string before) = samples.GetValueOrDefault(chunk.Sequence.Index, ([], ""));
                Assert.Equal(ids.Count, chunk.Start);
                samples[chunk.Sequence.Index] = ([.. ids, .. chunk.Sequence.Tokens(chunk.Start, chunk.End)], before + text);
            }
        }

        Assert.Equal(wire.Select(sample => sample.Ids), samples.Values.Select(sample => sample.Ids.Select(id => (uint)id)));
        Assert.Equal(wire.Select(sample => sample.Text), samples.Values.Select(sample => sample.Text));
        Assert.Equal((5ul, s_request.Prompt), (heads[0]!.Seed, heads[0]!.PromptIds));
        Assert.All(heads.Skip(1), Assert.Null);
    }

    [Fact]
    public async Task Problems_of_all_kinds_come_in_one_answer()
    {
        await using HeldServer server = await HeldServer.StartAsync();
        GroupRequest bad = s_request with { MaxTokens = 0, MinTokens = 2, TopP = 2 };
        InvalidRequestException e = Assert.Throws<InvalidRequestException>(
            () => GroupStream.Start(server.Engine, bad, promptWasText: false, returnText: false, [new("prompt.text", "is not UTF-8")]));
        Assert.Equal("prompt.text: is not UTF-8; TopP: must be above 0 and at most 1, is 2; "
            + "MaxTokens: 0 makes sense only with PromptLogProbs; "
            + "N: must be 1 when MaxTokens is 0; MinTokens: 2 is more than MaxTokens 0", e.Message);
    }

    [Fact]
    public async Task A_disposed_stream_ends_its_group()
    {
        await using HeldServer server = await HeldServer.StartAsync();
        await server.Engine.PauseAsync(Engine.PauseMode.Keep, "test", TimeSpan.FromMinutes(1), TestContext.Current.CancellationToken);
        GroupStream group = GroupStream.Start(server.Engine, s_request, promptWasText: false, returnText: false, alsoWrong: []);
        await server.StatusAsync(status => status.Waiting == 3);
        await group.DisposeAsync();
        Assert.Equal(0, server.Engine.Status.Waiting);
    }

    [Fact]
    public async Task Many_groups_of_another_surface_share_one_writer()
    {
        await using HeldServer server = await HeldServer.StartAsync();
        Lines lines = new(server.Engine);
        await lines.RunAsync(Requests(), CancellationToken.None, TestContext.Current.CancellationToken);
        Assert.Equal(
            ["a 0: Length 7", "a 1: Length 7", "b 0: Length 3", "bad: Prompt: must hold at least one token", "c 0: Length 5"],
            lines.Written.Order());

        async IAsyncEnumerable<GroupRequest> Requests([EnumeratorCancellation] CancellationToken cancellation = default)
        {
            GroupRequest plain = s_request with { N = 1, StopStrings = [] };
            yield return plain with { Id = "a", N = 2, MaxTokens = 7 };
            yield return plain with { Id = "b", MaxTokens = 3 };
            yield return plain with { Id = "bad", Prompt = [] };
            await Task.Delay(10, cancellation);
            yield return plain with { Id = "c", MaxTokens = 5 };
        }
    }

    /// <summary>A surface whose requests are the engine's and whose replies are lines.</summary>
    private sealed class Lines(RolloutEngine engine) : GroupBatch<GroupRequest, string>
    {
        public List<string> Written { get; } = [];

        protected override GroupStream Start(GroupRequest request)
            => GroupStream.Start(engine, request, promptWasText: false, returnText: false, alsoWrong: []);

        protected override string Convert(GroupStream group, in GroupReply reply)
        {
            (Engine.SequenceChunk chunk, _) = Assert.Single(reply.Chunks);
            Assert.NotEqual(FinishReason.None, chunk.FinishReason);
            return string.Create(
                CultureInfo.InvariantCulture, $"{group.Request.Id} {chunk.Sequence.Index}: {chunk.FinishReason} {chunk.End}");
        }

        protected override string? Refusal(GroupRequest request, Exception exception)
            => exception is InvalidRequestException ? $"{request.Id}: {exception.Message}" : null;

        protected override Task WriteAsync(string reply, bool moreReady, CancellationToken cancellation)
        {
            Written.Add(reply);
            return Task.CompletedTask;
        }
    }
}
