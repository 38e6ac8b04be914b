using TorchSharp;
using static TorchSharp.torch;

namespace Rollout.Examples.Grpo;

/// <summary>Supervised training on right answers, cut off while most of the policy's own answers are still wrong.</summary>
public static class WarmStart
{
    private const int Batch = 64;
    private const int MaxSteps = 600;
    private const double LearningRate = 3e-3;
    private const double EnoughReward = 0.2;

    /// <returns>The steps taken, and the reward that sampling may now expect.</returns>
    public static (int Steps, double ExpectedReward) Run(Policy policy, MasterWeights weights, ArithmeticTask task)
    {
        var expected = 0.0;
        for (var step = 1; step <= MaxSteps; step++)
        {
            using var scope = NewDisposeScope();
            var (tokens, mask) = Pad(task.NextTraining(Batch));
            var logProbs = Grpo.LogProbs(policy, tokens) * mask;

            // A sample is right exactly when every token of the answer is drawn. The mean probability of that is the reward to expect,
            // so the moment to stop is known without sampling.
            expected = (0.7 * expected) + (0.3 * logProbs.detach().sum(1).exp().mean().item<float>());
            if (expected >= EnoughReward)
                return (step - 1, expected);

            (-logProbs.sum() / mask.sum()).backward();
            weights.Step(LearningRate * Math.Min(1, step / 20.0));
        }

        return (MaxSteps, expected);
    }

    private static (Tensor Tokens, Tensor Mask) Pad(IReadOnlyList<Problem> problems)
    {
        var rows = problems.Select(p => (Prompt: p.Tokens.Length, Tokens: (int[])
            [.. p.Tokens, .. ArithmeticTask.Encode(p.Answer), ArithmeticTask.EndOfText])).ToArray();
        var length = rows.Max(r => r.Tokens.Length);
        var tokens = new long[rows.Length, length];
        var mask = new float[rows.Length, length - 1];
        for (var row = 0; row < rows.Length; row++)
        {
            for (var i = 0; i < rows[row].Tokens.Length; i++)
            {
                tokens[row, i] = rows[row].Tokens[i];
                if (i >= rows[row].Prompt)
                    mask[row, i - 1] = 1;
            }
        }

        return (tensor(tokens), tensor(mask));
    }
}
