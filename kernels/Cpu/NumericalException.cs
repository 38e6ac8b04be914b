namespace Rollout.Kernels;

/// <summary>Logits from which nothing can be sampled: not a number, positive infinity, or every token forbidden.</summary>
public sealed class NumericalException : Exception
{
    public NumericalException(int outputIndex, string problem)
        : base($"Output row {outputIndex}: {problem}.")
    {
        OutputIndex = outputIndex;
    }

    /// <summary>Index into <see cref="StepLayout.OutputRows"/> of the row at fault.</summary>
    public int OutputIndex { get; }
}
