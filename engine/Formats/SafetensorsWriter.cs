using System.Buffers;
using System.Buffers.Binary;
using System.Text.Json;
using Rollout.Kernels;

namespace Rollout.Engine;

/// <summary>A tensor to be written: its name, element type and dimensions.</summary>
public sealed record TensorDeclaration(string Name, DType Type, IReadOnlyList<long> Shape)
{
    /// <summary>Length in the file.</summary>
    /// <exception cref="OverflowException">No file can be so long.</exception>
    public long Bytes => checked(Shape.Aggregate((long)Type.Size(), (product, length) => product * length));
}

/// <summary>
/// Writes a safetensors file of tensors declared up front, so that models larger than memory can be written: declare, then
/// write the bytes of all tensors in declaration order, in pieces of any size, then <see cref="Complete"/>.
/// A writer disposed before that deletes the file.
/// </summary>
public sealed class SafetensorsWriter : IDisposable
{
    private readonly FileStream _stream;
    private readonly string _path;
    private long _left;

    /// <summary>Creates or replaces the file and writes its header.</summary>
    /// <exception cref="ArgumentException">A name is used twice or is reserved, or a dimension is negative.</exception>
    /// <exception cref="OverflowException">No file can be so long.</exception>
    public SafetensorsWriter(string path, IReadOnlyList<TensorDeclaration> tensors)
    {
        byte[] header = Header(tensors);
        _path = path;
        _left = tensors.Sum(tensor => tensor.Bytes);
        _stream = new FileStream(path, FileMode.Create, FileAccess.Write);
        Span<byte> length = (stackalloc byte[8]);
        BinaryPrimitives.WriteInt64LittleEndian(length, header.Length);
        _stream.Write(length);
        _stream.Write(header);
    }

    /// <summary>Writes a whole file from arrays; for small models.</summary>
    public static void Write(string path, IEnumerable<(TensorDeclaration Tensor, byte[] Bytes)> tensors)
    {
        List<(TensorDeclaration Tensor, byte[] Bytes)> all = tensors.ToList();
        foreach ((TensorDeclaration? tensor, byte[]? bytes) in all)
        {
            if (bytes.Length != tensor.Bytes)
                throw new ArgumentException($"tensor {tensor.Name} needs {tensor.Bytes} bytes, got {bytes.Length}", nameof(tensors));
        }
        using SafetensorsWriter writer = new(path, [.. all.Select(entry => entry.Tensor)]);
        foreach ((TensorDeclaration _, byte[]? bytes) in all)
            writer.Write(bytes);
        writer.Complete();
    }

    /// <summary>Writes the next bytes.</summary>
    /// <exception cref="ArgumentException">More bytes than were declared.</exception>
    public void Write(ReadOnlySpan<byte> bytes)
    {
        if (bytes.Length > _left)
            throw new ArgumentException($"{bytes.Length} bytes given, {_left} are left to write", nameof(bytes));
        _stream.Write(bytes);
        _left -= bytes.Length;
    }

    /// <summary>Closes the file.</summary>
    /// <exception cref="InvalidOperationException">Fewer bytes were written than declared.</exception>
    public void Complete()
    {
        if (_left != 0)
            throw new InvalidOperationException($"{_left} bytes are left to write");
        _left = -1;
        _stream.Dispose();
    }

    public void Dispose()
    {
        _stream.Dispose();
        if (_left < 0)
            return;
        _left = -1;
        File.Delete(_path);
    }

    private static byte[] Header(IReadOnlyList<TensorDeclaration> tensors)
    {
        HashSet<string> names = new() { "__metadata__" };
        ArrayBufferWriter<byte> buffer = new();
        using (Utf8JsonWriter json = new(buffer))
        {
            json.WriteStartObject();
            json.WriteStartObject("__metadata__");
            json.WriteString("format", "pt"); // transformers refuses files without it
            json.WriteEndObject();
            long offset = 0L;
            foreach (TensorDeclaration tensor in tensors)
            {
                if (!names.Add(tensor.Name))
                    throw new ArgumentException($"tensor name {tensor.Name} is used twice or reserved", nameof(tensors));
                if (tensor.Shape.Any(length => length < 0))
                    throw new ArgumentException($"tensor {tensor.Name} has a negative dimension", nameof(tensors));
                json.WriteStartObject(tensor.Name);
                json.WriteString("dtype", tensor.Type.SafetensorsName());
                json.WriteStartArray("shape");
                foreach (long length in tensor.Shape)
                    json.WriteNumberValue(length);
                json.WriteEndArray();
                json.WriteStartArray("data_offsets");
                json.WriteNumberValue(offset);
                json.WriteNumberValue(offset += tensor.Bytes);
                json.WriteEndArray();
                json.WriteEndObject();
            }
            json.WriteEndObject();
        }
        // The first tensor starts at a multiple of 8, as in the reference writer.
        int padding = -buffer.WrittenCount & 7;
        buffer.GetSpan(padding)[..padding].Fill((byte)' ');
        buffer.Advance(padding);
        return buffer.WrittenSpan.ToArray();
    }
}
