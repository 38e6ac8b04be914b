using Rollout.Kernels;

namespace Rollout.Engine;

/// <summary>One tensor of a safetensors file, as its header describes it.</summary>
/// <param name="Name">Name in the file.</param>
/// <param name="DTypeName">Element type as the header spells it, for example BF16 or I64.</param>
/// <param name="Shape">Dimensions, outermost first; empty for a scalar.</param>
/// <param name="Offset">Position of the first byte in the file.</param>
/// <param name="Bytes">Length in the file.</param>
public sealed record TensorInfo(string Name, string DTypeName, IReadOnlyList<long> Shape, long Offset, long Bytes)
{
    /// <summary>The element type, or null where it is not one of those supported for weights.</summary>
    public DType? DType => ParseDType(DTypeName);

    /// <summary>The number of elements.</summary>
    public long Elements => Shape.Aggregate(1L, (product, length) => product * length);

    internal static DType? ParseDType(string name) => name switch
    {
        "BF16" => Kernels.DType.BFloat16,
        "F16" => Kernels.DType.Float16,
        "F32" => Kernels.DType.Float32,
        _ => null,
    };
}
