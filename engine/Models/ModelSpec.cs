using System.Text.Json;

namespace Rollout.Engine;

/// <summary>
/// A model's architecture as facts, read from a Hugging Face config.json: of the whole, and of each layer (<see cref="LayerSpec"/>).
/// Supporting another family of known block shapes takes one entry in <see cref="Families"/>.
/// </summary>
public sealed record ModelSpec
{
    // Far above any real model; they keep products of dimensions in range and a hostile config from taking memory.
    private const int MostVocabulary = 1 << 24;
    private const int MostHidden = 1 << 20;
    private const int MostIntermediate = 1 << 22;
    private const int MostLayers = 4096;
    private const int MostHeads = 1 << 14;
    private const int MostHeadDim = 4096;
    private const int MostPositions = 1 << 30;

    /// <summary>What a model_type means. A fact that is null is asked of the config field named in <see cref="Read"/>.</summary>
    private sealed record Family(
        string Architecture, bool? QkvBias, bool? OutputBias, bool? MlpBias, QueryKeyNorm QueryKeyNorm = QueryKeyNorm.None,
        NormPlacement Norms = NormPlacement.BeforeBlock, int? DefaultHeadDim = null, double DefaultNormEpsilon = 1e-6);

    private static Dictionary<string, Family> Families { get; } = new()
    {
        ["llama"] = new("LlamaForCausalLM", QkvBias: null, OutputBias: null, MlpBias: null),
        ["olmo2"] = new(
            "Olmo2ForCausalLM", QkvBias: null, OutputBias: null, MlpBias: false, QueryKeyNorm.AllHeads, NormPlacement.AfterBlock,
            DefaultNormEpsilon: 1e-5),
        ["qwen2"] = new("Qwen2ForCausalLM", QkvBias: true, OutputBias: false, MlpBias: false),
        ["qwen3"] = new("Qwen3ForCausalLM", QkvBias: null, OutputBias: null, MlpBias: false, QueryKeyNorm.EachHead, DefaultHeadDim: 128),
    };

    /// <summary>The config's model_type.</summary>
    public required string ModelType { get; init; }

    public required int VocabSize { get; init; }

    public required int HiddenSize { get; init; }

    /// <summary>From the embedding's side.</summary>
    public required IReadOnlyList<LayerSpec> Layers { get; init; }

    /// <summary>Longest context, in tokens, that the config vouches for.</summary>
    public required int MaxPositions { get; init; }

    public required float RmsNormEpsilon { get; init; }

    /// <summary>The output head is the embedding table.</summary>
    public required bool TiedHead { get; init; }

    /// <summary>Tokens that end a text: the config's, then further ones of generation_config.json. May be empty.</summary>
    public required IReadOnlyList<int> EosTokenIds { get; init; }

    public required int? BosTokenId { get; init; }

    /// <summary>Names and shapes of the tensors that a checkpoint of this model must have, in the Hugging Face naming.</summary>
    public IEnumerable<(string Name, IReadOnlyList<long> Shape)> CheckpointTensors() =>
        LoadPlan.Compile(this).Entries.Where(entry => !entry.Tied).Select(entry => (entry.Source, entry.Shape));

    /// <summary>Reads config.json, and generation_config.json where there is one, of a model folder.</summary>
    /// <exception cref="InvalidModelException">A file does not parse, a field is missing or invalid, or the model is of a kind that is not
    /// supported; lists every problem.</exception>
    public static ModelSpec Load(string folder)
    {
        string path = Path.Combine(folder, "config.json");
        JsonElement config = JsonFile.ReadObject(path);
        string generationPath = Path.Combine(folder, "generation_config.json");
        JsonElement? generation = File.Exists(generationPath) ? JsonFile.ReadObject(generationPath) : null;
        return Read(path, config, generation);
    }

    /// <summary>As <see cref="Load"/>, from the text of a config.json.</summary>
    public static ModelSpec Parse(ReadOnlySpan<byte> config) => Read("config.json", JsonFile.ParseObject("config.json", config), null);

    private static ModelSpec Read(string path, JsonElement json, JsonElement? generationJson)
    {
        List<string> problems = new();
        ConfigReader config = new(json, "", problems);
        Family family = ReadFamily(config);
        // The other fields mean nothing in a family that is not known.
        InvalidModelException.ThrowIfAny(path, problems);

        int vocabulary = config.Integer("vocab_size", 1, MostVocabulary);
        int hidden = config.Integer("hidden_size", 1, MostHidden);
        int heads = config.Integer("num_attention_heads", 1, MostHeads);
        int kvHeads = config.Integer("num_key_value_heads", 1, MostHeads, fallback: heads);
        if (kvHeads > 0 && heads % kvHeads != 0)
            config.Report("num_key_value_heads", $"must divide num_attention_heads, {heads}");
        int positions = config.Integer("max_position_embeddings", 1, MostPositions);
        int layers = config.Integer("num_hidden_layers", 1, MostLayers);
        int ids = vocabulary > 0 ? vocabulary : MostVocabulary;
        IReadOnlyList<int> eos = config.TokenIds("eos_token_id", ids);
        if (generationJson is { } generation)
            eos = [.. eos.Union(new ConfigReader(generation, "generation_config.json: ", problems).TokenIds("eos_token_id", ids))];
        bool attentionBias = config.Boolean("attention_bias", false);
        bool mlpBias = config.Boolean("mlp_bias", false);
        RefuseWhatIsNotSupported(config, layers);

        AttentionSpec attention = new()
        {
            Heads = heads,
            KvHeads = kvHeads,
            HeadDim = ReadHeadDim(config, family, hidden, heads),
            Rope = ReadRope(config, positions),
            QkvBias = family.QkvBias ?? attentionBias,
            OutputBias = family.OutputBias ?? attentionBias,
            QueryKeyNorm = family.QueryKeyNorm,
        };
        GatedMlpSpec mlp = new(config.Integer("intermediate_size", 1, MostIntermediate), family.MlpBias ?? mlpBias);
        ModelSpec spec = new()
        {
            ModelType = config.Text("model_type")!,
            VocabSize = vocabulary,
            HiddenSize = hidden,
            Layers = [.. Enumerable.Repeat(new LayerSpec(attention, mlp, family.Norms), layers)],
            MaxPositions = positions,
            RmsNormEpsilon = (float)config.Positive("rms_norm_eps", family.DefaultNormEpsilon, most: 1),
            TiedHead = config.Boolean("tie_word_embeddings", false),
            EosTokenIds = eos,
            BosTokenId = config.Has("bos_token_id") ? config.Integer("bos_token_id", 0, ids - 1) : null,
        };
        InvalidModelException.ThrowIfAny(path, problems);
        return spec;
    }

    private static Family ReadFamily(ConfigReader config)
    {
        string type = config.Text("model_type") ?? "";
        IReadOnlyList<string> architectures = config.Texts("architectures");
        if (!Families.TryGetValue(type, out Family? family))
        {
            if (config.Problems.Count == 0)
                config.Report("model_type", $"must be one of {string.Join(", ", Families.Keys)}");
            return Families["llama"];
        }
        if (architectures.Count > 0 && architectures[0] != family.Architecture)
            config.Report("architectures", $"must begin with {family.Architecture} for model_type {type}");
        return family;
    }

    private static int ReadHeadDim(ConfigReader config, Family family, int hidden, int heads)
    {
        if (config.Has("head_dim") || family.DefaultHeadDim is not null)
        {
            int given = config.Integer("head_dim", 1, MostHeadDim, family.DefaultHeadDim);
            if (given % 2 != 0)
                config.Report("head_dim", "must be even");
            return given;
        }
        if (hidden == 0 || heads == 0)
            return 0; // reported already
        int headDim = hidden / heads;
        if (hidden % heads != 0)
            config.Report("head_dim", $"must be given when num_attention_heads, {heads}, does not divide hidden_size, {hidden}");
        else if (headDim % 2 != 0 || headDim > MostHeadDim)
            config.Problems.Add($"hidden_size / num_attention_heads is {headDim}; it must be even and at most {MostHeadDim}");
        return headDim;
    }

    private static void RefuseWhatIsNotSupported(ConfigReader config, int layers)
    {
        if (config.Text("hidden_act") is { } activation && activation != "silu")
            config.Report("hidden_act", "must be silu");
        if (config.Has("quantization_config"))
            config.Report("quantization_config", "must be absent: quantised checkpoints are not supported");
        if (config.Positive("partial_rotary_factor", 1) != 1)
            config.Report("partial_rotary_factor", "must be 1");

        // A window that transformers would really apply: by layer_types where they are given, else beyond max_window_layers.
        IReadOnlyList<string> layerTypes = config.Texts("layer_types");
        bool sliding = config.Boolean("use_sliding_window", false) && config.Has("sliding_window");
        if (layerTypes.Any(type => type != "full_attention"))
        {
            config.Report("layer_types", "must all be full_attention: sliding windows and other kinds are not supported yet");
        }
        else if (sliding && layerTypes.Count == 0 && config.Integer("max_window_layers", 0, int.MaxValue, 28) < layers)
        {
            config.Report("use_sliding_window", "must be false: sliding windows are not supported yet");
        }
    }

    /// <summary>
    /// Two layouts: rope_theta and rope_scaling side by side, or, since transformers 5, all in rope_parameters. A config may hold both, to
    /// be readable by old and new programs; then they must agree.
    /// </summary>
    private static RopeSpec ReadRope(ConfigReader config, int positions)
    {
        double theta = config.Positive("rope_theta", 10000);
        RopeSpec? parameters = config.Nested("rope_parameters") is { } current ? ReadRope(current, theta, positions) : null;
        RopeSpec? scaling = config.Nested("rope_scaling") is { } old ? ReadRope(old, theta, positions) : null;
        if (parameters is not null && scaling is not null && parameters != scaling)
            config.Report("rope_parameters", "must agree with rope_scaling when both are given");
        return parameters ?? scaling ?? new RopeSpec(RopeType.Default, theta);
    }

    private static RopeSpec? ReadRope(ConfigReader rope, double fallbackTheta, int positions)
    {
        if (rope.NestedNames().FirstOrDefault() is { } nested)
        {
            rope.Report(nested, "must be a number or string: parameters by layer type are not supported");
            return null;
        }
        double theta = rope.Positive("rope_theta", fallbackTheta);
        if (rope.Positive("partial_rotary_factor", 1) != 1)
            rope.Report("partial_rotary_factor", "must be 1");
        string field = rope.Has("rope_type") ? "rope_type" : "type";
        switch (rope.Text(field) ?? "default")
        {
            case "default":
                return new RopeSpec(RopeType.Default, theta);
            case "linear":
                return new RopeSpec(RopeType.Linear, theta, rope.Positive("factor"));
            case "llama3":
                double low = rope.Positive("low_freq_factor");
                double high = rope.Positive("high_freq_factor", low + 1);
                if (high <= low || !rope.Has("high_freq_factor"))
                    rope.Report("high_freq_factor", $"must be a number above low_freq_factor, {low}");
                return new RopeSpec(RopeType.Llama3, theta, rope.Positive("factor"), low, high,
                    rope.Integer("original_max_position_embeddings", 1, MostPositions, fallback: positions));
            default:
                rope.Report(field, "must be one of default, linear, llama3");
                return null;
        }
    }
}
