using System.Runtime.CompilerServices;
using TorchSharp;

namespace Rollout.Client.Torch;

/// <summary>Pushes a TorchSharp module as a <see cref="WeightPublisher"/> pushes tensors.</summary>
public static class TorchPublishing
{
    // A module's tensors are listed once: names and shapes do not change, and values are read at each push.
    private static readonly ConditionalWeakTable<torch.nn.Module, TorchTensor[]> s_tensors = [];

    /// <summary>
    /// Makes the module's parameters and persistent buffers, rounded to bfloat16, the weights the next token is drawn from: all of them
    /// or none. Names must be the Hugging Face checkpoint's; a module with these field names needs no renaming. A module on the sidecar's
    /// GPU is read there, by CUDA IPC; one on another GPU is broadcast to the sidecar's, by NCCL.
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
        TorchTensor[] tensors = s_tensors.GetValue(module, Tensors);
        TensorSource[] sources = [.. tensors.Select(tensor => new TensorSource(
            tensor.Name, DTypeOf(tensor), tensor.Shape, (offset, destination) => tensor.CopyTo(destination, offset)))];
        return tensors.All(tensor => tensor.IsOnGpu)
            ? PushFromGpuAsync(publisher, tensors, sources, newVersion, options, cancellationToken)
            : publisher.PushAsync(sources, newVersion, options, cancellationToken);
    }

    private static async Task<PushResult> PushFromGpuAsync(WeightPublisher publisher, TorchTensor[] tensors, TensorSource[] sources,
        ulong? newVersion, PushOptions? options, CancellationToken cancellationToken)
    {
        List<IDisposable> copies = []; // of tensors that are not contiguous
        try
        {
            return await publisher.PushFromAsync(
                sources, () => publisher.Sender(OnDevice(), stream: 0), mayCopy: true, newVersion, options, cancellationToken);
        }
        finally
        {
            foreach (IDisposable copy in copies)
                copy.Dispose();
        }

        DeviceTensor[] OnDevice() => [.. tensors.Zip(sources, (tensor, source) =>
            new DeviceTensor(source.Name, source.DType, source.Shape, tensor.AddressOnDevice(copies)))];
    }

    /// <summary>
    /// On a GPU as they are: rounding them there would take memory, and the sidecar rounds matrices in the same way while it reads them.
    /// It keeps vectors, such as norms, in 32 bits.
    /// </summary>
    private static TorchTensor[] Tensors(torch.nn.Module module)
    {
        IReadOnlyList<TorchTensor> asIs = TorchStateDict.Of(module, PublishedType.AsIs);
        return asIs.All(tensor => tensor.IsOnGpu) ? [.. asIs] : [.. TorchStateDict.Of(module, PublishedType.BFloat16)];
    }

    private static TensorDType DTypeOf(TorchTensor tensor) => tensor.DType switch
    {
        "BF16" => TensorDType.BF16,
        "F16" => TensorDType.F16,
        "F32" => TensorDType.F32,
        _ => throw new NotSupportedException(
            $"'{tensor.Name}' holds {tensor.DType}: only floating-point tensors of 16 or 32 bits can be served"),
    };
}
