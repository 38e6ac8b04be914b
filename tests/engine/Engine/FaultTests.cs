using Xunit;

namespace Rollout.Engine.Tests;

/// <summary>A device that fails: every caller gets the error, and none keeps waiting.</summary>
public sealed class FaultTests
{
    [Fact]
    public async Task A_device_failure_ends_all_samples_with_the_reason_and_refuses_new_ones()
    {
        ScriptedBackend backend = new() { StepsLeft = 30 };
        await using RolloutEngine engine = RolloutEngine.Load(TestModels.Folder("qwen3"), backend, new EngineOptions { MaxSequences = 4 });
        GroupRequest request = new() { Id = "a", Prompt = [5, 6, 7], N = 6, MaxTokens = 400, IgnoreEos = true, StreamTokens = true };
        Group group = engine.Submit(request);
        Group waiting = engine.Submit(request with { Id = "b" });
        await Task.WhenAll(group.Completed, waiting.Completed).WaitAsync(TimeSpan.FromSeconds(30), TestContext.Current.CancellationToken);

        Assert.All(group.Sequences.Concat(waiting.Sequences), sample => Assert.Equal(FinishReason.Error, sample.FinishReason));
        Assert.All(group.Sequences, sample => Assert.Contains("device lost", sample.Error, StringComparison.Ordinal));
        Assert.True(group.Sequences[0].Published > 10); // what was sampled before is kept
        Assert.Equal(EngineState.Faulted, engine.Status.State);
        Assert.Contains("device lost", engine.Status.Reason, StringComparison.Ordinal);
        Assert.Throws<EngineFaultedException>(() => engine.Submit(request with { Id = "c" }));
        await Assert.ThrowsAsync<EngineFaultedException>(() => engine.ResumeAsync());
        Assert.Equal(0, (await engine.AbortAsync(ids: null)).Groups);
    }
}
