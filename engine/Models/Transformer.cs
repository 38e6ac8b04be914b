using Rollout.Kernels;

namespace Rollout.Engine;

/// <summary>
/// The forward pass of every dense decoder family served: what differs between them is facts in <see cref="ModelSpec"/> and weights that
/// are there or not.
/// </summary>
public sealed class Transformer : IDisposable
{
    private readonly ModelSpec _spec;
    private readonly IBackend _backend;
    private readonly RopeTable _rope;
    private readonly Tensor _hidden;      // [rows, hidden] the residual stream
    private readonly Tensor _normed;      // [rows, hidden]
    private readonly Tensor _qkv;         // [rows, (heads + 2*kvHeads) * headDim]
    private readonly Tensor _attention;   // [rows, heads * headDim]
    private readonly Tensor _gateUp;      // [rows, 2 * intermediate]
    private readonly Tensor _activated;   // [rows, intermediate]
    private readonly Tensor _lastHidden;  // [logit rows, hidden]
    private readonly Tensor _logits;      // [logit rows, vocab]

    /// <param name="spec">The architecture's facts.</param>
    /// <param name="backend">Owns all memory taken here.</param>
    /// <param name="maxRows">Most tokens in a step.</param>
    /// <param name="maxContext">Longest sequence.</param>
    public Transformer(ModelSpec spec, IBackend backend, int maxRows, int maxContext)
    {
        _spec = spec;
        _backend = backend;
        _rope = backend.AllocateRopeTable(spec.InverseFrequencies(), maxContext, spec.RopeScale);
        _hidden = backend.AllocateTensor(maxRows, spec.HiddenSize);
        _normed = backend.AllocateTensor(maxRows, spec.HiddenSize, rounded: true);
        _qkv = backend.AllocateTensor(maxRows, spec.QkvOutputs);
        _attention = backend.AllocateTensor(maxRows, spec.Heads * spec.HeadDim, rounded: true);
        _gateUp = backend.AllocateTensor(maxRows, 2 * spec.IntermediateSize, rounded: true);
        _activated = backend.AllocateTensor(maxRows, spec.IntermediateSize, rounded: true);
        int logitRows = Math.Min(backend.LogitRows, maxRows);
        _lastHidden = backend.AllocateTensor(logitRows, spec.HiddenSize);
        _logits = backend.AllocateTensor(logitRows, spec.VocabSize);
    }

    /// <summary>Computes keys and values of the step's tokens, and the hidden states that <see cref="Sample"/> reads.</summary>
    public void Forward(StepLayout step, WeightSet weights, KvCache kv)
    {
        float epsilon = _spec.RmsNormEpsilon;
        float scale = 1 / MathF.Sqrt(_spec.HeadDim);
        int rows = step.RowCount;
        _backend.BeginStep(step);
        _backend.Embed(weights.Embedding, _hidden);
        for (int layer = 0; layer < weights.Layers.Length; layer++)
        {
            LayerWeights w = weights.Layers[layer];
            _backend.RmsNorm(_hidden, w.InputNorm, epsilon, _normed, rows);
            _backend.MatMul(_normed, w.Qkv, w.QkvBias, _qkv, rows);
            _backend.RopeStoreKv(_qkv, _spec.Heads, w.QueryNorm, w.KeyNorm, epsilon, _rope, kv, layer);
            _backend.Attend(_qkv, _spec.Heads, scale, kv, layer, _attention);
            _backend.MatMulAdd(_attention, w.AttentionOutput, w.AttentionOutputBias, _hidden, rows);

            _backend.RmsNorm(_hidden, w.PostAttentionNorm, epsilon, _normed, rows);
            _backend.MatMul(_normed, w.GateUp, w.GateUpBias, _gateUp, rows);
            _backend.GatedSilu(_gateUp, _activated, rows);
            _backend.MatMulAdd(_activated, w.Down, w.DownBias, _hidden, rows);
        }
    }

    /// <summary>Logits of the step's output rows, and the answers to its queries.</summary>
    public void Sample(StepLayout step, WeightSet weights)
    {
        for (int first = 0; first < step.OutputCount; first += _logits.Rows)
        {
            int count = Math.Min(_logits.Rows, step.OutputCount - first);
            _backend.GatherRows(_hidden, first, count, _lastHidden);
            _backend.RmsNorm(_lastHidden, weights.FinalNorm, _spec.RmsNormEpsilon, _lastHidden, count);
            _backend.MatMul(_lastHidden, weights.Head, null, _logits, count);
            _backend.Sample(_logits, first, count);
        }
    }

    public void Dispose()
    {
        DeviceMemory[] all = [_rope, _hidden, _normed, _qkv, _attention, _gateUp, _activated, _lastHidden, _logits];
        foreach (DeviceMemory memory in all) memory.Dispose();
    }
}
