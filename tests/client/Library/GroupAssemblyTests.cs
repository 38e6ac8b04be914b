using Xunit;

namespace Rollout.Client.Tests;

public sealed class GroupAssemblyTests
{
    [Fact]
    public void Parts_become_one_sample()
    {
        var group = new GroupAssembly("id", 1);
        V1.GenerateReply first = Reply(Chunk(0, 0, [1, 2], version: 3));
        first.Seed = 42;
        first.Prompt = new V1.PromptInfo { CachedTokens = 16 };
        Assert.Empty(group.Add(first));
        V1.SampleChunk more = Chunk(0, 2, [3], version: 3);
        more.Versions[0].Start = 2;
        Assert.Empty(group.Add(Reply(more)));
        V1.SampleChunk last = Chunk(0, 3, [4], version: 5, V1.FinishReason.Length);
        last.OldestKvVersion = 2;
        Sample sample = Assert.Single(group.Add(Reply(last)));

        Assert.True(group.Complete);
        Assert.Equal([1, 2, 3, 4], sample.Ids);
        Assert.Equal([-1f, -2f, -3f, -4f], sample.LogProbs);
        Assert.Equal([-2f, -4f, -6f, -8f], sample.SamplingLogProbs);
        Assert.Equal([new VersionSpan(3, 0, 3), new VersionSpan(5, 3, 4)], sample.Versions);
        Assert.Equal(2UL, sample.OldestKvVersion);
        Assert.Equal(42UL, sample.Seed);
        Assert.Equal(16, sample.Prompt!.CachedTokens);
        Assert.Equal(FinishReason.Length, sample.FinishReason);
        Assert.Equal("abcd", sample.Text);
    }

    [Theory]
    [InlineData(1, 0)] // not one of the group
    [InlineData(0, 1)] // a gap
    public void Chunks_that_do_not_fit_are_an_error(uint index, uint start)
    {
        var group = new GroupAssembly("id", 1);
        Assert.Throws<RolloutException>(() => group.Add(Reply(Chunk(index, start, [1], 0))).ToList());
    }

    [Fact]
    public void A_log_probability_must_not_be_missing()
    {
        V1.SampleChunk chunk = Chunk(0, 0, [1, 2], 0);
        chunk.Logprobs.RemoveAt(1);
        Assert.Throws<RolloutException>(() => new GroupAssembly("id", 1).Add(Reply(chunk)).ToList());
    }

    [Fact]
    public void Nothing_comes_after_the_end_of_a_sample()
    {
        var group = new GroupAssembly("id", 2);
        Assert.Single(group.Add(Reply(Chunk(0, 0, [1], 0, V1.FinishReason.Stop))));
        Assert.Throws<RolloutException>(() => group.Add(Reply(Chunk(0, 0, [1], 0, V1.FinishReason.Stop))).ToList());
        Assert.False(group.Complete);
    }

    internal static V1.GenerateReply Reply(params V1.SampleChunk[] chunks) => new() { RequestId = "id", Samples = { chunks } };

    internal static V1.SampleChunk Chunk(
        uint index, uint start, uint[] ids, ulong version, V1.FinishReason reason = V1.FinishReason.Unspecified) => new()
        {
            Index = index,
            Start = start,
            Ids = { ids },
            Logprobs = { ids.Select(id => -(float)id) },
            SamplingLogprobs = { ids.Select(id => -2f * id) },
            Versions = { new V1.VersionSpan { Version = version, Start = start, End = start + (uint)ids.Length } },
            OldestKvVersion = version,
            Text = string.Concat(ids.Select(id => (char)('a' + id - 1))),
            FinishReason = reason,
        };
}
