namespace Rollout.Client;

/// <summary>Type of a tensor's elements, little-endian.</summary>
public enum TensorDType
{
    /// <summary>bfloat16, 2 bytes.</summary>
    BF16,

    /// <summary>IEEE binary16, 2 bytes.</summary>
    F16,

    /// <summary>IEEE binary32, 4 bytes.</summary>
    F32,
}

public static class TensorDTypeExtensions
{
    /// <summary>Bytes of one element.</summary>
    public static int Size(this TensorDType type) => type == TensorDType.F32 ? 4 : 2;

    internal static V1.TensorDType ToProto(this TensorDType type) => type switch
    {
        TensorDType.BF16 => V1.TensorDType.Bf16,
        TensorDType.F16 => V1.TensorDType.F16,
        TensorDType.F32 => V1.TensorDType.F32,
        _ => throw new ArgumentOutOfRangeException(nameof(type), type, null),
    };

    internal static TensorDType ToClient(this V1.TensorDType type) => type switch
    {
        V1.TensorDType.Bf16 => TensorDType.BF16,
        V1.TensorDType.F16 => TensorDType.F16,
        V1.TensorDType.F32 => TensorDType.F32,
        _ => throw new RolloutException($"the sidecar is newer than this client: unknown tensor type {(int)type}"),
    };
}
