using TorchSharp;
using static TorchSharp.torch;

namespace Rollout.Examples.Grpo;

/// <summary>Measurements of one training step.</summary>
/// <param name="Loss">The clipped policy-gradient loss.</param>
/// <param name="Kl">Estimated KL divergence, in nats a token, from the policy after the warm start.</param>
/// <param name="Clipped">Share of the completion tokens whose ratio was clipped.</param>
/// <param name="GradientNorm">Norm of the gradients before they were clipped.</param>
/// <param name="LogProbDifference">Largest absolute difference between the engine's and the trainer's log-probabilities.</param>
public sealed record GrpoStats(double Loss, double Kl, double Clipped, double GradientNorm, double LogProbDifference);

/// <summary>Group relative policy optimisation (Shao et al. 2024): a policy gradient without a critic, clipped as in PPO.</summary>
public sealed class Grpo(Policy policy, Policy reference, MasterWeights weights)
{
    private const double LearningRate = 5e-4;
    private const double ClipLow = 0.2;
    private const double ClipHigh = 0.28;

    private int _step;

    /// <summary>Each sample's reward minus the group's mean, in standard deviations of the group; 0 where all rewards are equal.</summary>
    public static float[] Advantages(IReadOnlyList<double> rewards)
    {
        double mean = rewards.Average();
        double deviation = Math.Sqrt(rewards.Average(r => (r - mean) * (r - mean)));
        return [.. rewards.Select(r => (float)((r - mean) / (deviation + 1e-4)))];
    }

    public GrpoStats Step(IReadOnlyList<RolloutGroup> groups, IReadOnlyList<double[]> rewards)
    {
        using DisposeScope scope = NewDisposeScope();
        Batch batch = new([.. groups.Zip(rewards, Rows).SelectMany(rows => rows)], policy.Device);

        Tensor logProbs = batch.LogProbs(policy);
        Tensor ratio = (logProbs - batch.Behaviour).exp();
        Tensor clipped = ratio.clamp(1 - ClipLow, 1 + ClipHigh);
        Tensor loss = -batch.Mean(minimum(ratio * batch.Advantages, clipped * batch.Advantages));
        loss.backward();

        using IDisposable _ = no_grad();
        float difference = ((logProbs - batch.Behaviour) * batch.Weights.sign()).abs().max().item<float>();
        Tensor drift = batch.LogProbs(reference) - logProbs;
        float kl = batch.Mean(drift.exp() - drift - 1).item<float>();
        float clippedShare = batch.Mean(ratio.ne(clipped).to(float32)).item<float>();
        // The optimizer keeps the warm start's momentum; the learning rate is warmed up again.
        double gradientNorm = weights.Step(LearningRate * Math.Min(1, ++_step / 10.0));
        return new(loss.item<float>(), kl, clippedShare, gradientNorm, difference);
    }

    // Identical samples of a group, in tokens and log-probability bits, have the same gradient: one weighted row for all of them costs
    // less. Soon most samples are identical.
    private static IEnumerable<BatchRow> Rows(RolloutGroup rollouts, double[] rewards) =>
        from pair in rollouts.Samples.Zip(Advantages(rewards), (sample, advantage) => (sample, advantage))
        group pair by (string.Join(',', pair.sample.Tokens), string.Join(',', pair.sample.LogProbs)) into alike
        let first = alike.First()
        select new BatchRow(rollouts.Prompt, first.sample.Tokens, first.sample.LogProbs, first.advantage, alike.Count());
}
