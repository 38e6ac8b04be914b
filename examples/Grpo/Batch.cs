using TorchSharp;
using static TorchSharp.torch;

namespace Rollout.Examples.Grpo;

/// <summary>A prompt and one completion of it, weighted by how often it was sampled.</summary>
public sealed record BatchRow(int[] Prompt, int[] Completion, float[]? LogProbs = null, float Advantage = 0, int Count = 1);

/// <summary>
/// Rows padded on the right to one length: with causal attention no token attends to the padding. Column t of the weights and behaviour
/// log-probabilities belongs to token t + 1, which the logits at t predict. Only completions have weight.
/// </summary>
public sealed class Batch
{
    public Batch(IReadOnlyList<BatchRow> rows, Device? device = null)
    {
        int length = rows.Max(r => r.Prompt.Length + r.Completion.Length);
        long[,] tokens = new long[rows.Count, length];
        float[,] weights = new float[rows.Count, length - 1];
        float[,] behaviour = new float[rows.Count, length - 1];
        float[,] advantages = new float[rows.Count, 1];
        for (int row = 0; row < rows.Count; row++)
        {
            (int[]? prompt, int[]? completion, float[]? logProbs, float advantage, int count) = rows[row];
            for (int i = 0; i < prompt.Length; i++)
                tokens[row, i] = prompt[i];
            for (int i = 0; i < completion.Length; i++)
            {
                tokens[row, prompt.Length + i] = completion[i];
                weights[row, prompt.Length + i - 1] = count;
                behaviour[row, prompt.Length + i - 1] = logProbs?[i] ?? 0;
            }

            advantages[row, 0] = advantage;
        }

        (Tokens, Weights) = (tensor(tokens, device: device), tensor(weights, device: device));
        (Behaviour, Advantages) = (tensor(behaviour, device: device), tensor(advantages, device: device));
    }

    public Tensor Tokens { get; }
    public Tensor Weights { get; }
    public Tensor Behaviour { get; }
    public Tensor Advantages { get; }

    /// <summary>The log-probability under a policy of every token but the first, given those before it.</summary>
    public Tensor LogProbs(Policy policy)
    {
        long length = Tokens.shape[1];
        Tensor logits = policy.forward(Tokens.slice(1, 0, length - 1, 1));
        return logits.log_softmax(-1).gather(-1, Tokens.slice(1, 1, length, 1).unsqueeze(-1)).squeeze(-1);
    }

    /// <summary>The mean over the tokens of all completions.</summary>
    public Tensor Mean(Tensor perToken) => (perToken * Weights).sum() / Weights.sum();
}
