using Rollout.Engine;

namespace Rollout.Micro;

/// <summary>What each part of a step must do. A multiply-add is two flops; exp, sqrt and the like are not counted.</summary>
internal static class PartWork
{
    public static string Name(Part part) => part switch
    {
        Part.RopeStore => "rope, store",
        Part.Output => "attention output",
        Part.GateUp => "gate, up",
        _ => part.ToString().ToLowerInvariant(),
    };

    /// <summary>Arithmetic, and the bytes that no cache holds from one step to the next: weights, keys and values.</summary>
    public static Work Of(Part part, ModelSpec model, StepRecord step)
    {
        long queries = (long)model.Heads * model.HeadDim;
        long keysValues = 2L * model.KvHeads * model.HeadDim;
        return part switch
        {
            Part.Embed => new(0, 2.0 * step.Rows * model.HiddenSize),
            Part.Norms => new(4.0 * NormedElements(model, step), 4.0 * (2 * model.Layers + 1) * model.HiddenSize),
            Part.Qkv => MatMul(model.QkvOutputs, model.HiddenSize),
            Part.RopeStore => new(3.0 * model.Layers * step.Rows * (queries + keysValues / 2), 4.0 * model.Layers * step.Rows * keysValues),
            Part.Attention => new(4.0 * model.Layers * queries * step.AttendedTokens, 4.0 * model.Layers * keysValues * step.ContextTokens),
            Part.Output => MatMul(model.HiddenSize, queries),
            Part.GateUp => MatMul(2 * model.IntermediateSize, model.HiddenSize),
            Part.Silu => new(3.0 * model.Layers * step.Rows * model.IntermediateSize, 0),
            Part.Down => MatMul(model.HiddenSize, model.IntermediateSize),
            Part.Head => new(2.0 * step.Outputs * model.VocabSize * model.HiddenSize, 2.0 * model.VocabSize * model.HiddenSize),
            Part.Sampling => new(3.0 * step.Outputs * model.VocabSize, 0),
            _ => default,
        };

        Work MatMul(long outputs, long inputs)
            => new(2.0 * model.Layers * step.Rows * outputs * inputs, 2.0 * model.Layers * outputs * inputs);
    }

    /// <summary>fp32 read and written by the part; caches hold them while the step is small, so they are in no floor.</summary>
    public static double ActivationBytes(Part part, ModelSpec model, StepRecord step)
    {
        double rows = (double)model.Layers * step.Rows;
        long queries = (long)model.Heads * model.HeadDim;
        return sizeof(float) * (part switch
        {
            Part.Embed => (double)step.Rows * model.HiddenSize,
            Part.Norms => 2.0 * NormedElements(model, step),
            Part.Qkv => rows * (model.HiddenSize + model.QkvOutputs),
            Part.RopeStore => rows * (model.QkvOutputs + queries),
            Part.Attention => rows * 2 * queries,
            Part.Output => rows * (queries + 2 * model.HiddenSize),
            Part.GateUp => rows * (model.HiddenSize + 2 * model.IntermediateSize),
            Part.Silu => rows * 3 * model.IntermediateSize,
            Part.Down => rows * (model.IntermediateSize + 2 * model.HiddenSize),
            Part.Gather => 2.0 * step.Outputs * model.HiddenSize,
            Part.Head => (double)step.Outputs * (model.HiddenSize + model.VocabSize),
            Part.Sampling => (double)step.Outputs * model.VocabSize,
            _ => 0,
        });
    }

    private static double NormedElements(ModelSpec model, StepRecord step)
        => (2.0 * model.Layers * step.Rows + step.Outputs) * model.HiddenSize;
}
