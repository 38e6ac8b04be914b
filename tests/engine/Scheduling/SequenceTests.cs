using Rollout.Kernels;
using Xunit;

namespace Rollout.Engine.Tests;

public sealed class SequenceTests
{
    [Theory]
    [InlineData(4096)]
    [InlineData(4097)]
    [InlineData(131_072)]
    public void A_long_sample_keeps_everything_it_has_and_a_reader_of_before_too(int length)
    {
        Sequence sequence = new(0, [1, 2, 3], length, topLogProbs: 2);
        ReadOnlySpan<ulong> early = default;
        for (int i = 0; i < length; i++)
        {
            SampleResult result = new() { Token = i, LogProb = -i, SamplingLogProb = 0.5f * i };
            sequence.Append(result, [i, i + 1], [-i, -i - 1], version: (ulong)i);
            sequence.Publish();
            if (i == 4000) early = sequence.Versions(0, i + 1);
        }

        int[] all = [.. Enumerable.Range(0, length)];
        Assert.Equal(length, sequence.Published);
        Assert.Equal([1, 2, 3, .. all], sequence.AllTokens.ToArray());
        Assert.Equal(all, sequence.Tokens(0, length).ToArray());
        Assert.Equal(all.Select(i => (float)-i), sequence.LogProbs(0, length).ToArray());
        Assert.Equal(all.Select(i => 0.5f * i), sequence.SamplingLogProbs(0, length).ToArray());
        Assert.Equal(all.Select(i => (ulong)i), sequence.Versions(0, length).ToArray());
        Assert.Equal(all.Skip(length / 2).Select(i => (ulong)i), sequence.Versions(length / 2, length).ToArray());
        Assert.Equal(all.SelectMany(i => new[] { i, i + 1 }), sequence.TopIds(0, length).ToArray());
        Assert.Equal(all.SelectMany(i => new[] { (float)-i, -i - 1 }), sequence.TopLogProbValues(0, length).ToArray());
        Assert.Equal(4000ul, early[^1]);
        Assert.Equal((0, 4001), ((int)early[0], early.Length));
    }
}
