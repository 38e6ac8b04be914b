using System.Buffers.Binary;
using System.Text;
using System.Text.Json;
using System.Text.Unicode;
using Microsoft.Win32.SafeHandles;

namespace Rollout.Engine;

/// <summary>
/// A safetensors file, open for reading: 8 bytes of header length, a JSON header, then the tensors without gaps. The whole header is
/// checked before any of it is used, as the format's reference implementation does.
/// <para>
/// Bytes are read through the file handle and not mapped: if the file were truncated while in use, a mapping would end the process with
/// SIGBUS, whereas a read only returns fewer bytes.
/// </para>
/// </summary>
public sealed class SafetensorsFile : IDisposable
{
    /// <summary>The reference implementation's limit on the header.</summary>
    internal const int MostHeaderBytes = 100_000_000;

    // Far above any real file. They bound the memory that a hostile header can make the parser allocate.
    private const int MostDimensions = 16;
    private const int MostProblems = 1000;
    private const int LengthBytes = 8;

    private SafetensorsFile(string path, SafeFileHandle handle, Header header)
    {
        Path = path;
        Handle = handle;
        DataBytes = RandomAccess.GetLength(handle) - header.DataStart;
        DataStart = header.DataStart;
        Tensors = header.Tensors;
        Metadata = header.Metadata;
    }

    public string Path { get; }

    /// <summary>Open for as long as this object is not disposed.</summary>
    public SafeFileHandle Handle { get; }

    /// <summary>Position of the data section, which all tensors fill without a gap.</summary>
    public long DataStart { get; }

    /// <summary>Length of the data section.</summary>
    public long DataBytes { get; }

    /// <summary>Tensors by name.</summary>
    public IReadOnlyDictionary<string, TensorInfo> Tensors { get; }

    /// <summary>The header's free text, usually just format = pt.</summary>
    public IReadOnlyDictionary<string, string> Metadata { get; }

    /// <summary>Opens a file and checks its header.</summary>
    /// <exception cref="InvalidModelException">The file cannot be opened or is not valid safetensors; lists every problem.</exception>
    public static SafetensorsFile Open(string path)
    {
        SafeFileHandle? handle = null;
        try
        {
            RegularFile.ThrowIfNot(path);
            handle = File.OpenHandle(path);
            SafetensorsFile file = new(path, handle, ReadHeader(path, handle));
            handle = null;
            return file;
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException or NotSupportedException)
        {
            throw new InvalidModelException(path, $"cannot be read: {e.Message}", e);
        }
        finally
        {
            handle?.Dispose();
        }
    }

    /// <summary>Reads bytes of a tensor. May be called from several threads at once.</summary>
    /// <param name="tensor">A tensor of this file, of a type that weights can have.</param>
    /// <param name="byteOffset">First byte to read, relative to the start of the tensor.</param>
    /// <param name="destination">Filled completely; the range must end within the tensor.</param>
    /// <exception cref="InvalidModelException">The element type is not supported, or the file has become shorter.</exception>
    public void Read(TensorInfo tensor, long byteOffset, Span<byte> destination)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(byteOffset);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(byteOffset, tensor.Bytes - destination.Length);
        if (tensor.DType is null)
        {
            throw new InvalidModelException(Path,
                $"tensor {InvalidModelException.Quote(tensor.Name)} has dtype {tensor.DTypeName}; weights must be BF16, F16 or F32");
        }
        if (ReadFully(Handle, tensor.Offset + byteOffset, destination) < destination.Length)
        {
            throw new InvalidModelException(Path,
                $"the file has become shorter: tensor {InvalidModelException.Quote(tensor.Name)} is cut off");
        }
    }

    public void Dispose() => Handle.Dispose();

    private static Header ReadHeader(string path, SafeFileHandle handle)
    {
        long fileBytes = RandomAccess.GetLength(handle);
        Span<byte> prefix = (stackalloc byte[LengthBytes]);
        if (ReadFully(handle, 0, prefix) < LengthBytes)
            throw new InvalidModelException(path, $"the file has {fileBytes} bytes, too few for a safetensors header");
        ulong length = BinaryPrimitives.ReadUInt64LittleEndian(prefix);
        if (length > MostHeaderBytes)
            throw new InvalidModelException(path, $"the header claims {length} bytes; the format allows {MostHeaderBytes}");
        if (length > (ulong)(fileBytes - LengthBytes))
            throw new InvalidModelException(path, $"the header claims {length} bytes, the file has {fileBytes}: truncated?");

        byte[] json = new byte[length];
        if (ReadFully(handle, LengthBytes, json) < json.Length)
            throw new InvalidModelException(path, "the file was truncated while being read");
        return ParseHeader(path, json, LengthBytes + json.Length, fileBytes);
    }

    private static int ReadFully(SafeFileHandle handle, long offset, Span<byte> destination)
    {
        int done = 0;
        while (done < destination.Length)
        {
            int read = RandomAccess.Read(handle, destination[done..], offset + done);
            if (read == 0)
                break;
            done += read;
        }
        return done;
    }

    /// <summary>Parses and checks a header; <paramref name="dataStart"/> is where the tensors begin in a file of fileBytes.</summary>
    private static Header ParseHeader(string path, ReadOnlySpan<byte> json, long dataStart, long fileBytes)
    {
        if (!Utf8.IsValid(json))
            throw new InvalidModelException(path, "the header is not valid UTF-8");
        Header header = new(path);
        try
        {
            Utf8JsonReader reader = new(json);
            header.Parse(ref reader, dataStart);
        }
        catch (JsonException e)
        {
            header.Problems.Add($"the header is not valid JSON: {e.Message}");
        }
        catch (InvalidOperationException e)
        {
            // Thrown by the reader for an escaped half of a surrogate pair.
            header.Problems.Add($"the header holds a string that is not valid Unicode: {e.Message}");
        }

        // The offsets cannot be checked when some entries could not be read.
        if (header.Problems.Count == 0)
            header.CheckLayout(dataStart, fileBytes);
        InvalidModelException.ThrowIfAny(path, header.Problems);
        return header;
    }

    /// <summary>Bits of one element; 0 for a type that this reader does not know.</summary>
    private static int BitsOf(string dtype) => dtype switch
    {
        "F4" => 4,
        "F6_E2M3" or "F6_E3M2" => 6,
        "BOOL" or "U8" or "I8" or "F8_E4M3" or "F8_E5M2" or "F8_E8M0" or "F8_E4M3FNUZ" or "F8_E5M2FNUZ" => 8,
        "I16" or "U16" or "F16" or "BF16" => 16,
        "I32" or "U32" or "F32" => 32,
        "I64" or "U64" or "F64" or "C64" => 64,
        _ => 0,
    };

    private sealed class Header(string path)
    {
        public Dictionary<string, TensorInfo> Tensors { get; } = [];

        public Dictionary<string, string> Metadata { get; } = [];

        public List<string> Problems { get; } = [];

        public long DataStart { get; private set; }

        public void Parse(ref Utf8JsonReader reader, long dataStart)
        {
            DataStart = dataStart;
            if (!reader.Read() || reader.TokenType != JsonTokenType.StartObject)
            {
                Report("the header is not a JSON object");
                return;
            }
            bool hasMetadata = false;
            while (reader.Read() && reader.TokenType == JsonTokenType.PropertyName)
            {
                string name = reader.GetString()!;
                reader.Read();
                if (name != "__metadata__")
                    ParseTensor(ref reader, name, dataStart);
                else if (hasMetadata)
                    Report("__metadata__ appears twice in the header");
                else
                    ParseMetadata(ref reader);
                reader.Skip(); // over a value that was not what it must be, so that the next entry is read as one
                hasMetadata |= name == "__metadata__";
            }
            // Padding is spaces, which the reader skips; anything else after the object throws.
            reader.Read();
        }

        /// <summary>Tensors must tile the rest of the file: no gap, no overlap, nothing left over.</summary>
        public void CheckLayout(long dataStart, long fileBytes)
        {
            long end = dataStart;
            string previous = "";
            foreach (TensorInfo? tensor in Tensors.Values.OrderBy(t => t.Offset).ThenBy(t => t.Bytes))
            {
                string name = InvalidModelException.Quote(tensor.Name);
                if (tensor.Offset < end)
                    Report($"tensor {name} overlaps {previous}");
                else if (tensor.Offset > end)
                    Report($"{tensor.Offset - end} bytes before tensor {name} belong to no tensor");
                if (tensor.Offset + tensor.Bytes > fileBytes)
                    Report($"tensor {name} ends at byte {tensor.Offset + tensor.Bytes}, the file at {fileBytes}: truncated?");
                end = Math.Max(end, tensor.Offset + tensor.Bytes);
                previous = name;
            }
            if (end < fileBytes)
                Report($"the last {fileBytes - end} bytes of the file belong to no tensor");
        }

        private void ParseMetadata(ref Utf8JsonReader reader)
        {
            if (reader.TokenType != JsonTokenType.StartObject)
            {
                Report("__metadata__ must be an object of strings");
                return;
            }
            while (reader.Read() && reader.TokenType == JsonTokenType.PropertyName)
            {
                string key = reader.GetString()!;
                reader.Read();
                if (reader.TokenType != JsonTokenType.String)
                {
                    Report($"__metadata__ {InvalidModelException.Quote(key)} must be a string");
                    reader.Skip();
                }
                else if (!Metadata.TryAdd(key, reader.GetString()!))
                {
                    Report($"__metadata__ {InvalidModelException.Quote(key)} appears twice");
                }
            }
        }

        private void ParseTensor(ref Utf8JsonReader reader, string name, long dataStart)
        {
            string quoted = InvalidModelException.Quote(name);
            int before = Problems.Count;
            if (reader.TokenType != JsonTokenType.StartObject)
            {
                Report($"tensor {quoted} must be an object with dtype, shape and data_offsets");
                return;
            }
            string? dtype = null;
            long[]? shape = null, offsets = null;
            while (reader.Read() && reader.TokenType == JsonTokenType.PropertyName)
            {
                string key = reader.GetString()!;
                reader.Read();
                bool twice = false;
                switch (key)
                {
                    case "dtype":
                        twice = dtype is not null;
                        if (reader.TokenType == JsonTokenType.String)
                            dtype = reader.GetString();
                        else
                            Report($"dtype of tensor {quoted} must be a string");
                        break;
                    case "shape":
                        twice = shape is not null;
                        shape = ParseNumbers(ref reader, $"shape of tensor {quoted}", MostDimensions);
                        break;
                    case "data_offsets":
                        twice = offsets is not null;
                        offsets = ParseNumbers(ref reader, $"data_offsets of tensor {quoted}", 2);
                        break;
                    default:
                        Report($"tensor {quoted} has an unknown field {InvalidModelException.Quote(key)}");
                        break;
                }
                reader.Skip();
                if (twice)
                    Report($"{key} of tensor {quoted} appears twice");
            }
            if (Problems.Count > before)
                return;
            if (dtype is null || shape is null || offsets is not [var begin, var end])
            {
                Report($"tensor {quoted} must have dtype, shape and two data_offsets");
                return;
            }

            if (begin > end)
                Report($"data_offsets of tensor {quoted} end before they begin: [{begin}, {end}]");
            else if (end > long.MaxValue - dataStart)
                Report($"data_offsets of tensor {quoted} are out of range: [{begin}, {end}]");
            else if (CountElements(shape) is not { } elements)
                Report($"shape [{string.Join(", ", shape)}] of tensor {quoted} is too large");
            else if (BitsOf(dtype) is var bits && bits != 0 && (Int128)elements * bits != (Int128)(end - begin) * 8)
                Report($"tensor {quoted} has {end - begin} bytes, not those of [{string.Join(", ", shape)}] {dtype}");
            else if (!Tensors.TryAdd(name, new TensorInfo(name, dtype, shape, dataStart + begin, end - begin)))
                Report($"tensor {quoted} appears twice in the header");
        }

        /// <summary>Reads [n, n, ...] with n from 0 to long.MaxValue; leaves the reader on the end of the value.</summary>
        private long[]? ParseNumbers(ref Utf8JsonReader reader, string what, int most)
        {
            if (reader.TokenType != JsonTokenType.StartArray)
            {
                Report($"{what} must be an array of non-negative integers");
                return null;
            }
            List<long> numbers = new(4);
            bool valid = true;
            while (reader.Read() && reader.TokenType != JsonTokenType.EndArray)
            {
                if (reader.TokenType == JsonTokenType.Number && reader.TryGetInt64(out long number) && number >= 0)
                {
                    if (numbers.Count <= most)
                        numbers.Add(number);
                }
                else
                {
                    valid = false;
                    reader.Skip();
                }
            }
            if (!valid)
                Report($"{what} must be an array of non-negative integers");
            else if (numbers.Count > most)
                Report($"{what} has more than {most} entries");
            else
                return [.. numbers];
            return null;
        }

        /// <summary>The product of the dimensions, or null when it exceeds 64 bits.</summary>
        private static long? CountElements(long[] shape)
        {
            if (shape.Contains(0))
                return 0;
            UInt128 product = 1;
            foreach (long length in shape)
            {
                product *= (ulong)length;
                if (product > long.MaxValue)
                    return null;
            }
            return (long)product;
        }

        private void Report(string problem)
        {
            Problems.Add(problem);
            if (Problems.Count == MostProblems)
            {
                Problems.Add("the rest was not checked");
                throw new InvalidModelException(path, Problems);
            }
        }
    }
}
