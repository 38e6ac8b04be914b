using Rollout.Client.Torch;
using Rollout.Examples.Grpo;
using TorchSharp;
using Xunit;
using static TorchSharp.torch;

namespace Rollout.Client.Tests;

public sealed class GrpoTests
{
    static GrpoTests() => TorchNative.EnsureLoaded();

    [Fact]
    public void Held_out_problems_are_never_trained_on_in_either_order()
    {
        ArithmeticTask task = new(1);
        HashSet<string> training = task.Training.Select(p => p.Prompt).ToHashSet();
        Assert.Equal(90 * 90, training.Count + task.HeldOut.Count);
        foreach (Problem problem in task.HeldOut)
        {
            string[] numbers = problem.Prompt.TrimEnd('=').Split('+');
            Assert.DoesNotContain(problem.Prompt, training);
            Assert.DoesNotContain($"{numbers[1]}+{numbers[0]}=", training);
        }

        Assert.Equal(task.HeldOut.Select(p => p.Prompt), new ArithmeticTask(2).HeldOut.Select(p => p.Prompt));
    }

    [Fact]
    public void Only_the_exact_answer_with_its_end_is_rewarded()
    {
        Problem problem = new ArithmeticTask(1).Training.Single(p => p.Prompt == "47+85=");
        Assert.Equal("231", problem.Answer);
        Assert.Equal(1, ArithmeticTask.Reward(problem, [.. "231".Select(c => (int)c), ArithmeticTask.EndOfText]));
        Assert.Equal(0, ArithmeticTask.Reward(problem, [.. "231".Select(c => (int)c)]));
        Assert.Equal(0, ArithmeticTask.Reward(problem, [.. "132".Select(c => (int)c), ArithmeticTask.EndOfText]));
        Assert.Equal(0, ArithmeticTask.Reward(problem, []));
    }

    [Fact]
    public void Advantages_are_relative_to_the_group_and_zero_where_all_are_alike()
    {
        Assert.All(Grpo.Advantages([1, 1, 1]), a => Assert.Equal(0, a));
        float[] advantages = Grpo.Advantages([1, 0, 0, 0]);
        Assert.Equal(0, advantages.Sum(), 1e-3);
        Assert.Equal(Math.Sqrt(3), advantages[0], 1e-2);
    }

    [Fact]
    public void A_step_makes_the_rewarded_answer_likelier_in_weights_that_bfloat16_holds()
    {
        manual_seed(1);
        using Policy policy = new(new PolicyConfig { VocabSize = ArithmeticTask.VocabSize, NumHiddenLayers = 1, HiddenSize = 32 });
        using MasterWeights weights = new(policy);
        using Policy reference = policy.Freeze();
        int[] prompt = ArithmeticTask.Encode("12+34=");
        int[] right = [.. ArithmeticTask.Encode("64"), ArithmeticTask.EndOfText];
        int[] wrong = [.. ArithmeticTask.Encode("46"), ArithmeticTask.EndOfText];
        Grpo grpo = new(policy, reference, weights);
        float[] before = LogProbs(policy, prompt, right);
        for (int step = 0; step < 5; step++)
        {
            // Two of the three samples are alike, and count as two.
            RolloutSample Sample(int[] tokens) => new(tokens, LogProbs(policy, prompt, tokens), (ulong)step);
            GrpoStats stats = grpo.Step([new(prompt, [Sample(right), Sample(wrong), Sample(wrong)])], [[1, 0, 0]]);
            Assert.InRange(stats.LogProbDifference, 0, 1e-4);
            Assert.Equal(0, stats.Clipped);
        }

        Assert.True(LogProbs(policy, prompt, right).Sum() > before.Sum() + 0.01);
        using DisposeScope scope = NewDisposeScope();
        Assert.All(policy.parameters(), p => Assert.True(p.equal(p.to(bfloat16).to(float32)).all().item<bool>()));
    }

    /// <summary>Distance of the policy from the one that sampled: the log-ratio of each token of two samples.</summary>
    [Theory]
    [InlineData(0, 0, true)]
    [InlineData(0.24, -0.24, true)] // 1.27: the better one may still become more likely
    [InlineData(0.26, -0.22, true)] // 0.80: the worse one may still become less likely
    [InlineData(0.26, -0.24, false)] // both are clipped
    [InlineData(2, -2, false)]
    [InlineData(-2, -2, true)] // the better one has become less likely: never clipped
    [InlineData(2, 2, true)] // the worse one has become more likely: never clipped
    public void A_sample_that_has_moved_far_enough_its_way_moves_no_further(double better, double worse, bool moves)
    {
        manual_seed(1);
        using Policy policy = new(new PolicyConfig { VocabSize = ArithmeticTask.VocabSize, NumHiddenLayers = 1, HiddenSize = 32 });
        using MasterWeights weights = new(policy);
        using Policy reference = policy.Freeze();
        int[] prompt = ArithmeticTask.Encode("12+34=");
        RolloutSample Sample(string text, double moved)
        {
            int[] tokens = ArithmeticTask.Encode(text);
            return new(tokens, [.. LogProbs(policy, prompt, tokens).Select(logProb => logProb - (float)moved)], 0);
        }

        GrpoStats stats = new Grpo(policy, reference, weights).Step([new(prompt, [Sample("64", better), Sample("46", worse)])], [[1, 0]]);
        Assert.Equal(moves, stats.GradientNorm > 1e-6);
        Assert.Equal(Math.Max(Math.Abs(better), Math.Abs(worse)), stats.LogProbDifference, 1e-4);
        double clipped = (better is > 0.247 or < -0.223 ? 0.5 : 0) + (worse is > 0.247 or < -0.223 ? 0.5 : 0);
        Assert.Equal(clipped, stats.Clipped, 1e-6);
    }

    [Fact]
    public void Samples_that_are_alike_count_as_often_as_they_were_drawn()
    {
        (double Loss, double GradientNorm) Step(float apart)
        {
            manual_seed(1);
            using Policy policy = new(
                new PolicyConfig { VocabSize = ArithmeticTask.VocabSize, NumHiddenLayers = 1, HiddenSize = 32 });
            using MasterWeights weights = new(policy);
            using Policy reference = policy.Freeze();
            int[] prompt = ArithmeticTask.Encode("12+34=");
            RolloutSample Sample(string text, float apart)
            {
                int[] tokens = ArithmeticTask.Encode(text);
                return new(tokens, [.. LogProbs(policy, prompt, tokens).Select(logProb => logProb + 0.1f + apart)], 0);
            }

            // With a tiny difference none are identical, and each is computed.
            RolloutGroup[] groups = [new(prompt, [Sample("64", 0), Sample("4631", 0), Sample("4631", apart), Sample("4631", -apart)])];
            GrpoStats stats = new Grpo(policy, reference, weights).Step(groups, [[1, 0, 0, 0]]);
            return (stats.Loss, stats.GradientNorm);
        }

        (double loss, double norm) = Step(0);
        (double expectedLoss, double expectedNorm) = Step(1e-5f);
        Assert.Equal(expectedLoss, loss, 1e-4 * Math.Abs(expectedLoss));
        Assert.Equal(expectedNorm, norm, 1e-3 * expectedNorm);
    }

    [Fact]
    public void A_step_starts_from_no_gradient()
    {
        manual_seed(1);
        using Policy policy = new(new PolicyConfig { VocabSize = ArithmeticTask.VocabSize, NumHiddenLayers = 1, HiddenSize = 32 });
        using MasterWeights weights = new(policy);
        using Policy reference = policy.Freeze();
        int[] prompt = ArithmeticTask.Encode("12+34=");
        Grpo grpo = new(policy, reference, weights);
        RolloutSample Sample(string text) => new(ArithmeticTask.Encode(text), LogProbs(policy, prompt, ArithmeticTask.Encode(text)), 0);
        Assert.True(grpo.Step([new(prompt, [Sample("64"), Sample("46")])], [[1, 0]]).GradientNorm > 1e-3);
        // Where all samples are worth the same there is nothing to learn.
        Assert.Equal(0, grpo.Step([new(prompt, [Sample("64"), Sample("46")])], [[1, 1]]).GradientNorm, 1e-9);
    }

    [Fact]
    public void Padding_changes_no_log_probability()
    {
        using DisposeScope scope = NewDisposeScope();
        using IDisposable _ = no_grad();
        using Policy policy = new(new PolicyConfig { VocabSize = ArithmeticTask.VocabSize, NumHiddenLayers = 1, HiddenSize = 32 });
        (int[]? prompt, int[]? answer) = (ArithmeticTask.Encode("1+2="), ArithmeticTask.Encode("3"));
        Batch together = new([new(prompt, answer), new(ArithmeticTask.Encode("10+20="), ArithmeticTask.Encode("0300"))]);
        float padded = together.LogProbs(policy).data<float>().ToArray()[prompt.Length - 1];
        Assert.Equal(LogProbs(policy, prompt, answer)[0], padded, 1e-5f);
        Assert.Equal(5, together.Weights.sum().item<float>());
    }

    private static float[] LogProbs(Policy policy, int[] prompt, int[] completion)
    {
        using DisposeScope scope = NewDisposeScope();
        using IDisposable _ = no_grad();
        return new Batch([new(prompt, completion)]).LogProbs(policy).data<float>().ToArray()[(prompt.Length - 1)..];
    }
}
