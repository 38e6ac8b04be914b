namespace Rollout.Engine;

/// <summary>A commit on its way to the loop, where it waits for its moment between two steps.</summary>
internal sealed class WeightSwap(WeightUpdate update, WeightSet staging, IReadOnlyDictionary<string, byte[]> digests)
{
    public WeightUpdate Update => update;

    public WeightSet Staging => staging;

    public UpdatePolicy Policy => update.Manifest.Policy;

    /// <summary>The tensors as they will be served.</summary>
    public IReadOnlyList<DescribedWeight> Described => [.. update.Manifest.Tensors.Select(tensor =>
        new DescribedWeight(tensor.Name, tensor.Type, tensor.Shape, digests[tensor.Name]))];

    /// <summary>Seconds the loop spent on the swap.</summary>
    public TaskCompletionSource<double> Done { get; } = new(TaskCreationOptions.RunContinuationsAsynchronously);
}
