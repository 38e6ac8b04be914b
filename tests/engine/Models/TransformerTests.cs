using Rollout.Kernels;
using Xunit;

namespace Rollout.Engine.Tests;

/// <summary>One token in double precision, where attention has one thing to look at: what the golden models do not have.</summary>
public sealed class TransformerTests
{
    [Theory]
    [InlineData("llama", true, false)]
    [InlineData("llama", true, true)]
    [InlineData("qwen3", true, false)]
    [InlineData("qwen2", false, true)]
    public async Task Every_bias_is_added_where_transformers_adds_it(string family, bool bias, bool tied)
    {
        PlainModel model = PlainModel.Of(
            family, layers: 2, heads: 4, kvHeads: 2, headDim: 6, hidden: 10, intermediate: 7, vocabulary: 33, bias, tied);
        Random random = new(11);
        Dictionary<string, PlainTensor> tensors = [];
        foreach (string name in model.Shapes.Keys)
        {
            byte[] bytes = new byte[model.Elements(name) * 2];
            for (int i = 0; i < bytes.Length; i += 2)
                BitConverter.TryWriteBytes(bytes.AsSpan(i), (ushort)(BitConverter.SingleToUInt32Bits(random.NextSingle() * 2 - 1) >> 16));
            tensors[name] = new PlainTensor(DType.BFloat16, bytes);
        }

        using TemporaryFolder folder = new();
        model.Save(folder, tensors, random);
        EngineOptions small = new() { MaxSequences = 1, MaxBatchTokens = 16, KvCacheBytes = 1 << 20 };
        await using RolloutEngine engine = RolloutEngine.Load(folder.Path, new CpuBackend(1), small);
        for (int token = 0; token < 5; token++)
        {
            GroupRequest request = new() { Id = $"{token}", Prompt = [token], MaxTokens = 0, PromptLogProbs = true, PromptTop = 33 };
            Group group = engine.Submit(request);
            await group.Completed.WaitAsync(TestContext.Current.CancellationToken);
            double[] expected = LogProbs(model.Spec, tensors, token);
            for (int k = 0; k < 33; k++) Assert.Equal(expected[group.PromptTopIds[k]], group.PromptTopLogProbs[k], 1e-4);
        }
    }

    /// <summary>Logits are computed for some rows at a time; which ones come together changes nothing.</summary>
    [Fact]
    public async Task More_rows_than_logits_are_computed_of_at_once_have_the_bits_they_have_alone()
    {
        GroupRequest request = new()
        {
            Id = "score",
            Prompt = [.. Enumerable.Range(0, 200).Select(i => i * 7 % 320)],
            MaxTokens = 0,
            PromptLogProbs = true,
            PromptTop = 3,
        };
        List<(float[] LogProbs, int[] Ids, float[] Top)> results = [];
        foreach (int tokens in (int[])[512, 200, 65, 64, 7])
        {
            await using RolloutEngine engine = TestModels.Load("qwen3", new EngineOptions { MaxBatchTokens = tokens, MaxSequences = 4 });
            Group group = engine.Submit(request);
            await group.Completed.WaitAsync(TestContext.Current.CancellationToken);
            results.Add(([.. group.PromptLogProbs], [.. group.PromptTopIds], [.. group.PromptTopLogProbs]));
        }

        Assert.Equal(199, results[0].LogProbs.Length);
        foreach ((float[] logProbs, int[] ids, float[] top) in results)
        {
            Assert.Equal(results[0].LogProbs, logProbs);
            Assert.Equal(results[0].Ids, ids);
            Assert.Equal(results[0].Top, top);
        }
    }

    private static double[] LogProbs(ModelSpec spec, Dictionary<string, PlainTensor> tensors, int token)
    {
        double[] hidden = [.. Row("model.embed_tokens", token, spec.HiddenSize)];
        for (int layer = 0; layer < spec.Layers.Count; layer++)
        {
            string at = $"model.layers.{layer}.";
            double[] value = Linear(at + "self_attn.v_proj", Norm(at + "input_layernorm", hidden));
            // Every query head reads the one value of its key-value head.
            AttentionSpec facts = spec.Attention;
            double[] attention = [.. Enumerable.Range(0, facts.QueryWidth)
                .Select(i => value[i / facts.HeadDim / (facts.Heads / facts.KvHeads) * facts.HeadDim + i % facts.HeadDim])];
            hidden = Sum(hidden, Linear(at + "self_attn.o_proj", attention));
            double[] normed = Norm(at + "post_attention_layernorm", hidden);
            double[] gated = [.. Linear(at + "mlp.gate_proj", normed)
                .Zip(Linear(at + "mlp.up_proj", normed), (gate, up) => gate / (1 + Math.Exp(-gate)) * up)];
            hidden = Sum(hidden, Linear(at + "mlp.down_proj", gated));
        }

        double[] last = Norm("model.norm", hidden);
        string head = spec.TiedHead ? "model.embed_tokens" : "lm_head";
        double[] logits = [.. Enumerable.Range(0, spec.VocabSize).Select(id => Dot(head, id, last))];
        double most = logits.Max(), sum = logits.Sum(logit => Math.Exp(logit - most));
        return [.. logits.Select(logit => logit - most - Math.Log(sum))];

        IEnumerable<double> Row(string name, int row, int columns)
            => Enumerable.Range(row * columns, columns).Select(i => (double)tensors[name + ".weight"][i]);

        double[] Sum(double[] a, double[] b) => [.. a.Zip(b, (x, y) => x + y)];

        double[] Norm(string name, double[] input)
        {
            double scale = 1 / Math.Sqrt(input.Sum(x => x * x) / input.Length + spec.RmsNormEpsilon);
            return [.. input.Select((x, i) => x * scale * tensors[name + ".weight"][i])];
        }

        double[] Linear(string name, double[] input)
        {
            int outputs = tensors[name + ".weight"].Elements / input.Length;
            PlainTensor? bias = tensors.GetValueOrDefault(name + ".bias");
            return [.. Enumerable.Range(0, outputs).Select(o => Dot(name, o, input) + (bias?[o] ?? 0))];
        }

        double Dot(string name, int row, double[] input) => Row(name, row, input.Length).Zip(input, (a, b) => a * b).Sum();
    }
}
