using System.Diagnostics;
using System.Text;
using CsCheck;
using Xunit;

namespace Rollout.Engine.Tests;

public sealed class LoadPlanTests
{
    [Fact]
    public void Query_key_and_value_become_one_matrix_and_gate_and_up_another()
    {
        LoadPlan plan = LoadPlan.Compile(ModelSpec.Load(GoldenFiles.Get("qwen3")));

        Assert.True(plan.TryFind("model.layers.1.self_attn.k_proj.weight", out LoadEntry? key));
        Assert.Equal([64, 64], key.Shape);
        Assert.Equal(new LoadPiece(0, 64 * 64, SlotOf(plan, "model.layers.1.qkv", 256, 64), 128 * 64), Assert.Single(key.Pieces));
        Assert.True(plan.TryFind("model.layers.1.self_attn.v_proj.weight", out LoadEntry? value));
        Assert.Equal((128 + 64) * 64, Assert.Single(value.Pieces).Destination);
        Assert.True(plan.TryFind("model.layers.2.mlp.up_proj.weight", out LoadEntry? up));
        Assert.Equal(new LoadPiece(0, 160 * 64, SlotOf(plan, "model.layers.2.gate_up", 320, 64), 160 * 64), Assert.Single(up.Pieces));
        LoadPiece norm = Assert.Single(plan["model.layers.0.self_attn.q_norm.weight"].Pieces);
        Assert.Equal(SlotOf(plan, "model.layers.0.query_norm", 1, 32), norm.Slot);
        Assert.False(plan.TryFind("model.layers.3.mlp.up_proj.weight", out _));
        Assert.False(plan.TryFind("model.layers.0.self_attn.q_proj.bias", out _));
    }

    [Fact]
    public void Biases_are_fused_like_their_matrices()
    {
        LoadPlan plan = LoadPlan.Compile(ModelSpec.Load(GoldenFiles.Get("qwen2")));

        Assert.True(plan.TryFind("model.layers.0.self_attn.v_proj.bias", out LoadEntry? value));
        Assert.Equal([32], value.Shape);
        Assert.Equal(new LoadPiece(0, 32, SlotOf(plan, "model.layers.0.qkv_bias", 1, 128), 64 + 32), Assert.Single(value.Pieces));
    }

    [Fact]
    public void The_biases_of_llama_have_the_shapes_that_transformers_gives_them()
    {
        ModelSpec spec = ModelSpec.Parse("""
            {"model_type":"llama","vocab_size":11,"hidden_size":6,"intermediate_size":5,"num_hidden_layers":1,"num_attention_heads":4,
             "num_key_value_heads":2,"head_dim":8,"max_position_embeddings":9,"attention_bias":true,"mlp_bias":true}
            """u8);

        Assert.Equal(["mlp.down_proj.bias 6", "mlp.gate_proj.bias 5", "mlp.up_proj.bias 5", "self_attn.k_proj.bias 16",
            "self_attn.o_proj.bias 6", "self_attn.q_proj.bias 32", "self_attn.v_proj.bias 16"],
            spec.CheckpointTensors().Where(tensor => tensor.Name.EndsWith(".bias", StringComparison.Ordinal))
                .Select(tensor => $"{tensor.Name["model.layers.0.".Length..]} {string.Join(',', tensor.Shape)}")
                .Order(StringComparer.Ordinal));
    }

    [Fact]
    public void A_tied_model_accepts_a_head_and_does_not_use_it()
    {
        LoadPlan plan = LoadPlan.Compile(ModelSpec.Load(GoldenFiles.Get("llama3")));

        Assert.True(plan.TryFind("lm_head.weight", out LoadEntry? head));
        Assert.True(head.Tied);
        Assert.Equal([320, 64], head.Shape);
        Assert.Equal("model.embed_tokens.weight", head.TiedTo);
        Assert.DoesNotContain(plan.Weights, weight => weight.Name == "head");
        Assert.DoesNotContain(ModelSpec.Load(GoldenFiles.Get("llama3")).CheckpointTensors(), tensor => tensor.Name == "lm_head.weight");
    }

    [Fact]
    public void Every_element_of_every_weight_has_one_source() =>
        Gen.Select(Gen.OneOf("llama", "qwen2", "qwen3"), Gen.Int[1, 3], Gen.Int[1, 3], Gen.Int[1, 3], Gen.Bool, Gen.Bool, Gen.Bool)
            .Sample((family, layers, kvHeads, groups, bias, tied, large) =>
            {
                // The largest that a config may ask for: elements are counted beyond 2^31 and 2^32.
                (int vocabulary, int hidden, int intermediate) = large ? (1 << 24, 1 << 20, 1 << 22) : (11, 6, 5);
                LoadPlan plan = LoadPlan.Compile(ModelSpec.Parse(Encoding.UTF8.GetBytes($$"""
                    {"model_type":"{{family}}","vocab_size":{{vocabulary}},"hidden_size":{{hidden}},
                     "intermediate_size":{{intermediate}},"num_hidden_layers":{{layers}},
                     "num_attention_heads":{{kvHeads * groups}},"num_key_value_heads":{{kvHeads}},"head_dim":4,"max_position_embeddings":9,
                     "attention_bias":{{(bias ? "true" : "false")}},"mlp_bias":{{(bias ? "true" : "false")}},
                     "tie_word_embeddings":{{(tied ? "true" : "false")}}}
                    """)));

                Assert.Equal(plan.Weights.Count, plan.Weights.Select(weight => weight.Name).Distinct().Count());
                for (int slot = 0; slot < plan.Weights.Count; slot++)
                {
                    long next = 0L;
                    foreach (LoadPiece piece in plan.Entries.SelectMany(e => e.Pieces).Where(p => p.Slot.Index == slot)
                        .OrderBy(p => p.Destination))
                    {
                        Assert.Equal(next, piece.Destination);
                        next += piece.Elements;
                    }
                    Assert.Equal((long)plan.Weights[slot].Outputs * plan.Weights[slot].Inputs, next);
                }
                Assert.All(plan.Entries.Where(entry => !entry.Tied), entry =>
                {
                    Assert.Equal(entry.Shape.Aggregate((Int128)1, (product, length) => product * length), entry.Elements);
                    Assert.Equal(entry.Elements, entry.Pieces.Sum(piece => piece.Elements));
                });
            }, iter: 100);

    /// <summary>Mixtures of experts come to this: DeepSeek-V3 has 256 experts of three tensors in 58 layers.</summary>
    [Fact]
    public void Eighteen_thousand_tensors_are_planned_and_found_in_milliseconds()
    {
        const int Layers = 2000; // of nine tensors
        ModelSpec spec = ModelSpec.Parse(Encoding.UTF8.GetBytes($$"""
            {"model_type":"llama","vocab_size":11,"hidden_size":8,"intermediate_size":5,"num_hidden_layers":{{Layers}},
             "num_attention_heads":2,"max_position_embeddings":9}
            """));
        string[] names = spec.CheckpointTensors().Select(tensor => tensor.Name).ToArray();
        Assert.InRange(names.Length, 18_000, 19_000);
        TimeSpan best = Enumerable.Range(0, 5).Min(_ =>
        {
            long started = Stopwatch.GetTimestamp();
            LoadPlan plan = LoadPlan.Compile(spec);
            Assert.All(names, name => Assert.True(plan.TryFind(name, out LoadEntry? _)));
            return Stopwatch.GetElapsedTime(started);
        });

        Assert.True(best < TimeSpan.FromMilliseconds(50), $"took {best.TotalMilliseconds} ms");
    }

    private static WeightSlot SlotOf(LoadPlan plan, string name, int outputs, int inputs)
    {
        int slot = plan.Weights.ToList().FindIndex(weight => weight.Name == name);
        Assert.Equal(new PlannedWeight(name, outputs, inputs), plan.Weights[slot]);
        return new WeightSlot(slot);
    }
}
