using TorchSharp;
using TorchSharp.Modules;
using TorchSharp.Utils;
using static TorchSharp.torch;

namespace Rollout.Examples.Grpo;

/// <summary>The numbers of a Qwen3 model, under the names config.json has for them.</summary>
public sealed record PolicyConfig
{
    public required int VocabSize { get; init; }
    public int HiddenSize { get; init; } = 192;
    public int IntermediateSize { get; init; } = 384;
    public int NumHiddenLayers { get; init; } = 3;
    public int NumAttentionHeads { get; init; } = 6;
    public int NumKeyValueHeads { get; init; } = 2;
    public int HeadDim { get; init; } = 32;
    public int MaxPositionEmbeddings { get; init; } = 64;
    public double RopeTheta { get; init; } = 10_000;
    public double RmsNormEps { get; init; } = 1e-6;
    public bool TieWordEmbeddings { get; init; }
}

/// <summary>
/// Qwen3 in TorchSharp, in fp32. Parameters have the names of the Hugging Face checkpoint, so transformers loads a folder written from this
/// module, and pushed tensors need no renaming. TorchSharp registers every field that is a module or tensor under its ComponentName.
/// </summary>
public sealed class Policy : nn.Module<Tensor, Tensor>
{
    private readonly PolicyConfig _config;
    [ComponentName(Name = "model")] private readonly Decoder _model;
    [ComponentName(Name = "lm_head")] private readonly Linear? _head;

    public Policy(PolicyConfig config, Device? device = null) : base(nameof(Policy))
    {
        _config = config;
        _model = new Decoder(config);
        if (!config.TieWordEmbeddings)
            _head = nn.Linear(config.HiddenSize, config.VocabSize, hasBias: false);
        RegisterComponents();
        Initialize();
        if (device is not null)
            this.to(device);
    }

    public PolicyConfig Config => _config;

    public Device Device => _model.Embedding.device;

    /// <summary>Logits [rows, length, vocabulary] for token ids [rows, length].</summary>
    public override Tensor forward(Tensor tokens)
    {
        Tensor hidden = _model.forward(tokens);
        return _head is null ? nn.functional.linear(hidden, _model.Embedding) : _head.forward(hidden);
    }

    /// <summary>A copy of the policy whose weights training does not change.</summary>
    public Policy Freeze()
    {
        using IDisposable _ = no_grad();
        Policy copy = new(_config, Device);
        foreach ((Parameter to, Parameter from) in copy.parameters().Zip(parameters()))
            to.copy_(from).requires_grad_(false);
        return copy;
    }

    private void Initialize()
    {
        using IDisposable _ = no_grad();
        // The two matrices that write to the residual stream start smaller, so that it does not grow with depth.
        double residual = 1 / Math.Sqrt(2.0 * _config.NumHiddenLayers);
        foreach ((string name, Parameter parameter) in named_parameters())
        {
            if (parameter.dim() == 1)
                nn.init.ones_(parameter);
            else if (name.EndsWith("o_proj.weight") || name.EndsWith("down_proj.weight"))
                nn.init.normal_(parameter, 0, residual / Math.Sqrt(parameter.shape[1]));
            else if (name.Contains("embed_tokens"))
                nn.init.normal_(parameter, 0, _config.TieWordEmbeddings ? 1 / Math.Sqrt(_config.HiddenSize) : 1);
            else
                nn.init.normal_(parameter, 0, 1 / Math.Sqrt(parameter.shape[1]));
        }
    }

    private sealed class Decoder : nn.Module<Tensor, Tensor>
    {
        private readonly PolicyConfig _config;
        [ComponentName(Name = "embed_tokens")] private readonly Embedding _embedding;
        [ComponentName(Name = "layers")] private readonly ModuleList<DecoderLayer> _layers;
        [ComponentName(Name = "norm")] private readonly RmsNorm _norm;
        [ComponentName(Name = "cos")] private readonly Tensor _cos;
        [ComponentName(Name = "sin")] private readonly Tensor _sin;

        public Decoder(PolicyConfig config) : base(nameof(Decoder))
        {
            _config = config;
            _embedding = nn.Embedding(config.VocabSize, config.HiddenSize);
            _layers = nn.ModuleList(Enumerable.Range(0, config.NumHiddenLayers).Select(_ => new DecoderLayer(config)).ToArray());
            _norm = new RmsNorm(config.HiddenSize, config.RmsNormEps);

            // The first half of a head pairs with its second half; both have the same angles.
            using DisposeScope scope = NewDisposeScope();
            Tensor frequencies = pow(config.RopeTheta, arange(0, config.HeadDim, 2, float32) / -config.HeadDim);
            Tensor angles = outer(arange(config.MaxPositionEmbeddings, float32), frequencies);
            angles = cat([angles, angles], dim: -1);
            (_cos, _sin) = (angles.cos(), angles.sin());
            register_buffer("cos", _cos, persistent: false);
            register_buffer("sin", _sin, persistent: false);
            (_cos, _sin) = (_cos.DetachFromDisposeScope(), _sin.DetachFromDisposeScope());
        }

        public Tensor Embedding => _embedding.weight!;

        public override Tensor forward(Tensor tokens)
        {
            long length = tokens.shape[1];
            ArgumentOutOfRangeException.ThrowIfGreaterThan(length, _config.MaxPositionEmbeddings, nameof(tokens));
            Tensor cos = _cos.slice(0, 0, length, 1).to(tokens.device), sin = _sin.slice(0, 0, length, 1).to(tokens.device);
            Tensor hidden = _embedding.forward(tokens);
            foreach (DecoderLayer layer in _layers)
                hidden = layer.forward(hidden, cos, sin);
            return _norm.forward(hidden);
        }
    }

    private sealed class DecoderLayer : nn.Module<Tensor, Tensor, Tensor, Tensor>
    {
        [ComponentName(Name = "input_layernorm")] private readonly RmsNorm _inputNorm;
        [ComponentName(Name = "self_attn")] private readonly Attention _attention;
        [ComponentName(Name = "post_attention_layernorm")] private readonly RmsNorm _postAttentionNorm;
        [ComponentName(Name = "mlp")] private readonly GatedMlp _mlp;

        public DecoderLayer(PolicyConfig config) : base(nameof(DecoderLayer))
        {
            _inputNorm = new RmsNorm(config.HiddenSize, config.RmsNormEps);
            _attention = new Attention(config);
            _postAttentionNorm = new RmsNorm(config.HiddenSize, config.RmsNormEps);
            _mlp = new GatedMlp(config);
        }

        public override Tensor forward(Tensor hidden, Tensor cos, Tensor sin)
        {
            hidden = hidden + _attention.forward(_inputNorm.forward(hidden), cos, sin);
            return hidden + _mlp.forward(_postAttentionNorm.forward(hidden));
        }
    }

    private sealed class Attention : nn.Module<Tensor, Tensor, Tensor, Tensor>
    {
        private readonly PolicyConfig _config;
        [ComponentName(Name = "q_proj")] private readonly Linear _q;
        [ComponentName(Name = "k_proj")] private readonly Linear _k;
        [ComponentName(Name = "v_proj")] private readonly Linear _v;
        [ComponentName(Name = "o_proj")] private readonly Linear _o;
        [ComponentName(Name = "q_norm")] private readonly RmsNorm _qNorm;
        [ComponentName(Name = "k_norm")] private readonly RmsNorm _kNorm;

        public Attention(PolicyConfig config) : base(nameof(Attention))
        {
            _config = config;
            int queries = config.NumAttentionHeads * config.HeadDim, keys = config.NumKeyValueHeads * config.HeadDim;
            _q = nn.Linear(config.HiddenSize, queries, hasBias: false);
            _k = nn.Linear(config.HiddenSize, keys, hasBias: false);
            _v = nn.Linear(config.HiddenSize, keys, hasBias: false);
            _o = nn.Linear(queries, config.HiddenSize, hasBias: false);
            _qNorm = new RmsNorm(config.HeadDim, config.RmsNormEps);
            _kNorm = new RmsNorm(config.HeadDim, config.RmsNormEps);
        }

        public override Tensor forward(Tensor hidden, Tensor cos, Tensor sin)
        {
            long rows = hidden.shape[0], length = hidden.shape[1];
            Tensor q = Rotate(_qNorm.forward(Heads(_q.forward(hidden))), cos, sin);
            Tensor k = Rotate(_kNorm.forward(Heads(_k.forward(hidden))), cos, sin);
            Tensor v = Heads(_v.forward(hidden));
            int share = _config.NumAttentionHeads / _config.NumKeyValueHeads;
            if (share > 1)
                (k, v) = (k.repeat_interleave(share, dim: 1), v.repeat_interleave(share, dim: 1));
            Tensor mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_casual: true);
            return _o.forward(mixed.transpose(1, 2).reshape(rows, length, -1));

            Tensor Heads(Tensor x) => x.view(rows, length, -1, _config.HeadDim).transpose(1, 2);
        }

        private static Tensor Rotate(Tensor x, Tensor cos, Tensor sin)
        {
            Tensor[] halves = x.chunk(2, dim: -1);
            return (x * cos) + (cat([-halves[1], halves[0]], dim: -1) * sin);
        }
    }

    private sealed class GatedMlp : nn.Module<Tensor, Tensor>
    {
        [ComponentName(Name = "gate_proj")] private readonly Linear _gate;
        [ComponentName(Name = "up_proj")] private readonly Linear _up;
        [ComponentName(Name = "down_proj")] private readonly Linear _down;

        public GatedMlp(PolicyConfig config) : base(nameof(GatedMlp))
        {
            _gate = nn.Linear(config.HiddenSize, config.IntermediateSize, hasBias: false);
            _up = nn.Linear(config.HiddenSize, config.IntermediateSize, hasBias: false);
            _down = nn.Linear(config.IntermediateSize, config.HiddenSize, hasBias: false);
        }

        public override Tensor forward(Tensor hidden) =>
            _down.forward(nn.functional.silu(_gate.forward(hidden)) * _up.forward(hidden));
    }

    private sealed class RmsNorm : nn.Module<Tensor, Tensor>
    {
        [ComponentName(Name = "weight")] private readonly Parameter _weight;
        private readonly double _eps;

        public RmsNorm(int size, double eps) : base(nameof(RmsNorm))
        {
            _eps = eps;
            _weight = new Parameter(ones(size));
        }

        public override Tensor forward(Tensor x) => x * (x.square().mean([-1], keepdim: true) + _eps).rsqrt() * _weight;
    }
}
