using CsCheck;
using Xunit;

namespace Rollout.Client.Tests;

public sealed class GroupAssemblyTests
{
    [Fact]
    public void Parts_become_one_sample()
    {
        GroupAssembly group = new("id", 1);
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
        GroupAssembly group = new("id", 1);
        Assert.Throws<RolloutException>(() => group.Add(Reply(Chunk(index, start, [1], 0))).ToList());
    }

    [Theory]
    [InlineData(0)] // twice the same
    [InlineData(1)] // half of it again
    [InlineData(3)] // a gap
    public void A_chunk_that_does_not_go_on_where_the_last_one_ended_is_an_error(uint start)
    {
        GroupAssembly group = new("id", 1);
        Assert.Empty(group.Add(Reply(Chunk(0, 0, [1, 2], 0))));
        Assert.Throws<RolloutException>(() => group.Add(Reply(Chunk(0, start, [3], 0))).ToList());
    }

    [Fact]
    public void A_log_probability_must_not_be_missing()
    {
        foreach (bool sampling in (bool[])[false, true])
        {
            V1.SampleChunk chunk = Chunk(0, 0, [1, 2], 0);
            (sampling ? chunk.SamplingLogprobs : chunk.Logprobs).RemoveAt(1);
            Assert.Throws<RolloutException>(() => new GroupAssembly("id", 1).Add(Reply(chunk)).ToList());
        }
    }

    [Fact]
    public void Nothing_comes_after_the_end_of_a_sample()
    {
        GroupAssembly group = new("id", 2);
        Assert.Single(group.Add(Reply(Chunk(0, 0, [1], 0, V1.FinishReason.Stop))));
        Assert.Throws<RolloutException>(() => group.Add(Reply(Chunk(0, 0, [1], 0, V1.FinishReason.Stop))).ToList());
        Assert.False(group.Complete);
    }

    // Number of tokens, and bit patterns of where the version grows and where the tokens are cut.
    private static readonly Gen<(int, int, int)[]> s_samples =
        Gen.Select(Gen.Int[0, 12], Gen.Int[0, 1 << 12], Gen.Int[0, 1 << 12]).Array[1, 4];

    /// <summary>
    /// A group's samples, with any versions, cut into chunks anywhere and interleaved, are assembled as if they had been sent whole.
    /// </summary>
    [Fact]
    public void Samples_cut_anywhere_and_mixed_come_out_whole() =>
        Gen.Select(s_samples, Gen.Int[0, 2], Gen.Int).Sample((samples, top, seed) =>
        {
            Random random = new(seed);
            GroupAssembly group = new("id", samples.Length);
            List<V1.SampleChunk>[] chunks =
                [.. samples.Select((sample, index) => Cut(index, sample.Item1, sample.Item2, sample.Item3, top))];
            Dictionary<int, Sample> ended = new();
            bool first = true;
            while (chunks.Any(rest => rest.Count > 0))
            {
                // A reply may carry several chunks, also several of one sample.
                V1.GenerateReply reply = Reply();
                for (int take = random.Next(1, 4); take > 0 && chunks.Any(rest => rest.Count > 0); take--)
                {
                    List<V1.SampleChunk>[] open = [.. chunks.Where(rest => rest.Count > 0)];
                    List<V1.SampleChunk> from = open[random.Next(open.Length)];
                    reply.Samples.Add(from[0]);
                    from.RemoveAt(0);
                }

                if (first)
                {
                    reply.Seed = ulong.MaxValue;
                    reply.Prompt = new V1.PromptInfo { Ids = { 8, 9 }, Logprobs = { -3 }, CachedTokens = 16 };
                }

                first = false;
                Assert.False(group.Complete);
                foreach (Sample sample in group.Add(reply))
                    ended.Add(sample.Index, sample);
            }

            Assert.True(group.Complete);
            for (int index = 0; index < samples.Length; index++)
            {
                (int count, int versions, _) = samples[index];
                Sample sample = ended[index];
                Assert.Equal(Enumerable.Range(0, count).Select(i => Token(index, i)), sample.Ids);
                Assert.Equal(sample.Ids.Select(id => -1f * id), sample.LogProbs);
                Assert.Equal(sample.Ids.Select(id => -2f * id), sample.SamplingLogProbs);
                Assert.Equal(string.Concat(sample.Ids.Select(id => $"{id},")), sample.Text);
                Assert.Equal((ulong.MaxValue, "id"), (sample.Seed, sample.RequestId));
                Assert.Equal([8, 9], sample.Prompt!.Ids);
                Assert.Equal([-3f], sample.Prompt.LogProbs);
                Assert.Equal(16, sample.Prompt.CachedTokens);
                Assert.Equal(index % 2 == 0 ? FinishReason.Stop : FinishReason.Error, sample.FinishReason);
                Assert.Equal(index % 2 == 0 ? "" : "why", sample.Error);
                if (top == 0 || count == 0)
                    Assert.Null(sample.Top);
                else
                    Assert.Equal((top, count), (sample.Top!.K, sample.Top.Rows));
                int[] alternatives = [.. sample.Ids.SelectMany(id => Enumerable.Range(id, top))];
                Assert.Equal(alternatives, sample.Top?.Ids ?? []);
                Assert.Equal(alternatives.Select(id => -0.5f * id), sample.Top?.LogProbs ?? []);

                // Each token's version, in order, without gaps; adjacent spans differ.
                ulong[] drawn = [.. sample.Versions.SelectMany(span => Enumerable.Repeat(span.Version, span.End - span.Start))];
                Assert.Equal(Enumerable.Range(0, count).Select(i => Version(versions, i)), drawn);
                Assert.Equal(0, sample.Versions.Count == 0 ? 0 : sample.Versions[0].Start);
                Assert.All(sample.Versions.Zip(sample.Versions.Skip(1)), pair =>
                {
                    Assert.Equal(pair.First.End, pair.Second.Start);
                    Assert.NotEqual(pair.First.Version, pair.Second.Version);
                });
                Assert.Equal(3UL, sample.OldestKvVersion);
            }
        });

    // Bit i of the pattern: whether the version grows at token i.
    private static ulong Version(int pattern, int token) => 5 + (ulong)int.PopCount(pattern & ((1 << token) - 1));

    private static int Token(int index, int i) => (1000 * index) + i + 1;

    /// <summary>One sample's chunks, cut after token i where bit i is set. The oldest KV version may be in any of them.</summary>
    private static List<V1.SampleChunk> Cut(int index, int count, int versions, int cuts, int top)
    {
        List<V1.SampleChunk> chunks = [];
        for (int start = 0, end; start < count || chunks.Count == 0; start = end)
        {
            for (end = start + 1; end < count && (cuts >> end & 1) == 0; end++) { }
            end = Math.Min(end, count);
            int[] ids = [.. Enumerable.Range(start, end - start).Select(i => Token(index, i))];
            V1.SampleChunk chunk = new()
            {
                Index = (uint)index,
                Start = (uint)start,
                Ids = { ids.Select(id => (uint)id) },
                Logprobs = { ids.Select(id => -1f * id) },
                SamplingLogprobs = { ids.Select(id => -2f * id) },
                Text = string.Concat(ids.Select(id => $"{id},")),
                OldestKvVersion = 4,
            };
            for (int i = start; i < end; i++)
            {
                ulong version = Version(versions, i);
                if (chunk.Versions.Count > 0 && chunk.Versions[^1].Version == version)
                    chunk.Versions[^1].End++;
                else
                    chunk.Versions.Add(new V1.VersionSpan { Version = version, Start = (uint)i, End = (uint)i + 1 });
            }

            if (top > 0 && ids.Length > 0)
            {
                IEnumerable<int> alternatives = ids.SelectMany(id => Enumerable.Range(0, top).Select(k => id + k));
                chunk.Top = new V1.TopLogprobs
                {
                    K = (uint)top,
                    Ids = { alternatives.Select(id => (uint)id) },
                    Logprobs = { alternatives.Select(id => -0.5f * id) },
                };
            }

            chunks.Add(chunk);
        }

        chunks[cuts % chunks.Count].OldestKvVersion = 3;
        V1.SampleChunk last = chunks[^1];
        (last.FinishReason, last.Error) = index % 2 == 0 ? (V1.FinishReason.Stop, "") : (V1.FinishReason.Error, "why");
        return chunks;
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
