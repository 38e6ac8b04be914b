using System.Runtime.CompilerServices;
using TorchSharp;

namespace Rollout.Client.Torch;

/// <summary>Pushes a TorchSharp module as a <see cref="WeightPublisher"/> pushes tensors.</summary>
public static class TorchPublishing
{
    // A module's tensors are listed once: names and shapes do not change, and values are read at each push.
    private static readonly ConditionalWeakTable<torch.nn.Module, TensorSource[]> s_sources = [];

    /// <summary>
    /// Makes the module's parameters and persistent buffers, rounded to bfloat16, the weights the next token is drawn from: all of them
    /// or none. Names must be the Hugging Face checkpoint's; a module with these field names needs no renaming.
    /// </summary>
    /// <param name="publisher">Reuse it for the whole training run, because it keeps the shared memory.</param>
    /// <param name="module">Read during the call only.</param>
    /// <param name="newVersion">Must be greater than the version being served; null: one more than it.</param>
    /// <param name="options">Policy, transport, timeout.</param>
    /// <param name="cancellationToken">Until the commit is sent, cancelling leaves the old weights served.</param>
    /// <exception cref="WeightUpdateRejectedException">The module is not the model being served; lists every difference.</exception>
    /// <exception cref="WeightUpdateFailedException">It began and did not succeed; the outcome says which weights are served.</exception>
    public static Task<PushResult> PushAsync(this WeightPublisher publisher, torch.nn.Module module, ulong? newVersion = null,
        PushOptions? options = null, CancellationToken cancellationToken = default)
    {
        ArgumentNullException.ThrowIfNull(publisher);
        return publisher.PushAsync(s_sources.GetValue(module, Sources), newVersion, options, cancellationToken);
    }

    private static TensorSource[] Sources(torch.nn.Module module)
        => [.. TorchStateDict.Of(module, PublishedType.BFloat16).Select(tensor =>
            new TensorSource(tensor.Name, DTypeOf(tensor), tensor.Shape, (offset, destination) => tensor.CopyTo(destination, offset)))];

    private static TensorDType DTypeOf(TorchTensor tensor) => tensor.DType switch
    {
        "BF16" => TensorDType.BF16,
        _ => throw new NotSupportedException($"'{tensor.Name}' holds {tensor.DType}: only floating-point tensors can be served"),
    };
}
