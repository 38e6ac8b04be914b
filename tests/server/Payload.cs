using System.IO.Hashing;
using Google.Protobuf;
using Rollout.Engine;
using Rollout.Kernels;
using Rollout.V1;

namespace Rollout.Server.Tests;

/// <summary>Other weights for a golden model: the payload of an update, its manifest, and the same as a model folder.</summary>
internal sealed class Payload
{
    private const int Alignment = 64;

    private readonly List<(TensorDeclaration Tensor, byte[] Bytes)> _tensors = [];
    private readonly string _config;

    private Payload(string config) => _config = config;

    public List<V1.ManifestTensor> Manifest { get; } = [];

    public byte[] Bytes { get; private set; } = [];

    /// <summary>As weights.proto defines it: over the tensors' digests in manifest order.</summary>
    public byte[] Digest { get; private set; } = [];

    /// <summary>The model's own tensors with their elements in reverse: as random as before, and quite another model.</summary>
    public static Payload Reversed(string model)
    {
        string folder = Golden.Folder(model);
        Payload payload = new(Path.Combine(folder, "config.json"));
        using SafetensorsFile file = SafetensorsFile.Open(Path.Combine(folder, "model.safetensors"));
        XxHash128 all = new();
        MemoryStream bytes = new();
        foreach (TensorInfo info in file.Tensors.Values.OrderBy(tensor => tensor.Name, StringComparer.Ordinal))
        {
            byte[] values = new byte[info.Bytes];
            file.Read(info, 0, values);
            System.Runtime.InteropServices.MemoryMarshal.Cast<byte, ushort>(values.AsSpan()).Reverse();
            while (bytes.Length % Alignment != 0) bytes.WriteByte(0xAA); // a gap may hold anything
            V1.ManifestTensor tensor = new() { Name = info.Name, Dtype = TensorDType.Bf16, Offset = (ulong)bytes.Length };
            tensor.Shape.Add(info.Shape.Select(dimension => (ulong)dimension));
            payload.Manifest.Add(tensor);
            payload._tensors.Add((new TensorDeclaration(info.Name, DType.BFloat16, info.Shape), values));
            bytes.Write(values);
            all.Append(XxHash128.Hash(values));
        }

        payload.Bytes = bytes.ToArray();
        payload.Digest = all.GetCurrentHash();
        return payload;
    }

    public UpdateRequest Begin(ulong from, ulong to, Action<BeginUpdate>? change = null)
    {
        BeginUpdate begin = new()
        {
            Manifest = { Manifest.Select(tensor => tensor.Clone()) },
            PayloadBytes = (ulong)Bytes.Length,
            BaseVersion = from,
            NewVersion = to,
            Owner = "test",
            DeadlineMilliseconds = 20_000,
        };
        change?.Invoke(begin);
        return new UpdateRequest { Begin = begin };
    }

    public IEnumerable<UpdateRequest> Chunks(int size)
    {
        for (int at = 0; at < Bytes.Length; at += size)
        {
            ByteString data = ByteString.CopyFrom(Bytes.AsSpan(at, Math.Min(size, Bytes.Length - at)));
            yield return new UpdateRequest { Chunk = new Chunk { Offset = (ulong)at, Data = data } };
        }
    }

    public UpdateRequest Commit() => new() { Commit = new Commit { Digest = ByteString.CopyFrom(Digest) } };

    /// <summary>The same weights as a folder that can be loaded.</summary>
    public void WriteModel(string folder)
    {
        File.Copy(_config, Path.Combine(folder, "config.json"));
        SafetensorsWriter.Write(Path.Combine(folder, "model.safetensors"), _tensors);
    }
}
