using TorchSharp;
using static TorchSharp.torch;

namespace Rollout.Examples.Grpo;

/// <summary>What one training step measured.</summary>
/// <param name="Loss">The clipped policy-gradient loss.</param>
/// <param name="Kl">Estimated KL divergence, in nats a token, from the policy after the warm start.</param>
/// <param name="Clipped">Share of the completion tokens whose ratio was clipped.</param>
/// <param name="GradientNorm">Norm of the gradients before they were clipped.</param>
/// <param name="LogProbDifference">Largest absolute difference between the engine's and the trainer's log-probabilities.</param>
public sealed record GrpoStats(double Loss, double Kl, double Clipped, double GradientNorm, double LogProbDifference);

/// <summary>Group relative policy optimisation (Shao et al. 2024), with the clipping of PPO.</summary>
public sealed class Grpo(Policy policy, Policy reference, MasterWeights weights)
{
    private const double LearningRate = 5e-4;
    private const double ClipLow = 0.2;
    private const double ClipHigh = 0.28;

    private int _step;

    /// <summary>How much better each sample was than its siblings, in standard deviations of the group; 0 where all were alike.</summary>
    public static float[] Advantages(IReadOnlyList<double> rewards)
    {
        var mean = rewards.Average();
        var deviation = Math.Sqrt(rewards.Average(r => (r - mean) * (r - mean)));
        return [.. rewards.Select(r => (float)((r - mean) / (deviation + 1e-4)))];
    }

    public GrpoStats Step(IReadOnlyList<RolloutGroup> groups, IReadOnlyList<double[]> rewards)
    {
        using var scope = NewDisposeScope();
        var batch = Pad(groups, rewards);
        var logProbs = LogProbs(policy, batch.Tokens);

        Tensor Mean(Tensor perToken) => (perToken * batch.Weight).sum() / batch.Weight.sum();
        var ratio = (logProbs - batch.Behaviour).exp();
        var clipped = ratio.clamp(1 - ClipLow, 1 + ClipHigh);
        var loss = -Mean(minimum(ratio * batch.Advantages, clipped * batch.Advantages));
        loss.backward();

        using var _ = no_grad();
        var difference = ((logProbs - batch.Behaviour) * batch.Weight.sign()).abs().max().item<float>();
        var drift = LogProbs(reference, batch.Tokens) - logProbs;
        var kl = Mean(drift.exp() - drift - 1).item<float>();
        var clippedShare = Mean(ratio.ne(clipped).to(float32)).item<float>();
        // The warm start's momentum is kept, but not its pace.
        var norm = weights.Step(LearningRate * Math.Min(1, ++_step / 10.0));
        return new(loss.item<float>(), kl, clippedShare, norm, difference);
    }

    /// <summary>The log-probability of every token but the first, given those before it.</summary>
    public static Tensor LogProbs(Policy policy, Tensor tokens)
    {
        var length = tokens.shape[1];
        var logits = policy.forward(tokens.slice(1, 0, length - 1, 1));
        return logits.log_softmax(-1).gather(-1, tokens.slice(1, 1, length, 1).unsqueeze(-1)).squeeze(-1);
    }

    // One row a distinct sample, padded on the right: with causal attention nothing sees the padding. Equal samples of a group have
    // equal rewards and log-probabilities, so one row that counts for all of them gives the same gradient for less work.
    // Column t of weight and behaviour belongs to token t + 1, as in LogProbs.
    private static (Tensor Tokens, Tensor Weight, Tensor Behaviour, Tensor Advantages) Pad(
        IReadOnlyList<RolloutGroup> groups, IReadOnlyList<double[]> rewards)
    {
        var rows = groups.Zip(rewards).SelectMany(pair => pair.First.Samples.Zip(Advantages(pair.Second))
            .GroupBy(s => string.Join(',', s.First.Tokens))
            .Select(same => (pair.First.Prompt, same.First().First.Tokens, same.First().First.LogProbs, Advantage: same.First().Second,
                Count: same.Count()))).ToArray();
        var length = rows.Max(r => r.Prompt.Length + r.Tokens.Length);
        var tokens = new long[rows.Length, length];
        float[,] weight = new float[rows.Length, length - 1], behaviour = new float[rows.Length, length - 1];
        var advantages = new float[rows.Length, 1];
        for (var row = 0; row < rows.Length; row++)
        {
            var (prompt, completion, logProbs, advantage, count) = rows[row];
            for (var i = 0; i < prompt.Length; i++)
                tokens[row, i] = prompt[i];
            for (var i = 0; i < completion.Length; i++)
            {
                tokens[row, prompt.Length + i] = completion[i];
                weight[row, prompt.Length + i - 1] = count;
                behaviour[row, prompt.Length + i - 1] = logProbs[i];
            }

            advantages[row, 0] = advantage;
        }

        return (tensor(tokens), tensor(weight), tensor(behaviour), tensor(advantages));
    }
}
