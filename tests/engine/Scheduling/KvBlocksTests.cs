using Rollout.Kernels;
using Xunit;

namespace Rollout.Engine.Tests;

/// <summary>The pool of KV blocks and its prefix cache: hits, misses, and the order of eviction.</summary>
public sealed class KvBlocksTests
{
    private const int B = KvCache.BlockTokens;

    [Fact]
    public void A_block_is_found_after_its_own_past_only()
    {
        KvBlocks blocks = new(40);
        Compute(blocks, [.. Block('x'), .. Block('y'), 1]);
        Compute(blocks, [.. Block('z'), 1]);
        Assert.Equal(2 * B, Found(blocks, [.. Block('x'), .. Block('y'), 1]));
        Assert.Equal(1 * B, Found(blocks, [.. Block('x'), .. Block('x'), .. Block('y'), 1]));
        Assert.Equal(1 * B, Found(blocks, [.. Block('z'), .. Block('y'), 1])); // y was computed after x
        Assert.Equal(1 * B, Found(blocks, [.. Block('x'), .. Block('z'), 1])); // z was computed after nothing
        Assert.Equal(0, Found(blocks, [.. Block('y'), 1]));
    }

    [Fact]
    public void A_prefix_is_found_under_its_own_version_and_salt_only()
    {
        KvBlocks blocks = new(20);
        Compute(blocks, [.. Block('x'), .. Block('y'), 1], version: 1, salt: 5);
        Assert.Equal(2 * B, Found(blocks, [.. Block('x'), .. Block('y'), 1], version: 1, salt: 5));
        Assert.Equal(0, Found(blocks, [.. Block('x'), .. Block('y'), 1], version: 2, salt: 5));
        Assert.Equal(0, Found(blocks, [.. Block('x'), .. Block('y'), 1], version: 1, salt: 0));
        Assert.Equal(0, Found(blocks, [.. Block('x'), .. Block('y'), 1], version: 0, salt: 5));
    }

    [Theory]
    [InlineData(1, 0)]
    [InlineData(B - 1, 0)]
    [InlineData(B, 0)] // a step needs a row to get logits from
    [InlineData(B + 1, B)]
    [InlineData(2 * B, B)]
    [InlineData(2 * B + 1, 2 * B)]
    public void All_full_blocks_are_found_but_the_one_with_the_last_token(int tokens, int found)
    {
        KvBlocks blocks = new(20);
        int[] prompt = [.. Enumerable.Range(0, tokens)];
        Compute(blocks, prompt);
        Assert.Equal(found, Found(blocks, prompt));
    }

    [Fact]
    public void Blocks_computed_before_a_release_say_nothing_about_those_computed_after_it()
    {
        KvBlocks blocks = new(20);
        int[] prompt = [.. Block('x'), .. Block('y'), 1];
        Sequence sequence = Compute(blocks, prompt, keep: true);
        blocks.Release(sequence);
        blocks.ForgetCached();
        Assert.True(blocks.TryGrow(sequence, prompt.Length)); // as a prompt that is scored: computed, not found
        blocks.CacheFullBlocks(sequence, 0, 0);
        Assert.Equal(2 * B, Found(blocks, prompt));
        Assert.Equal(2 * B, Found(blocks, [.. prompt[..^1], .. Block('x'), .. Block('y'), 1]));
    }

    [Fact]
    public void Keys_and_values_of_mixed_versions_are_never_found()
    {
        KvBlocks blocks = new(20);
        int[] prompt = [.. Block('x'), .. Block('y'), 1];
        Sequence leader = New(prompt);
        leader.SingleVersionKv = false;
        Assert.True(blocks.TryGrow(leader, prompt.Length));
        leader.Computed = prompt.Length;
        blocks.CacheFullBlocks(leader, 1, 0);
        Assert.Equal(0, Found(blocks, prompt, version: 1));
    }

    [Fact]
    public void Evicted_blocks_are_not_found()
    {
        KvBlocks blocks = new(3);
        Compute(blocks, [.. Block('x'), .. Block('y'), 1]);
        Compute(blocks, [.. Block('z'), .. Block('z'), 1]); // needs all blocks
        Assert.Equal(0, Found(blocks, [.. Block('x'), .. Block('y'), 1]));
        Assert.Equal(2 * B, Found(blocks, [.. Block('z'), .. Block('z'), 1]));
    }

    [Fact]
    public void Empty_blocks_go_first_then_the_least_recently_used_prefix_from_its_end()
    {
        KvBlocks blocks = new(8);
        int[] first = [.. Block('x'), .. Block('y')];
        int[] second = [.. Block('z'), .. Block('w')];
        Compute(blocks, first);
        Compute(blocks, second);
        Assert.Equal(4, blocks.Cached);
        Use(first); // now the second was used longest ago
        Take(4, cachedLeft: 4); // the empty ones
        Take(5, cachedLeft: 3);
        Assert.Equal((2 * B, B), (Found(blocks, [.. first, 1]), Found(blocks, [.. second, 1])));
        Use(first);
        Take(6, cachedLeft: 2);
        Assert.Equal((2 * B, 0), (Found(blocks, [.. first, 1]), Found(blocks, [.. second, 1])));
        Take(7, cachedLeft: 1);
        Assert.Equal(B, Found(blocks, [.. first, 1]));

        void Use(int[] prompt) => Found(blocks, [.. prompt, 1]);

        void Take(int count, int cachedLeft)
        {
            Sequence sequence = New(new int[count * B]);
            Assert.True(blocks.TryGrow(sequence, count * B));
            Assert.Equal((count, cachedLeft), (blocks.Used, blocks.Cached));
            blocks.Release(sequence);
        }
    }

    [Fact]
    public void A_sequence_grows_as_long_as_the_blocks_it_lacks_are_free_and_not_one_further()
    {
        KvBlocks blocks = new(4);
        Sequence sequence = New(new int[5 * B]);
        Assert.True(blocks.TryGrow(sequence, 3 * B));
        Assert.True(blocks.TryGrow(sequence, 3 * B + 1)); // it has three: one is enough
        Assert.Equal((4, 0), (sequence.BlockCount, blocks.Free));
        Assert.True(blocks.TryGrow(sequence, 4 * B));
        Assert.False(blocks.TryGrow(sequence, 4 * B + 1));
        Assert.Equal((4, 4), (sequence.BlockCount, blocks.Used));
        blocks.Release(sequence);
        blocks.CheckInvariant(idle: true);
    }

    [Theory]
    [InlineData(B - 1, 0)]
    [InlineData(B, 1)]
    [InlineData(B + 1, 1)] // of a block, one token
    [InlineData(2 * B - 1, 1)]
    [InlineData(2 * B, 2)]
    public void A_fork_shares_full_blocks_and_copies_the_partial_one(int tokens, int shared)
    {
        KvBlocks blocks = new(5);
        Sequence leader = New(new int[tokens]);
        Sequence sibling = New(new int[tokens]);
        Assert.True(blocks.TryGrow(leader, tokens));
        Assert.True(blocks.TryFork(leader, sibling, tokens, out BlockCopy copy));
        Assert.Equal(leader.BlockCount, sibling.BlockCount);
        Assert.Equal(leader.BlockTable[..shared], sibling.BlockTable[..shared]);
        Assert.Equal(tokens % B == 0 ? -1 : leader.BlockTable[shared], copy.From);
        if (tokens % B != 0)
        {
            Assert.Equal(sibling.BlockTable[shared], copy.To);
            Assert.NotEqual(copy.From, copy.To);
        }

        blocks.Release(leader);
        Assert.Equal(sibling.BlockCount, blocks.Used);
        blocks.Release(sibling);
        blocks.CheckInvariant(idle: true);
    }

    [Fact]
    public void A_fork_for_which_no_block_is_free_gives_nothing()
    {
        KvBlocks blocks = new(2);
        Sequence leader = New(new int[B + 3]);
        Sequence sibling = New(new int[B + 3]);
        Assert.True(blocks.TryGrow(leader, B + 3));
        Assert.False(blocks.TryFork(leader, sibling, B + 3, out _));
        Assert.Equal((0, 2), (sibling.BlockCount, blocks.Used));
        blocks.Release(leader);
        blocks.CheckInvariant(idle: true);
    }

    private static int[] Block(char kind) => [.. Enumerable.Range(0, B).Select(i => kind * 100 + i)];

    private static Sequence New(int[] prompt) => new(0, prompt, 1, 0);

    /// <summary>A prompt is computed, and its blocks are given back.</summary>
    private static Sequence Compute(KvBlocks blocks, int[] prompt, ulong version = 0, UInt128 salt = default, bool keep = false)
    {
        Sequence sequence = New(prompt);
        Assert.True(blocks.TryGrow(sequence, prompt.Length));
        sequence.Computed = prompt.Length;
        blocks.CacheFullBlocks(sequence, version, salt);
        if (!keep) blocks.Release(sequence);
        blocks.CheckInvariant(idle: !keep);
        return sequence;
    }

    private static int Found(KvBlocks blocks, int[] prompt, ulong version = 0, UInt128 salt = default)
    {
        Sequence sequence = New(prompt);
        int found = blocks.AttachPrefix(sequence, version, salt);
        Assert.Equal(found, sequence.BlockCount * B);
        blocks.Release(sequence);
        blocks.CheckInvariant(idle: false);
        return found;
    }
}
