using Xunit;

namespace Rollout.Engine.Tests;

/// <summary>Counts what the whole process allocates: nothing else may run beside it.</summary>
[CollectionDefinition(nameof(AllocationTests), DisableParallelization = true)]
[Collection(nameof(AllocationTests))]
public sealed class AllocationTests
{
    [Fact]
    public async Task A_decode_step_allocates_nothing_managed()
    {
        await using RolloutEngine engine = TestModels.Load("qwen3", threads: 2);
        GroupRequest request = new() { Id = "a", Prompt = [5, 6, 7, 8, 9], N = 16, MaxTokens = 450, Seed = 3, IgnoreEos = true };
        await engine.RunAsync(request with { Id = "warm-up" });
        Group group = engine.Submit(request);
        SpinWait.SpinUntil(() => group.Sequences[0].Published > 50);
        long before = GC.GetTotalAllocatedBytes(precise: true);
        int from = group.Sequences[0].Published;
        SpinWait.SpinUntil(() => group.Sequences[0].Published > 400);
        long allocated = GC.GetTotalAllocatedBytes(precise: true) - before;
        await group.Completed.WaitAsync(TestContext.Current.CancellationToken);
        // The test's own waiting allocates a little; 350 steps of one object each would be over 8 KB.
        Assert.True(allocated < 8 * 1024, $"{allocated} bytes in {400 - from} steps");
    }
}
