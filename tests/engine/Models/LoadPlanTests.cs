using System.Text;
using CsCheck;
using Xunit;

namespace Rollout.Engine.Tests;

public sealed class LoadPlanTests
{
    [Fact]
    public void Query_key_and_value_become_one_matrix_and_gate_and_up_another()
    {
        var plan = LoadPlan.Compile(ModelSpec.Load(GoldenFiles.Get("qwen3")));

        Assert.True(plan.TryFind("model.layers.1.self_attn.k_proj.weight", out var key));
        Assert.Equal(new WeightSlot(1, WeightKind.Qkv), key.Slot);
        Assert.Equal([64, 64], key.Shape);
        Assert.Equal(128 * 64, key.FirstElement);
        Assert.True(plan.TryFind("model.layers.1.self_attn.v_proj.weight", out var value));
        Assert.Equal((128 + 64) * 64, value.FirstElement);
        Assert.Contains(new WeightShape(key.Slot, 256, 64), plan.Weights);
        Assert.True(plan.TryFind("model.layers.2.mlp.up_proj.weight", out var up));
        Assert.Equal(new WeightSlot(2, WeightKind.GateUp), up.Slot);
        Assert.Equal(160 * 64, up.FirstElement);
        Assert.Contains(new WeightShape(up.Slot, 320, 64), plan.Weights);
        Assert.Contains(new WeightShape(new(0, WeightKind.QueryNorm), 1, 32), plan.Weights);
        Assert.False(plan.TryFind("model.layers.3.mlp.up_proj.weight", out _));
        Assert.False(plan.TryFind("model.layers.0.self_attn.q_proj.bias", out _));
    }

    [Fact]
    public void Biases_are_fused_like_their_matrices()
    {
        var plan = LoadPlan.Compile(ModelSpec.Load(GoldenFiles.Get("qwen2")));

        Assert.True(plan.TryFind("model.layers.0.self_attn.v_proj.bias", out var value));
        Assert.Equal([32], value.Shape);
        Assert.Equal(64 + 32, value.FirstElement);
        Assert.Contains(new WeightShape(new(0, WeightKind.QkvBias), 1, 128), plan.Weights);
    }

    [Fact]
    public void The_biases_of_llama_have_the_shapes_that_transformers_gives_them()
    {
        var spec = ModelSpec.Parse("""
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
        var plan = LoadPlan.Compile(ModelSpec.Load(GoldenFiles.Get("llama3")));

        Assert.True(plan.TryFind("lm_head.weight", out var head));
        Assert.True(head.Tied);
        Assert.Equal([320, 64], head.Shape);
        Assert.DoesNotContain(plan.Weights, weight => weight.Slot.Kind == WeightKind.Head);
        Assert.DoesNotContain(ModelSpec.Load(GoldenFiles.Get("llama3")).CheckpointTensors(), tensor => tensor.Name == "lm_head.weight");
    }

    [Fact]
    public void Every_element_of_every_weight_has_one_source() =>
        Gen.Select(Gen.OneOf("llama", "qwen2", "qwen3"), Gen.Int[1, 3], Gen.Int[1, 3], Gen.Int[1, 3], Gen.Bool, Gen.Bool, Gen.Bool)
            .Sample((family, layers, kvHeads, groups, bias, tied, large) =>
            {
                // The largest that a config may ask for: elements are counted beyond 2^31 and 2^32.
                var (vocabulary, hidden, intermediate) = large ? (1 << 24, 1 << 20, 1 << 22) : (11, 6, 5);
                var plan = LoadPlan.Compile(ModelSpec.Parse(Encoding.UTF8.GetBytes($$"""
                    {"model_type":"{{family}}","vocab_size":{{vocabulary}},"hidden_size":{{hidden}},
                     "intermediate_size":{{intermediate}},"num_hidden_layers":{{layers}},
                     "num_attention_heads":{{kvHeads * groups}},"num_key_value_heads":{{kvHeads}},"head_dim":4,"max_position_embeddings":9,
                     "attention_bias":{{(bias ? "true" : "false")}},"mlp_bias":{{(bias ? "true" : "false")}},
                     "tie_word_embeddings":{{(tied ? "true" : "false")}}}
                    """)));

                Assert.Equal(plan.Weights.Count, plan.Weights.Select(weight => weight.Slot).Distinct().Count());
                foreach (var weight in plan.Weights)
                {
                    var next = 0L;
                    foreach (var entry in plan.Entries.Where(e => e.Slot == weight.Slot && !e.Tied).OrderBy(e => e.FirstElement))
                    {
                        Assert.Equal(next, entry.FirstElement);
                        Assert.Equal(entry.Shape.Aggregate((Int128)1, (product, length) => product * length), entry.Elements);
                        next += entry.Elements;
                    }
                    Assert.Equal((long)weight.Outputs * weight.Inputs, next);
                }
                Assert.All(plan.Entries, entry => Assert.Contains(plan.Weights, weight => weight.Slot == entry.Slot));
            }, iter: 100);
}
