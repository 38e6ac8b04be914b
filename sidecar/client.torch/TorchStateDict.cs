using TorchSharp;
using static TorchSharp.torch;

namespace Rollout.Client.Torch;

/// <summary>The element type in which weights are published.</summary>
public enum PublishedType
{
    /// <summary>Unchanged.</summary>
    AsIs,

    /// <summary>Floating-point tensors rounded to bfloat16, to nearest, ties to even; other tensors as they are.</summary>
    BFloat16,
}

/// <summary>One named tensor of a module, ready to be published.</summary>
public sealed class TorchTensor
{
    private readonly Tensor _tensor;
    private readonly ScalarType _dtype;

    internal TorchTensor(string name, Tensor tensor, PublishedType type)
    {
        Name = name;
        _tensor = tensor;
        Shape = tensor.shape;
        _dtype = type == PublishedType.BFloat16 && tensor.is_floating_point() ? ScalarType.BFloat16 : tensor.dtype;
        DType = SafetensorsName(name, _dtype);
        ByteLength = Shape.Aggregate((long)_dtype.ElementSize(), (bytes, size) => checked(bytes * size));
    }

    /// <summary>The name the module registers it under: in a module written for it, the Hugging Face checkpoint's.</summary>
    public string Name { get; }

    /// <summary>The element type as published, as safetensors spells it: BF16, F32, ...</summary>
    public string DType { get; }

    /// <summary>The sizes, outermost first.</summary>
    public IReadOnlyList<long> Shape { get; }

    /// <summary>How many bytes <see cref="CopyTo"/> writes.</summary>
    public long ByteLength { get; }

    /// <summary>Whether it is in a GPU's memory now.</summary>
    public bool IsOnGpu => _tensor.device_type == DeviceType.CUDA;

    /// <summary>The address, on its device, of its elements in row-major order and as they are.</summary>
    /// <param name="copies">Gets the copy that was made where they were in another order: dispose it when it has been read.</param>
    internal nint AddressOnDevice(ICollection<IDisposable> copies)
    {
        if (_tensor.is_contiguous())
            return TorchNative.AddressOf(_tensor);
        Tensor copy = _tensor.detach().contiguous();
        copy.DetachFromDisposeScope();
        copies.Add(copy);
        return TorchNative.AddressOf(copy);
    }

    /// <summary>
    /// Writes bytes of the tensor as it is now: row-major, little-endian, without gaps, for any strides and device. A tensor too large for
    /// a span can be copied in parts.
    /// </summary>
    /// <param name="destination">Filled completely; its length must be whole elements.</param>
    /// <param name="offset">The first byte to copy, at the start of an element.</param>
    /// <exception cref="ArgumentException">The part cuts an element, or reaches past the end.</exception>
    public void CopyTo(Span<byte> destination, long offset = 0)
    {
        int size = _dtype.ElementSize();
        if (destination.Length % size != 0 || offset % size != 0)
            throw new ArgumentException($"'{Name}' has elements of {size} bytes; this part would cut one.", nameof(destination));
        if (offset < 0 || offset > ByteLength - destination.Length)
            throw new ArgumentException($"'{Name}' has {ByteLength} bytes; this part reaches past them.", nameof(destination));
        if (destination.IsEmpty)
            return;

        // to(), flatten() and contiguous() return the tensor itself where nothing has to change, so nothing is copied twice.
        using DisposeScope scope = NewDisposeScope();
        using IDisposable _ = no_grad();
        Tensor part = _tensor.detach().flatten().narrow(0, offset / size, destination.Length / size);
        part.to(_dtype).to(CPU).contiguous().bytes.CopyTo(destination);
    }

    private static string SafetensorsName(string name, ScalarType dtype) => dtype switch
    {
        ScalarType.BFloat16 => "BF16",
        ScalarType.Float16 => "F16",
        ScalarType.Float32 => "F32",
        ScalarType.Float64 => "F64",
        ScalarType.Byte => "U8",
        ScalarType.Int8 => "I8",
        ScalarType.Int16 => "I16",
        ScalarType.Int32 => "I32",
        ScalarType.Int64 => "I64",
        ScalarType.Bool => "BOOL",
        _ => throw new NotSupportedException($"'{name}' has elements of type {dtype}, which a checkpoint cannot hold."),
    };
}

/// <summary>The tensors of a TorchSharp module that belong in a checkpoint.</summary>
public static class TorchStateDict
{
    /// <summary>
    /// Parameters and persistent buffers, in the module's order. One storage registered under two names appears under both: the
    /// receiver decides which names its checkpoint has. The tensors are read when copied, so one list serves every update.
    /// </summary>
    public static IReadOnlyList<TorchTensor> Of(nn.Module module, PublishedType type = PublishedType.AsIs)
    {
        ArgumentNullException.ThrowIfNull(module);
        List<TorchTensor> tensors = new();
        Collect(module, "", new HashSet<string>(), tensors, type);
        return tensors;
    }

    // Module.named_parameters() on the whole module omits a parameter that it has seen under another name, and so a tied tensor's second
    // name. Within one module that is right: TorchSharp registers a field under its own name as well as under its explicit name.
    private static void Collect(nn.Module module, string prefix, HashSet<string> names, List<TorchTensor> tensors, PublishedType type)
    {
        foreach ((string name, TorchSharp.Modules.Parameter parameter) in module.named_parameters(recurse: false))
            Add(name, parameter);
        foreach ((string name, Tensor buffer) in module.named_buffers(recurse: false, include_nonpersistent: false))
            Add(name, buffer);
        foreach ((string name, nn.Module child) in module.named_children()
            .DistinctBy(child => child.module, ReferenceEqualityComparer.Instance))
        {
            Collect(child, $"{prefix}{name}.", names, tensors, type);
        }

        void Add(string name, Tensor tensor)
        {
            if (names.Add(prefix + name))
                tensors.Add(new(prefix + name, tensor, type));
        }
    }
}
