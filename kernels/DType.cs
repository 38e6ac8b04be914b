namespace Rollout.Kernels;

/// <summary>Element types that a checkpoint or a trainer may send. How a device stores them is up to the backend.</summary>
public enum DType
{
    /// <summary>bfloat16, 2 bytes.</summary>
    BFloat16,

    /// <summary>IEEE binary16, 2 bytes.</summary>
    Float16,

    /// <summary>IEEE binary32, 4 bytes.</summary>
    Float32,
}

public static class DTypeExtensions
{
    /// <summary>Bytes of one element.</summary>
    public static int Size(this DType type) => type == DType.Float32 ? 4 : 2;

    /// <summary>The name safetensors uses: BF16, F16 or F32.</summary>
    public static string SafetensorsName(this DType type) => type switch
    {
        DType.BFloat16 => "BF16",
        DType.Float16 => "F16",
        _ => "F32",
    };
}
