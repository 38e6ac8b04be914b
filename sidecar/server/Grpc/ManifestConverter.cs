using Rollout.Engine;
using Rollout.Kernels;
using Rollout.V1;

namespace Rollout.Server.Grpc;

/// <summary>
/// Converts a manifest of the wire to the engine's. Values that the engine's types cannot represent are reported as problems.
/// </summary>
internal static class ManifestConverter
{
    private const int MaxOwner = 256;
    private const int MaxDimensions = 8;
    private const int MaxParts = 4096;

    /// <summary>The manifest, and the values that could not be converted; the preflight finds all other problems.</summary>
    public static (UpdateManifest Manifest, ProblemList Problems) Convert(BeginUpdate begin)
    {
        ProblemList problems = UnknownFields.Of(begin);
        if (begin.Manifest.Count == 0) problems.Add(new("manifest", "names no tensor"));
        if (begin.PayloadBytes > long.MaxValue) problems.Add(new("payload_bytes", $"{begin.PayloadBytes} is more than any file can hold"));
        if (begin.JoinedPayloadBytes.Any(bytes => bytes > long.MaxValue))
            problems.Add(new("joined_payload_bytes", "one is more than any file can hold"));
        if (begin.JoinedPayloadBytes.Count >= MaxParts)
            problems.Add(new("joined_payload_bytes", $"at most {MaxParts - 1}, are {begin.JoinedPayloadBytes.Count}"));
        if (begin.Owner.Length > MaxOwner) problems.Add(new("owner", $"at most {MaxOwner} characters, has {begin.Owner.Length}"));
        if (!Enum.IsDefined(begin.Policy)) problems.Add(new("policy", $"this server knows no update policy {(int)begin.Policy}"));
        if (!Enum.IsDefined(begin.Mode)) problems.Add(new("mode", $"this server knows no update mode {(int)begin.Mode}"));
        UpdateManifest manifest = new()
        {
            Tensors = [.. begin.Manifest.Select(tensor => Convert(tensor, problems))],
            PayloadBytes = (long)(begin.PayloadBytes & long.MaxValue),
            JoinedPayloadBytes = [.. begin.JoinedPayloadBytes.Select(bytes => (long)(bytes & long.MaxValue))],
            BaseVersion = begin.BaseVersion,
            NewVersion = begin.NewVersion,
            Policy = begin.Policy switch
            {
                V1.UpdatePolicy.Keep => Engine.UpdatePolicy.Keep,
                V1.UpdatePolicy.Drain => Engine.UpdatePolicy.Drain,
                V1.UpdatePolicy.Abort => Engine.UpdatePolicy.Abort,
                _ => Engine.UpdatePolicy.Recompute,
            },
            Mode = begin.Mode switch
            {
                V1.UpdateMode.Staged => Engine.UpdateMode.Staged,
                V1.UpdateMode.InPlace => Engine.UpdateMode.InPlace,
                _ => Engine.UpdateMode.Auto,
            },
            Partial = begin.Partial,
            Owner = begin.Owner,
        };
        return (manifest, problems);
    }

    public static V1.UpdateMode ToWire(Engine.UpdateMode mode)
        => mode == Engine.UpdateMode.InPlace ? V1.UpdateMode.InPlace : V1.UpdateMode.Staged;

    public static TensorDType ToWire(DType type) => type switch
    {
        DType.BFloat16 => TensorDType.Bf16,
        DType.Float16 => TensorDType.F16,
        _ => TensorDType.F32,
    };

    private static Engine.ManifestTensor Convert(V1.ManifestTensor tensor, ProblemList problems)
    {
        // An unknown type fails the preflight, together with all other problems of the tensor.
        DType type = tensor.Dtype switch
        {
            TensorDType.Bf16 => DType.BFloat16,
            TensorDType.F16 => DType.Float16,
            TensorDType.F32 => DType.Float32,
            _ => (DType)(-1),
        };
        if (tensor.Offset > long.MaxValue)
            problems.Add(new($"manifest['{tensor.Name}']", $"offset {tensor.Offset} is more than any file can hold"));
        long? sparse = tensor.HasSparseCount ? (long)Math.Min(tensor.SparseCount, long.MaxValue) : null;
        return new Engine.ManifestTensor(tensor.Name, type, Shape(tensor, problems), (long)(tensor.Offset & long.MaxValue), sparse)
        {
            // Values too large for the engine's type are past the end of any tensor, which the preflight reports.
            FirstRow = (long)Math.Min(tensor.FirstRow, long.MaxValue),
            Part = (int)Math.Min(tensor.Part, int.MaxValue),
            Rows = tensor.Rows == 0 ? null : (long)Math.Min(tensor.Rows, long.MaxValue),
        };
    }

    private static long[] Shape(V1.ManifestTensor tensor, ProblemList problems)
    {
        if (tensor.Shape.Count > MaxDimensions)
        {
            problems.Add(new($"manifest['{tensor.Name}']", $"at most {MaxDimensions} dimensions, has {tensor.Shape.Count}"));
            return [];
        }

        // A dimension too large for the engine's type differs from the model's shape, which the preflight reports.
        long[] shape = new long[tensor.Shape.Count];
        for (int i = 0; i < shape.Length; i++) shape[i] = (long)Math.Min(tensor.Shape[i], long.MaxValue);
        return shape;
    }
}
