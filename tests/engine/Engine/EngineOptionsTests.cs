using Rollout.Kernels;
using Xunit;

namespace Rollout.Engine.Tests;

/// <summary>The operator's settings, and the values derived without them.</summary>
public sealed class EngineOptionsTests
{
    private const int BlockBytes = 2 * 3 * 2 * 32 * sizeof(float) * KvCache.BlockTokens; // keys and values of three layers of qwen3
    private const int Positions = 512; // of qwen3

    [Theory]
    [InlineData(0, 4, Positions, 4 * Positions / 16)] // the model's own limit
    [InlineData(Positions + 1, 4, Positions, 4 * Positions / 16)]
    [InlineData(Positions - 1, 4, Positions - 1, 4 * Positions / 16)] // blocks are whole
    [InlineData(33, 2, 33, 6)]
    [InlineData(32, 2, 32, 4)]
    [InlineData(1, 1, 1, 1)]
    public async Task By_default_there_are_blocks_for_every_seat_at_full_length(
        int context, int seats, int maxContext, int blocks)
    {
        await using RolloutEngine engine = TestModels.Load("qwen3", new EngineOptions { MaxContext = context, MaxSequences = seats });
        Assert.Equal((maxContext, blocks), (engine.MaxContext, engine.Status.KvBlocksTotal));
    }

    [Theory]
    [InlineData(10L * BlockBytes, 0L, 0.0, 10, 160)] // at most the device's budget
    [InlineData(10L * BlockBytes - 1, 0L, 0.0, 9, 144)]
    [InlineData(0L, 0L, 0.0, 1, 16)] // at least one block, or nothing could run
    [InlineData(10L * BlockBytes, 20L * BlockBytes, 0.0, 20, 320)] // stated bytes are used
    [InlineData(10L * BlockBytes, 21L * BlockBytes - 1, 0.0, 20, 320)]
    [InlineData(10L * BlockBytes, 5L * BlockBytes, 0.0, 5, 80)]
    [InlineData(10L * BlockBytes, 1L, 0.0, 1, 16)]
    [InlineData(10L * BlockBytes, 100L * BlockBytes, 0.0, 100, Positions)] // also where that is more than all seats need
    [InlineData(10L * BlockBytes, 0L, 1.0, 80, Positions)]
    [InlineData(10L * BlockBytes, 0L, 0.5, 40, Positions)]
    public async Task Memory_for_keys_and_values_is_as_stated_or_the_devices_budget(
        long budget, long bytes, double part, int blocks, int maxContext)
    {
        ScriptedBackend backend = new() { CacheBudget = budget, FreeBytes = 80 * BlockBytes };
        EngineOptions options = new() { MaxSequences = 2, KvCacheBytes = bytes, KvCacheFraction = part };
        await using RolloutEngine engine = RolloutEngine.Load(TestModels.Folder("qwen3"), backend, options);
        Assert.Equal((blocks, maxContext), (engine.Status.KvBlocksTotal, engine.MaxContext));
    }

    [Theory]
    [InlineData(0, 1)] // the device's own 512
    [InlineData(101, 1)]
    [InlineData(100, 1)]
    [InlineData(99, 2)]
    [InlineData(25, 4)]
    [InlineData(1, 100)]
    public async Task A_prompt_is_prefilled_in_chunks_of_the_most_tokens_of_a_step(int batchTokens, int steps)
    {
        await using RolloutEngine engine = TestModels.Load("qwen3", new EngineOptions { MaxBatchTokens = batchTokens });
        await engine.RunAsync(new() { Id = "a", Prompt = [.. Enumerable.Range(3, 100)], MaxTokens = 1, IgnoreEos = true });
        await engine.AbortAsync(["nobody"]); // the last step is counted after its results are collected
        Assert.Equal((steps, 100), (engine.Status.Steps, engine.Status.PrefilledTokens));
    }

    [Theory]
    [InlineData(0, 2)] // the device's own 512
    [InlineData(599, 2)]
    [InlineData(600, 1)]
    public async Task Several_prompts_share_a_step_as_far_as_its_tokens_go(int batchTokens, int steps)
    {
        CancellationToken cancelled = TestContext.Current.CancellationToken;
        await using RolloutEngine engine = TestModels.Load("qwen3", new EngineOptions { MaxBatchTokens = batchTokens });
        await engine.PauseAsync(PauseMode.Keep, "the test", TimeSpan.FromMinutes(10), cancelled);
        GroupRequest request = new() { Id = "a", Prompt = [.. Enumerable.Range(3, 300)], MaxTokens = 1, IgnoreEos = true };
        Group[] groups = [engine.Submit(request), engine.Submit(request with { Id = "b", Prompt = [.. Enumerable.Range(4, 300)] })];
        await engine.ResumeAsync();
        await Task.WhenAll(groups.Select(group => group.Completed)).WaitAsync(TimeSpan.FromSeconds(30), cancelled);
        await engine.AbortAsync(["nobody"]); // the last step is counted after its results are collected
        Assert.Equal((steps, 600), (engine.Status.Steps, engine.Status.PrefilledTokens));
    }

    [Fact]
    public void What_makes_no_sense_is_refused()
    {
        EngineOptions[] bad =
        [
            new() { MaxContext = -1 },
            new() { MaxSequences = 0 },
            new() { MaxBatchTokens = -1 },
            new() { KvCacheBytes = -1 },
            new() { KvCacheFraction = -0.001 },
            new() { KvCacheFraction = 1.001 },
            new() { KvCacheFraction = double.NaN },
            new() { KvCacheFraction = 0.5, KvCacheBytes = 1 },
        ];
        foreach (EngineOptions options in bad)
            Assert.Throws<ArgumentOutOfRangeException>(() => TestModels.Load("qwen3", options));
    }
}
