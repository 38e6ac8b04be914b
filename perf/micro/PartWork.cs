using Rollout.Engine;

namespace Rollout.Micro;

/// <summary>The minimum work of each part of a step. A multiply-add is two flops; exp, sqrt and the like are not counted.</summary>
internal static class PartWork
{
    public static string Name(Part part) => part switch
    {
        Part.Output => "attention output",
        Part.GateUp => "gate, up",
        _ => part.ToString().ToLowerInvariant(),
    };

    /// <summary>Arithmetic, and the bytes that no cache holds from one step to the next: weights, keys and values.</summary>
    public static Work Of(Part part, ModelSpec model, StepRecord step)
    {
        (AttentionSpec attention, int layers, int width) =
            (model.Layers[0].Attention, model.Layers.Count, model.Layers[0].FeedForward.Width);
        long queries = attention.QueryWidth;
        long keysValues = 2L * attention.KvWidth;
        return part switch
        {
            Part.Embed => new(0, 2.0 * step.Rows * model.HiddenSize),
            Part.Norms => new(4.0 * NormedElements(model, step), 4.0 * (2 * layers + 1) * model.HiddenSize),
            Part.Qkv => MatMul(queries + keysValues, model.HiddenSize),
            Part.Attention => new( // rotation, then scores and values; what is stored, then what is read
                layers * (3.0 * step.Rows * (queries + keysValues / 2) + 4.0 * queries * step.AttendedTokens),
                4.0 * layers * keysValues * (step.Rows + step.ContextTokens)),
            Part.Output => MatMul(model.HiddenSize, queries),
            Part.GateUp => MatMul(2L * width, model.HiddenSize),
            Part.Silu => new(3.0 * layers * step.Rows * width, 0),
            Part.Down => MatMul(model.HiddenSize, width),
            Part.Head => new(2.0 * step.Outputs * model.VocabSize * model.HiddenSize, 2.0 * model.VocabSize * model.HiddenSize),
            Part.Sampling => new(3.0 * step.Outputs * model.VocabSize, 0),
            _ => default,
        };

        Work MatMul(long outputs, long inputs)
            => new(2.0 * layers * step.Rows * outputs * inputs, 2.0 * layers * outputs * inputs);
    }

    /// <summary>fp32 read and written by the part; caches hold them while the step is small, so they do not count in a floor.</summary>
    public static double ActivationBytes(Part part, ModelSpec model, StepRecord step)
    {
        (AttentionSpec attention, int width) = (model.Layers[0].Attention, model.Layers[0].FeedForward.Width);
        double rows = (double)model.Layers.Count * step.Rows;
        long queries = attention.QueryWidth, qkv = queries + 2L * attention.KvWidth;
        return sizeof(float) * (part switch
        {
            Part.Embed => (double)step.Rows * model.HiddenSize,
            Part.Norms => 2.0 * NormedElements(model, step),
            Part.Qkv => rows * (model.HiddenSize + qkv),
            Part.Attention => rows * (qkv + 3 * queries),
            Part.Output => rows * (queries + 2 * model.HiddenSize),
            Part.GateUp => rows * (model.HiddenSize + 2 * width),
            Part.Silu => rows * 3 * width,
            Part.Down => rows * (width + 2 * model.HiddenSize),
            Part.Gather => 2.0 * step.Outputs * model.HiddenSize,
            Part.Head => (double)step.Outputs * (model.HiddenSize + model.VocabSize),
            Part.Sampling => (double)step.Outputs * model.VocabSize,
            _ => 0,
        });
    }

    private static double NormedElements(ModelSpec model, StepRecord step)
        => (2.0 * model.Layers.Count * step.Rows + step.Outputs) * model.HiddenSize;
}
