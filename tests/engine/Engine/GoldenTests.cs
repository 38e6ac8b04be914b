using System.Runtime.InteropServices;
using Xunit;

namespace Rollout.Engine.Tests;

/// <summary>The engine against Hugging Face transformers' outputs for the same weights.</summary>
public sealed class GoldenTests
{
    public static TheoryData<string> Families => [.. TestModels.Families];

    [Theory, MemberData(nameof(Families))]
    public async Task Greedy_continuations_are_equal_token_for_token(string family)
    {
        TestModels.Golden golden = TestModels.ReadGolden(family);
        await using RolloutEngine engine = TestModels.Load(family);
        for (int i = 0; i < golden.Prompts.Length; i++)
        {
            GroupRequest request = new()
            {
                Id = $"{i}",
                Prompt = golden.Prompts[i],
                Temperature = 0,
                IgnoreEos = true,
                MaxTokens = golden.Continuations[i].Tokens.Length,
            };
            Sequence sample = (await engine.RunAsync(request))[0];
            int n = sample.Published;
            Assert.Equal(golden.Continuations[i].Tokens, sample.Tokens(0, n).ToArray());
            float[] expected = golden.Continuations[i].LogProbs;
            for (int t = 0; t < n; t++) Assert.Equal(expected[t], sample.LogProbs(0, n)[t], 1e-3f);
            Assert.All(sample.SamplingLogProbs(0, n).ToArray(), value => Assert.Equal(0, value));
            Assert.Equal(FinishReason.Length, sample.FinishReason);
        }
    }

    /// <summary>
    /// The engine reports the whole vocabulary as alternatives. Log-probabilities and logits differ by a constant in each row.
    /// </summary>
    [Theory, MemberData(nameof(Families))]
    public async Task Log_probabilities_of_every_prompt_position_are_those_of_the_reference_logits(string family)
    {
        TestModels.Golden golden = TestModels.ReadGolden(family);
        await using RolloutEngine engine = TestModels.Load(family);
        using SafetensorsFile reference = SafetensorsFile.Open(Path.Combine(TestModels.Folder(family), "golden.safetensors"));
        int vocab = engine.Model.VocabSize;
        for (int i = 0; i < golden.Prompts.Length; i++)
        {
            Group group = engine.Submit(new GroupRequest
            {
                Id = $"{i}",
                Prompt = golden.Prompts[i],
                MaxTokens = 0,
                PromptLogProbs = true,
                PromptTop = vocab,
            });
            await group.Completed.WaitAsync(TimeSpan.FromSeconds(60), TestContext.Current.CancellationToken);
            TensorInfo info = reference.Tensors[$"logits.{i}"];
            float[] logits = new float[info.Elements];
            reference.Read(info, 0, MemoryMarshal.AsBytes(logits.AsSpan()));
            for (int position = 0; position < golden.Prompts[i].Length; position++)
            {
                double[] expected = LogSoftmax(logits.AsSpan(position * vocab, vocab));
                for (int k = 0; k < vocab; k++)
                {
                    int id = group.PromptTopIds[position * vocab + k];
                    Assert.Equal(expected[id], group.PromptTopLogProbs[position * vocab + k], 2e-3);
                }

                Assert.Equal(vocab, group.PromptTopIds.AsSpan(position * vocab, vocab).ToArray().Distinct().Count());
                if (position + 1 < golden.Prompts[i].Length)
                    Assert.Equal(expected[golden.Prompts[i][position + 1]], group.PromptLogProbs[position], 2e-3);
            }
        }
    }

    private static double[] LogSoftmax(ReadOnlySpan<float> logits)
    {
        double max = double.NegativeInfinity;
        foreach (float logit in logits) max = Math.Max(max, logit);
        double sum = 0;
        foreach (float logit in logits) sum += Math.Exp(logit - max);
        double[] result = new double[logits.Length];
        for (int i = 0; i < result.Length; i++) result[i] = logits[i] - max - Math.Log(sum);
        return result;
    }
}
