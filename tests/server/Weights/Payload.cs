using System.IO.Hashing;
using System.Runtime.InteropServices;
using Google.Protobuf;
using Rollout.Engine;
using Rollout.Kernels;
using Rollout.V1;

namespace Rollout.Server.Tests;

/// <summary>Other weights for a golden model: the payload of an update, its manifest, and the same as a model folder.</summary>
internal sealed class Payload
{
    private readonly List<(TensorDeclaration Tensor, byte[] Bytes)> _tensors = [];
    private readonly Action<string> _writeConfig;
    private readonly int _alignment;
    private readonly MemoryStream _bytes = new();
    private readonly XxHash128 _digest = new();

    private Payload(Action<string> writeConfig, int alignment)
    {
        _writeConfig = writeConfig;
        _alignment = alignment;
    }

    public List<V1.ManifestTensor> Manifest { get; } = [];

    public byte[] Bytes { get; private set; } = [];

    /// <summary>As weights.proto defines it: over the tensors' digests in manifest order.</summary>
    public byte[] Digest { get; private set; } = [];

    /// <summary>The model's own tensors with their elements in reverse: a different model with equally random weights.</summary>
    public static Payload Reversed(string model) => Of(model, (_, elements) => elements.Reverse());

    /// <summary>The golden model's own tensors, each as the test changes it.</summary>
    public static Payload Of(string model, Action<string, Span<ushort>> change, int alignment = 64)
    {
        string folder = Golden.Folder(model);
        Payload payload = new(config => File.Copy(Path.Combine(folder, "config.json"), config), alignment);
        using SafetensorsFile file = SafetensorsFile.Open(Path.Combine(folder, "model.safetensors"));
        foreach (TensorInfo info in file.Tensors.Values.OrderBy(tensor => tensor.Name, StringComparer.Ordinal))
        {
            byte[] values = new byte[info.Bytes];
            file.Read(info, 0, values);
            change(info.Name, MemoryMarshal.Cast<byte, ushort>(values.AsSpan()));
            payload.Add(new TensorDeclaration(info.Name, DType.BFloat16, info.Shape), values);
        }

        return payload.Seal();
    }

    public static Payload Of(HandMadeModel model)
    {
        Payload payload = new(model.WriteConfig, alignment: 64);
        foreach ((TensorDeclaration tensor, byte[] bytes) in model.Tensors) payload.Add(tensor, bytes);
        return payload.Seal();
    }

    /// <summary>Some of its tensors, for a partial update.</summary>
    /// <param name="named">Which.</param>
    /// <param name="indices">Of the elements to send, ascending; null: all.</param>
    public Payload Part(Func<string, bool> named, Func<string, uint[]?> indices)
    {
        Payload part = new(_writeConfig, _alignment);
        foreach ((TensorDeclaration tensor, byte[] bytes) in _tensors.Where(entry => named(entry.Tensor.Name)))
            part.Add(tensor, bytes, indices(tensor.Name));
        return part.Seal();
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
        _writeConfig(Path.Combine(folder, "config.json"));
        WriteFile(Path.Combine(folder, "model.safetensors"), ..);
    }

    /// <summary>Some of the tensors as a safetensors file; its data section is their part of the payload where that has no gaps.</summary>
    public void WriteFile(string path, Range tensors)
        => SafetensorsWriter.Write(path, CollectionsMarshal.AsSpan(_tensors)[tensors].ToArray());

    private void Add(TensorDeclaration declared, byte[] values, uint[]? indices = null)
    {
        while (_bytes.Length % _alignment != 0) _bytes.WriteByte(0xAA); // a gap may hold anything
        V1.ManifestTensor tensor = new() { Name = declared.Name, Dtype = TensorDType.Bf16, Offset = (ulong)_bytes.Length };
        tensor.Shape.Add(declared.Shape.Select(dimension => (ulong)dimension));
        byte[] sent = values;
        if (indices is not null)
        {
            tensor.SparseCount = (ulong)indices.Length;
            byte[][] elements = [.. indices.Select(index => values.AsSpan((int)index * sizeof(ushort), sizeof(ushort)).ToArray())];
            sent = [.. MemoryMarshal.AsBytes<uint>(indices), .. elements.SelectMany(element => element)];
        }

        Manifest.Add(tensor);
        _tensors.Add((declared, values));
        _bytes.Write(sent);
        _digest.Append(TensorDigest.Of(sent));
    }

    private Payload Seal()
    {
        Bytes = _bytes.ToArray();
        Digest = _digest.GetCurrentHash();
        return this;
    }
}
