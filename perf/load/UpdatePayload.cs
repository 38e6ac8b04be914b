using System.Buffers.Binary;
using System.IO.Hashing;
using Google.Protobuf;
using Rollout.Engine;
using Rollout.Kernels;
using Rollout.V1;

namespace Rollout.Load;

/// <summary>A model's weights as an update sends them.</summary>
internal sealed class UpdatePayload
{
    private UpdatePayload(byte[] bytes, IReadOnlyList<V1.ManifestTensor> manifest, ByteString digest)
    {
        Bytes = bytes;
        Manifest = manifest;
        Digest = digest;
    }

    public byte[] Bytes { get; }

    public IReadOnlyList<V1.ManifestTensor> Manifest { get; }

    /// <summary>Combined, as <see cref="Commit"/> takes it.</summary>
    public ByteString Digest { get; }

    /// <summary>Takes the weights of a model that <see cref="ShapeS.Write"/> wrote.</summary>
    public static UpdatePayload Read(string modelFolder)
    {
        byte[] bytes = ReadData(Path.Combine(modelFolder, ShapeS.WeightsFile));
        List<V1.ManifestTensor> manifest = [];
        XxHash128 digests = new();
        int offset = 0;
        foreach ((string Name, IReadOnlyList<long> Shape) tensor in ModelSpec.Load(modelFolder).CheckpointTensors())
        {
            V1.ManifestTensor entry = new() { Name = tensor.Name, Dtype = TensorDType.Bf16, Offset = (ulong)offset };
            entry.Shape.AddRange(tensor.Shape.Select(dimension => (ulong)dimension));
            manifest.Add(entry);
            int length = checked((int)(sizeof(ushort) * tensor.Shape.Aggregate(1L, (product, dimension) => product * dimension)));
            digests.Append(TensorDigest.Of(bytes.AsSpan(offset, length)));
            offset += length;
        }

        if (offset != bytes.Length) throw new InvalidDataException($"the file holds {bytes.Length} bytes of tensors, the model {offset}");
        return new UpdatePayload(bytes, manifest, ByteString.CopyFrom(digests.GetCurrentHash()));
    }

    private static byte[] ReadData(string path)
    {
        using FileStream file = new(path, FileMode.Open, FileAccess.Read, FileShare.Read, bufferSize: 0);
        Span<byte> length = stackalloc byte[sizeof(long)];
        file.ReadExactly(length);
        file.Position = sizeof(long) + BinaryPrimitives.ReadInt64LittleEndian(length);
        byte[] data = new byte[checked((int)(file.Length - file.Position))];
        file.ReadExactly(data);
        return data;
    }
}
