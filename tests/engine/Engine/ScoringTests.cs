using Rollout.Kernels;
using Xunit;

namespace Rollout.Engine.Tests;

/// <summary>Log-probabilities of a prompt are those of one version, and the group says which.</summary>
public sealed class ScoringTests
{
    private static CancellationToken Cancelled => TestContext.Current.CancellationToken;

    public static TheoryData<UpdatePolicy, int, int, int> Cases
    {
        get
        {
            TheoryData<UpdatePolicy, int, int, int> all = [];
            foreach (UpdatePolicy policy in Enum.GetValues<UpdatePolicy>())
            {
                all.Add(policy, 7, 1, 0);   // score only
                all.Add(policy, 16, 1, 20); // chunks are blocks
                all.Add(policy, 7, 3, 20);
                all.Add(policy, 512, 3, 20); // the prompt is scored before the update comes
            }

            return all;
        }
    }

    /// <summary>An update comes after two steps: between two chunks of the prompt, or after two tokens.</summary>
    [Theory, MemberData(nameof(Cases))]
    public async Task An_update_in_the_middle_of_a_prompt_leaves_log_probabilities_of_one_version(
        UpdatePolicy policy, int chunk, int n, int maxTokens)
    {
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        await using RolloutEngine old = TestModels.Load("qwen3");
        await using RolloutEngine fresh = RolloutEngine.Load(payload.Folder, new CpuBackend(1), new EngineOptions());
        ScriptedBackend backend = new();
        await using RolloutEngine engine = RolloutEngine.Load(TestModels.Folder("qwen3"), backend, new() { MaxBatchTokens = chunk });
        GroupRequest request = new()
        {
            Id = "a",
            Prompt = [.. Enumerable.Range(3, 60)],
            N = n,
            MaxTokens = maxTokens,
            Seed = 9,
            IgnoreEos = true,
            PromptLogProbs = true,
            PromptTop = 2,
        };
        await engine.RunAsync(request with { Id = "leaves a prefix behind" });
        Group group = await engine.UpdateWhileAsync(backend, payload, policy, request, heldAfter: 2);
        if (policy == UpdatePolicy.Abort)
        {
            Assert.All(group.Sequences, sample => Assert.Equal(FinishReason.Abort, sample.FinishReason));
            return;
        }

        bool scoredBefore = policy == UpdatePolicy.Drain || chunk == 512;
        Assert.Equal(scoredBefore ? 0ul : 1ul, group.PromptVersion);
        Group expected = (scoredBefore ? old : fresh).Submit(request);
        await expected.Completed.WaitAsync(Cancelled);
        Assert.Equal(expected.PromptLogProbs, group.PromptLogProbs);
        Assert.Equal(expected.PromptTopIds, group.PromptTopIds);
        Assert.Equal(expected.PromptTopLogProbs, group.PromptTopLogProbs);
        Assert.All(group.Sequences, sample => Assert.Equal((FinishReason.Length, maxTokens), (sample.FinishReason, sample.Published)));
        if (policy == UpdatePolicy.Drain || chunk < 512)
        {
            Assert.Equal(expected.Sequences.Select(sample => sample.Bits()), group.Sequences.Select(sample => sample.Bits()));
            return;
        }

        Assert.All(group.Sequences, sample => Assert.Equal([0, 0, 1], sample.Versions(0, 3).ToArray()));
        Assert.All(group.Sequences, sample => Assert.Equal(policy == UpdatePolicy.Keep ? 0ul : 1ul, sample.OldestKvVersion));
    }

    /// <summary>The first sample computes the prompt for all: when it ends before that, the others compute it themselves.</summary>
    [Theory]
    [InlineData(UpdatePolicy.Keep)]
    [InlineData(UpdatePolicy.Recompute)]
    public async Task The_other_samples_of_a_group_go_on_when_the_first_goes_stale_in_the_prompt(UpdatePolicy policy)
    {
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        await using RolloutEngine fresh = RolloutEngine.Load(payload.Folder, new CpuBackend(1), new EngineOptions());
        ScriptedBackend backend = new();
        await using RolloutEngine engine = RolloutEngine.Load(TestModels.Folder("qwen3"), backend, new() { MaxBatchTokens = 16 });
        GroupRequest request = new()
        {
            Id = "a",
            Prompt = [.. Enumerable.Range(3, 60)],
            N = 3,
            MaxTokens = 5,
            IgnoreEos = true,
            MaxStaleness = 0,
        };
        Group group = await engine.UpdateWhileAsync(backend, payload, policy, request, heldAfter: 2);
        FinishReason expected = policy == UpdatePolicy.Keep ? FinishReason.Abort : FinishReason.Length;
        Assert.Equal(expected, group.Sequences[0].FinishReason);
        IReadOnlyList<Sequence> others = await fresh.RunAsync(request);
        Assert.Equal(others.Skip(1).Select(sample => sample.Bits()), group.Sequences.Skip(1).Select(sample => sample.Bits()));
        Assert.Equal(0, engine.Status.Waiting);
        await engine.RunAsync(request); // its id is free again
    }

    [Fact]
    public async Task A_prompt_that_is_scored_starts_again_under_keep_and_is_not_stale()
    {
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        ScriptedBackend backend = new();
        await using RolloutEngine engine = RolloutEngine.Load(TestModels.Folder("qwen3"), backend, new() { MaxBatchTokens = 16 });
        int[] prompt = [.. Enumerable.Range(3, 60)];
        GroupRequest request = new() { Id = "a", Prompt = prompt, MaxTokens = 0, PromptLogProbs = true, MaxStaleness = 0 };
        Group group = await engine.UpdateWhileAsync(backend, payload, UpdatePolicy.Keep, request, heldAfter: 2);
        Assert.Equal((FinishReason.Length, 1ul), (group.Sequences[0].FinishReason, group.PromptVersion));
    }

    [Theory]
    [InlineData(1, 0)]
    [InlineData(3, 5)]
    public async Task A_prompt_that_cannot_be_scored_ends_every_sample_with_the_reason(int n, int maxTokens)
    {
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        await using RolloutEngine engine = TestModels.Load("qwen3", new EngineOptions { MaxBatchTokens = 16 });
        long norm = payload.Manifest(0, 1).Tensors.Single(tensor => tensor.Name == "model.norm.weight").Offset;
        (payload.Bytes[norm], payload.Bytes[norm + 1]) = (0xFF, 0x7F); // NaN
        using WeightUpdate update = await engine.OpenUpdateAsync(payload.Manifest(0, 1));
        update.Write(0, payload.Bytes);
        await update.CommitAsync(default, Cancelled);
        IReadOnlyList<Sequence> samples = await engine.RunAsync(
            new() { Id = "a", Prompt = [.. Enumerable.Range(3, 60)], N = n, MaxTokens = maxTokens, PromptLogProbs = true });
        Assert.All(samples, sample => Assert.Equal((FinishReason.Error, 0), (sample.FinishReason, sample.Published)));
        Assert.All(samples, sample => Assert.Contains("version 1", sample.Error, StringComparison.Ordinal));
    }
}
