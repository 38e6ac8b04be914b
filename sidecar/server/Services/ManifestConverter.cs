using Google.Protobuf.Collections;
using Rollout.Engine;
using Rollout.Kernels;
using Rollout.V1;

namespace Rollout.Server.Services;

/// <summary>A manifest as the wire has it, to the engine's; what the engine's types cannot hold is a problem of its own.</summary>
internal static class ManifestConverter
{
    private const int MaxOwner = 256;
    private const int MaxDimensions = 8;

    /// <exception cref="UpdateRejectedException">Lists every value that is not understood.</exception>
    public static UpdateManifest Convert(BeginUpdate begin)
    {
        List<Engine.Problem> problems = UnknownFields.Of(begin);
        Engine.ManifestTensor[] tensors = new Engine.ManifestTensor[begin.Manifest.Count];
        for (int i = 0; i < tensors.Length; i++) tensors[i] = Convert(begin.Manifest[i], problems);
        if (tensors.Length == 0) problems.Add(new("manifest", "names no tensor"));
        if (begin.PayloadBytes > long.MaxValue) problems.Add(new("payload_bytes", $"{begin.PayloadBytes} is more than any file can hold"));
        if (begin.Owner.Length > MaxOwner) problems.Add(new("owner", $"at most {MaxOwner} characters, has {begin.Owner.Length}"));
        Engine.UpdatePolicy policy = Engine.UpdatePolicy.Recompute;
        switch (begin.Policy)
        {
            case V1.UpdatePolicy.Unspecified or V1.UpdatePolicy.Recompute: break;
            case V1.UpdatePolicy.Keep: policy = Engine.UpdatePolicy.Keep; break;
            case V1.UpdatePolicy.Drain: policy = Engine.UpdatePolicy.Drain; break;
            case V1.UpdatePolicy.Abort: policy = Engine.UpdatePolicy.Abort; break;
            default: problems.Add(new("policy", $"this server knows no update policy {(int)begin.Policy}")); break;
        }

        if (problems.Count > 0) throw new UpdateRejectedException(problems);
        return new UpdateManifest
        {
            Tensors = tensors,
            PayloadBytes = (long)begin.PayloadBytes,
            BaseVersion = begin.BaseVersion,
            NewVersion = begin.NewVersion,
            Policy = policy,
            Owner = begin.Owner,
        };
    }

    public static TensorDType ToWire(DType type) => type switch
    {
        DType.BFloat16 => TensorDType.Bf16,
        DType.Float16 => TensorDType.F16,
        _ => TensorDType.F32,
    };

    private static Engine.ManifestTensor Convert(V1.ManifestTensor tensor, List<Engine.Problem> problems)
    {
        string field = $"manifest['{tensor.Name}']";
        DType type = DType.Float32;
        switch (tensor.Dtype)
        {
            case TensorDType.Bf16: type = DType.BFloat16; break;
            case TensorDType.F16: type = DType.Float16; break;
            case TensorDType.F32: type = DType.Float32; break;
            case TensorDType.Unspecified: problems.Add(new(field, "has no dtype")); break;
            default: problems.Add(new(field, $"this server knows no dtype {(int)tensor.Dtype}")); break;
        }

        if (tensor.Offset > long.MaxValue) problems.Add(new(field, $"offset {tensor.Offset} is more than any file can hold"));
        long[] shape = Shape(tensor.Shape, type, field, problems);
        return new Engine.ManifestTensor(tensor.Name, type, shape, (long)(tensor.Offset & long.MaxValue));
    }

    private static long[] Shape(RepeatedField<ulong> wire, DType type, string field, List<Engine.Problem> problems)
    {
        if (wire.Count > MaxDimensions)
        {
            problems.Add(new(field, $"at most {MaxDimensions} dimensions, has {wire.Count}"));
            return [];
        }

        // The product must fit too: later arithmetic relies on it.
        UInt128 bytes = (UInt128)type.Size();
        long[] shape = new long[wire.Count];
        for (int i = 0; i < shape.Length; i++)
        {
            bytes = wire[i] == 0 ? 0 : bytes > long.MaxValue ? bytes : bytes * wire[i];
            shape[i] = (long)(wire[i] & long.MaxValue);
        }

        if (bytes <= long.MaxValue) return shape;
        problems.Add(new(field, $"shape [{string.Join(", ", wire)}] holds more bytes than any file can"));
        return [];
    }
}
