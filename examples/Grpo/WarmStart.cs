using TorchSharp;
using static TorchSharp.torch;

namespace Rollout.Examples.Grpo;

/// <summary>Supervised training on right answers, stopped while most of the policy's own answers are still wrong.</summary>
public static class WarmStart
{
    private const int BatchSize = 64;
    private const int MaxSteps = 600;
    private const double LearningRate = 3e-3;
    private const double EnoughReward = 0.18;

    /// <returns>The number of steps, and the expected reward of samples.</returns>
    public static (int Steps, double ExpectedReward) Run(Policy policy, MasterWeights weights, ArithmeticTask task)
    {
        double expected = 0.0;
        for (int step = 1; step <= MaxSteps; step++)
        {
            using DisposeScope scope = NewDisposeScope();
            Batch batch = new([.. task.NextTraining(BatchSize).Select(p => new BatchRow(p.Tokens, p.AnswerTokens))], policy.Device);
            Tensor logProbs = batch.LogProbs(policy);

            // A sample is right exactly when every token of the answer is drawn. The mean probability of that is the expected reward, so
            // no sampling is needed to decide when to stop.
            expected = (0.5 * expected) + (0.5 * (logProbs.detach() * batch.Weights).sum(1).exp().mean().item<float>());
            if (expected >= EnoughReward)
                return (step - 1, expected);

            (-batch.Mean(logProbs)).backward();
            weights.Step(LearningRate * Math.Min(1, step / 20.0));
        }

        return (MaxSteps, expected);
    }
}
