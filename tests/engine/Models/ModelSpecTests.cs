using System.Text;
using System.Text.Json;
using System.Text.Json.Nodes;
using CsCheck;
using Xunit;

namespace Rollout.Engine.Tests;

public sealed class ModelSpecTests : IDisposable
{
    private readonly TemporaryFolder _folder = new();

    public void Dispose() => _folder.Dispose();

    [Fact]
    public void Llama_config_reads_as_facts()
    {
        ModelSpec spec = ModelSpec.Load(GoldenFiles.Get("llama3"));

        Assert.Equal("llama", spec.ModelType);
        Assert.Equal(320, spec.VocabSize);
        Assert.Equal(64, spec.HiddenSize);
        Assert.Equal(160, spec.Mlp.Width);
        Assert.Equal(3, spec.Layers.Count);
        Assert.Single(spec.Layers.Distinct());
        Assert.Equal(8, spec.Attention.Heads);
        Assert.Equal(2, spec.Attention.KvHeads);
        Assert.Equal(16, spec.Attention.HeadDim);
        Assert.Equal(192, spec.Attention.QueryWidth + 2 * spec.Attention.KvWidth);
        Assert.Equal(512, spec.MaxPositions);
        Assert.Equal(1e-6f, spec.RmsNormEpsilon);
        Assert.Equal(new RopeSpec(RopeType.Llama3, 500000, 8, 1, 4, 64), spec.Attention.Rope);
        Assert.True(spec.TiedHead);
        Assert.False(spec.Attention.QkvBias || spec.Attention.OutputBias || spec.Mlp.Bias);
        Assert.Equal(QueryKeyNorm.None, spec.Attention.QueryKeyNorm);
        Assert.Equal([2], spec.EosTokenIds);
        Assert.Equal(1, spec.BosTokenId);
    }

    [Fact]
    public void Families_differ_by_facts()
    {
        AssertFacts("qwen2", qkv: true, tied: true, headDim: 16);
        AssertFacts("qwen3", norms: true, headDim: 32);
        ModelSpec biased = Parse("llama", config => { config["attention_bias"] = true; config["mlp_bias"] = true; });
        Assert.True(biased.Attention is { QkvBias: true, OutputBias: true } && biased.Mlp.Bias);
        // Fields of another family mean nothing: transformers does not read them either.
        ModelSpec ignored = Parse("qwen2", config => { config["attention_bias"] = false; config["mlp_bias"] = true; });
        Assert.True(ignored.Attention is { QkvBias: true, OutputBias: false } && !ignored.Mlp.Bias);

        static void AssertFacts(string family, int headDim, bool qkv = false, bool norms = false, bool tied = false)
        {
            ModelSpec spec = ModelSpec.Load(GoldenFiles.Get(family));
            AttentionSpec attention = spec.Attention;
            Assert.Equal((qkv, false, norms ? QueryKeyNorm.EachHead : QueryKeyNorm.None, headDim),
                (attention.QkvBias, attention.OutputBias, attention.QueryKeyNorm, attention.HeadDim));
            Assert.Equal((false, tied), (spec.Mlp.Bias, spec.TiedHead));
        }
    }

    [Theory]
    [InlineData("llama")]
    [InlineData("llama3")]
    [InlineData("qwen2")]
    [InlineData("qwen3")]
    public void A_checkpoint_of_transformers_has_the_tensors_that_are_expected(string model)
    {
        ModelSpec spec = ModelSpec.Load(GoldenFiles.Get(model));
        using Checkpoint checkpoint = Checkpoint.Open(GoldenFiles.Get(model));

        IOrderedEnumerable<string> expected = spec.CheckpointTensors().Select(t => $"{t.Name} {string.Join(',', t.Shape)}").Order();
        Assert.Equal(checkpoint.Tensors.Values.Select(t => $"{t.Info.Name} {string.Join(',', t.Info.Shape)}").Order(), expected);
    }

    [Fact]
    public void Inverse_frequencies_are_those_of_transformers()
    {
        using JsonDocument cases = JsonDocument.Parse(File.ReadAllBytes(GoldenFiles.Get("rope.json")));
        foreach (JsonElement reference in cases.RootElement.EnumerateArray())
        {
            int headDim = reference.GetProperty("head_dim").GetInt32();
            ModelSpec spec = Parse("llama", config =>
            {
                config["head_dim"] = headDim;
                config["rope_parameters"] = JsonNode.Parse(reference.GetProperty("rope_parameters").GetRawText());
            });
            int[] bits = reference.GetProperty("bits").EnumerateArray().Select(e => e.GetInt32()).ToArray();
            Assert.Equal(headDim / 2, bits.Length);
            // PyTorch's vectorised pow is not always correctly rounded: some of its numbers are one unit in the last place away.
            IEnumerable<int> distances = spec.Attention.Rope.InverseFrequencies(spec.Attention.HeadDim)
                .Zip(bits, (ours, theirs) => Math.Abs(BitConverter.SingleToInt32Bits(ours) - theirs));
            Assert.All(distances, distance => Assert.InRange(distance, 0, 1));
            Assert.InRange(distances.Count(distance => distance > 0), 0, headDim / 16);
        }
    }

    [Fact]
    public void The_layout_before_transformers_5_is_read_too()
    {
        RopeSpec expected = ModelSpec.Load(GoldenFiles.Get("llama3")).Attention.Rope;
        string old = """
            {"rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,"original_max_position_embeddings":64}
            """;
        Assert.Equal(expected, Parse("llama", config =>
        {
            config.Remove("rope_parameters");
            config["rope_theta"] = 500000;
            config["rope_scaling"] = JsonNode.Parse(old);
        }).Attention.Rope);
        // Both layouts in one file, as a program that wants to be read by old and new ones writes it.
        Assert.Equal(expected, Parse("llama3", config =>
        {
            config["rope_theta"] = 500000;
            config["rope_scaling"] = JsonNode.Parse(old);
        }).Attention.Rope);
        Assert.Equal(new RopeSpec(RopeType.Default, 5), Parse("qwen2", config =>
        {
            config["rope_parameters"] = null;
            config["rope_theta"] = 5;
            config["rope_scaling"] = null;
        }).Attention.Rope);
        Assert.Equal(new RopeSpec(RopeType.Linear, 10000, 2), Parse("qwen2", config =>
        {
            config["rope_parameters"] = null;
            config["rope_scaling"] = JsonNode.Parse("""{"type":"linear","factor":2}""");
        }).Attention.Rope);
    }

    [Fact]
    public void Absent_and_null_mean_the_default()
    {
        foreach (string name in (string[])["num_key_value_heads", "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
            "attention_bias", "mlp_bias", "head_dim", "hidden_act", "architectures", "eos_token_id", "bos_token_id"])
        {
            ModelSpec absent = Parse("llama", config => config.Remove(name));
            ModelSpec empty = Parse("llama", config => config[name] = null);
            Assert.Equal(absent with { EosTokenIds = [], Layers = [] }, empty with { EosTokenIds = [], Layers = [] });
            Assert.Equal(absent.Layers, empty.Layers);
            Assert.Equal(absent.EosTokenIds, empty.EosTokenIds);
        }
        Assert.Equal(4, Parse("llama", config => config.Remove("num_key_value_heads")).Attention.KvHeads);
        Assert.Equal(16, Parse("qwen2", config => config["head_dim"] = null).Attention.HeadDim);
        Assert.Equal(128, Parse("qwen3", config => config.Remove("head_dim")).Attention.HeadDim);
        Assert.Equal(new RopeSpec(RopeType.Default, 10000), Parse("llama", config => config.Remove("rope_parameters")).Attention.Rope);
        Assert.Null(Parse("llama", config => config.Remove("bos_token_id")).BosTokenId);
        Assert.Empty(Parse("llama", config => config.Remove("eos_token_id")).EosTokenIds);
    }

    [Fact]
    public void End_tokens_come_from_both_files()
    {
        Assert.Equal([5, 7], Parse("llama", config => config["eos_token_id"] = new JsonArray(5, 7, 5)).EosTokenIds);

        _folder.Write("config.json", File.ReadAllBytes(GoldenFiles.Get("qwen3", "config.json")));
        _folder.Write("generation_config.json", """{"eos_token_id":[9,2],"temperature":0.6}""");
        Assert.Equal([2, 9], ModelSpec.Load(_folder.Path).EosTokenIds);

        _folder.Write("generation_config.json", """{"eos_token_id":[320]}""");
        Assert.Contains("generation_config.json: eos_token_id must be a token id, or an array of them, from 0 to 319; it is 320",
            Assert.Throws<InvalidModelException>(() => ModelSpec.Load(_folder.Path)).Message);
    }

    [Theory]
    [InlineData("vocab_size", "null", "vocab_size must be an integer from 1 to 16777216; it is missing")]
    [InlineData("vocab_size", "0", "vocab_size must be an integer from 1 to 16777216; it is 0")]
    [InlineData("hidden_size", "\"64\"", "hidden_size must be an integer")]
    [InlineData("hidden_size", "64.5", "hidden_size must be an integer")]
    [InlineData("intermediate_size", "-1", "intermediate_size must be an integer")]
    [InlineData("num_hidden_layers", "1000000000000", "num_hidden_layers must be an integer")]
    [InlineData("num_attention_heads", "[4]", "num_attention_heads must be an integer")]
    [InlineData("num_key_value_heads", "3", "num_key_value_heads must divide num_attention_heads, 4; it is 3")]
    [InlineData("head_dim", "15", "head_dim must be even; it is 15")]
    [InlineData("max_position_embeddings", "null", "max_position_embeddings must be an integer")]
    [InlineData("rms_norm_eps", "0", "rms_norm_eps must be a number above 0, at most 1; it is 0")]
    [InlineData("rms_norm_eps", "1e999", "rms_norm_eps must be a number above 0, at most 1; it is 1e999")]
    [InlineData("rms_norm_eps", "1e308", "rms_norm_eps must be a number above 0, at most 1; it is 1e308")]
    [InlineData("rope_theta", "1e39", "rope_theta must be a number above 0; it is 1e39")]
    [InlineData("tie_word_embeddings", "1", "tie_word_embeddings must be true or false; it is 1")]
    [InlineData("eos_token_id", "320", "eos_token_id must be a token id")]
    [InlineData("eos_token_id", "[1,\"2\"]", "eos_token_id must be a token id")]
    [InlineData("bos_token_id", "-1", "bos_token_id must be an integer from 0 to 319")]
    [InlineData("model_type", "\"gpt2\"", "model_type must be one of llama, olmo2, qwen2, qwen3; it is \"gpt2\"")]
    [InlineData("model_type", "null", "model_type must be one of llama, olmo2, qwen2, qwen3; it is missing")]
    [InlineData("model_type", "7", "model_type must be a string")]
    [InlineData("architectures", "[\"MistralForCausalLM\"]", "architectures must begin with LlamaForCausalLM")]
    [InlineData("architectures", "\"LlamaForCausalLM\"", "architectures must be an array of strings")]
    [InlineData("hidden_act", "\"gelu\"", "hidden_act must be silu; it is \"gelu\"")]
    [InlineData("quantization_config", "{\"quant_method\":\"awq\"}", "quantization_config must be absent")]
    [InlineData("partial_rotary_factor", "0.5", "partial_rotary_factor must be 1")]
    [InlineData("layer_types", "[\"full_attention\",\"sliding_attention\"]", "layer_types must all be full_attention")]
    [InlineData("rope_parameters", "{\"rope_type\":\"yarn\",\"factor\":4}", "rope_parameters.rope_type must be one of default, linear")]
    [InlineData("rope_parameters", "{\"rope_type\":\"linear\"}", "rope_parameters.factor must be a number above 0; it is missing")]
    [InlineData("rope_parameters", "{\"full_attention\":{}}", "rope_parameters.full_attention must be a number or string")]
    [InlineData("rope_parameters", "{\"partial_rotary_factor\":0.5}", "rope_parameters.partial_rotary_factor must be 1")]
    [InlineData("rope_parameters", "7", "rope_parameters must be an object; it is 7")]
    [InlineData("rope_scaling", "{\"type\":\"dynamic\",\"factor\":2}", "rope_scaling.type must be one of default, linear, llama3; it is")]
    [InlineData("rope_scaling", "{\"type\":\"linear\",\"factor\":2}", "rope_parameters must agree with rope_scaling")]
    public void A_bad_field_is_named(string name, string json, string problem)
    {
        InvalidModelException error = Assert.Throws<InvalidModelException>(
            () => Parse("llama", config => config[name] = JsonNode.Parse(json)));
        Assert.Contains(problem, error.Message);
        Assert.Single(error.Problems);
    }

    [Fact]
    public void Llama3_rope_needs_its_bounds_in_order()
    {
        InvalidModelException error = Assert.Throws<InvalidModelException>(() => Parse("llama", config => config["rope_parameters"] =
            JsonNode.Parse("""{"rope_type":"llama3","factor":8,"low_freq_factor":4,"high_freq_factor":4}""")));
        Assert.Equal("rope_parameters.high_freq_factor must be a number above low_freq_factor, 4; it is 4", Assert.Single(error.Problems));
    }

    /// <summary>What transformers takes when config.json names only the sizes.</summary>
    [Theory]
    [InlineData("llama", 16, false, QueryKeyNorm.None)]
    [InlineData("olmo2", 16, false, QueryKeyNorm.AllHeads, NormPlacement.AfterBlock, 1e-5f)]
    [InlineData("qwen2", 16, true, QueryKeyNorm.None)]
    [InlineData("qwen3", 128, false, QueryKeyNorm.EachHead)]
    public void What_a_config_does_not_say_is_the_familys_default(
        string family, int headDim, bool qkvBias, QueryKeyNorm norm, NormPlacement norms = NormPlacement.BeforeBlock, float epsilon = 1e-6f)
    {
        ModelSpec spec = Minimal(family, "");
        AttentionSpec attention = spec.Attention;
        Assert.Equal((12, headDim, qkvBias, false, norm),
            (attention.KvHeads, attention.HeadDim, attention.QkvBias, attention.OutputBias, attention.QueryKeyNorm));
        Assert.Equal((epsilon, false, false, norms), (spec.RmsNormEpsilon, spec.TiedHead, spec.Mlp.Bias, spec.Layers[0].Norms));
        Assert.Equal(new RopeSpec(RopeType.Default, 10000), spec.Attention.Rope);
        Assert.Equal((0, null), (spec.EosTokenIds.Count, spec.BosTokenId));
        // 28 layers of full attention come before a window unless the config says otherwise; this model has three.
        ModelSpec windowed = Minimal(family, ""","use_sliding_window":true,"sliding_window":16""");
        Assert.Equal(spec with { EosTokenIds = [], Layers = [] }, windowed with { EosTokenIds = [], Layers = [] });
        Assert.Equal(spec.Layers, windowed.Layers);
    }

    [Theory]
    [InlineData("llama", true, false, true, true, false)]
    [InlineData("llama", false, true, false, false, true)]
    [InlineData("qwen2", true, true, true, false, false)]
    [InlineData("qwen3", true, true, true, true, false)]
    [InlineData("qwen3", false, true, false, false, false)]
    public void Each_kind_of_bias_has_its_own_field(string family, bool attentionField, bool mlpField, bool qkv, bool output, bool mlp)
    {
        ModelSpec spec = Parse(family, config => { config["attention_bias"] = attentionField; config["mlp_bias"] = mlpField; });
        Assert.Equal((qkv, output, mlp), (spec.Attention.QkvBias, spec.Attention.OutputBias, spec.Mlp.Bias));
    }

    [Fact]
    public void Layer_types_are_all_looked_at()
    {
        foreach (int at in (int[])[0, 1, 2])
        {
            JsonArray types = new("full_attention", "full_attention", "full_attention");
            types[at] = "sliding_attention";
            Assert.Throws<InvalidModelException>(() => Parse("qwen3", config => config["layer_types"] = types));
        }
    }

    [Fact]
    public void The_last_token_of_the_vocabulary_may_begin_and_end_a_text()
    {
        ModelSpec spec = Parse("llama", config => { config["bos_token_id"] = 319; config["eos_token_id"] = 319; });
        Assert.Equal((319, 319), (spec.BosTokenId!.Value, spec.EosTokenIds.Single()));
        Assert.Throws<InvalidModelException>(() => Parse("llama", config => config["bos_token_id"] = 320));
    }

    /// <summary>Llama 3.1's rule in double, with bounds that are not 1 and 4; frequencies meet all three of its cases.</summary>
    [Theory]
    [InlineData(128, 500000, 8, 1, 4, 8192)]
    [InlineData(128, 500000, 8, 2, 8, 8192)]
    [InlineData(64, 10000, 3, 0.5, 1.5, 4096)]
    [InlineData(64, 1000000, 32, 1.25, 2, 131072)]
    public void Low_frequencies_are_divided_high_ones_kept_and_those_between_blended(
        int headDim, double theta, double factor, double low, double high, int original)
    {
        float[] ours = new RopeSpec(RopeType.Llama3, theta, factor, low, high, original).InverseFrequencies(headDim);
        HashSet<string> met = [];
        for (int i = 0; i < headDim / 2; i++)
        {
            double plain = Math.Pow(theta, -2.0 * i / headDim);
            double turns = original * plain / (2 * Math.PI);
            double smooth = (turns - low) / (high - low);
            met.Add(turns < low ? "low" : turns > high ? "high" : "between");
            double expected = turns < low ? plain / factor : turns > high ? plain : (1 - smooth) * plain / factor + smooth * plain;
            Assert.Equal(1, ours[i] / expected, 1e-5);
        }
        Assert.Equal(3, met.Count);
    }

    [Fact]
    public void A_linear_factor_divides_every_frequency()
    {
        float[] plain = new RopeSpec(RopeType.Default, 10000).InverseFrequencies(128);
        Assert.Equal(plain.Select(frequency => frequency / 3), new RopeSpec(RopeType.Linear, 10000, 3).InverseFrequencies(128));
    }

    [Fact]
    public void Llama3_rope_scales_the_models_own_context_when_it_names_no_other()
    {
        string rope = """{"rope_type":"llama3","factor":8,"low_freq_factor":2,"high_freq_factor":4}""";
        Assert.Equal(new RopeSpec(RopeType.Llama3, 10000, 8, 2, 4, 512),
            Parse("llama", config => config["rope_parameters"] = JsonNode.Parse(rope)).Attention.Rope);
        // rope_theta beside it counts where it holds none of its own; the newer of two names of the type counts.
        Assert.Equal(new RopeSpec(RopeType.Linear, 77, 8), Parse("llama", config =>
        {
            config["rope_theta"] = 77;
            config["rope_parameters"] = JsonNode.Parse("""{"rope_type":"linear","type":"llama3","factor":8}""");
        }).Attention.Rope);
        Assert.Equal(new RopeSpec(RopeType.Default, 5), Parse("llama", config =>
        {
            config["rope_theta"] = 77;
            config["rope_parameters"] = JsonNode.Parse("""{"rope_type":"default","rope_theta":5}""");
        }).Attention.Rope);
    }

    [Fact]
    public void Every_problem_is_listed()
    {
        InvalidModelException error = Assert.Throws<InvalidModelException>(
            () => ModelSpec.Parse("""{"model_type":"llama","hidden_act":"relu"}"""u8));

        Assert.Equal(["vocab_size", "hidden_size", "num_attention_heads", "max_position_embeddings", "num_hidden_layers", "hidden_act",
            "intermediate_size"], error.Problems.Select(problem => problem.Split(' ')[0]));
    }

    [Fact]
    public void A_sliding_window_in_use_is_refused_and_one_that_is_not_is_ignored()
    {
        void Slide(JsonObject config, int maxWindowLayers)
        {
            config.Remove("layer_types");
            config["use_sliding_window"] = true;
            config["sliding_window"] = 16;
            config["max_window_layers"] = maxWindowLayers;
        }
        Assert.Equal(3, Parse("qwen2", config => Slide(config, 3)).Layers.Count);
        Assert.Contains("use_sliding_window must be false",
            Assert.Throws<InvalidModelException>(() => Parse("qwen2", config => Slide(config, 2))).Message);
    }

    [Fact]
    public void Any_mutilated_config_is_read_or_refused()
    {
        byte[] text = File.ReadAllBytes(GoldenFiles.Get("qwen3", "config.json"));
        Gen.Select(Gen.Int[0, text.Length - 1], Gen.OneOf(Gen.Byte, Gen.OneOf("0123456789{}[]\",:-e.tn"u8.ToArray())))
            .Array[1, 5]
            .Sample(changes =>
            {
                byte[] changed = text.ToArray();
                foreach ((int at, byte value) in changes)
                    changed[at] = value;
                try
                {
                    ModelSpec spec = ModelSpec.Parse(changed);
                    Assert.Equal(spec.Attention.HeadDim / 2, spec.Attention.Rope.InverseFrequencies(spec.Attention.HeadDim).Length);
                }
                catch (InvalidModelException)
                {
                }
            }, iter: 3000);
    }

    private static ModelSpec Minimal(string family, string more) => ModelSpec.Parse(Encoding.UTF8.GetBytes($$"""
        {"model_type":"{{family}}","vocab_size":320,"hidden_size":192,"intermediate_size":64,"num_hidden_layers":3,"num_attention_heads":12,
         "max_position_embeddings":512{{more}}}
        """));

    private static ModelSpec Parse(string golden, Action<JsonObject> change)
    {
        JsonObject config = JsonNode.Parse(File.ReadAllBytes(GoldenFiles.Get(golden, "config.json")))!.AsObject();
        change(config);
        return ModelSpec.Parse(Encoding.UTF8.GetBytes(config.ToJsonString()));
    }
}
