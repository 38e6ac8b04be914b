namespace Rollout.Examples.Grpo;

/// <summary>One sampled completion, the log-probability the engine gave each token, and the version of the weights that did.</summary>
public sealed record RolloutSample(int[] Tokens, float[] LogProbs, long Version);

/// <summary>All samples of one prompt.</summary>
public sealed record RolloutGroup(int[] Prompt, IReadOnlyList<RolloutSample> Samples);

/// <summary>What GRPO needs of an inference engine.</summary>
public interface IRollouts : IAsyncDisposable
{
    /// <summary>Samples <paramref name="n"/> completions of every prompt; temperature 0 takes the likeliest token.</summary>
    Task<IReadOnlyList<RolloutGroup>> SampleAsync(
        IReadOnlyList<int[]> prompts, int n, int maxTokens, double temperature, ulong seed, CancellationToken cancellation = default);

    /// <summary>Puts the policy's present weights into the engine, as bf16, as one transaction.</summary>
    Task PushAsync(Policy policy, long version, CancellationToken cancellation = default);
}
