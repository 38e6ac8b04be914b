using System.Buffers.Binary;
using System.Text.Json;

namespace Rollout.Client;

/// <summary>Through a safetensors file in a folder that the sidecar can read; it is removed when the push has ended.</summary>
internal sealed class FileSender : IPayloadSender, IDisposable
{
    private readonly byte[] _header;
    private readonly PayloadFile _file;
    private readonly int _parallelism;

    /// <exception cref="IOException">The folder's disk has no room.</exception>
    public FileSender(PayloadLayout layout, string folder, int parallelism)
    {
        _header = Header(layout);
        _file = PayloadFile.Create(_header.Length + layout.PayloadBytes, Path.GetFullPath(folder));
        _parallelism = parallelism;
    }

    public async Task<SentBy> SendAsync(UpdateCall call, PayloadWriter payload, V1.Ready ready, CancellationToken cancellationToken)
    {
        _file.Write(_header, 0);
        await payload.WriteToAsync(_file, 0, payload.Bytes, _header.Length, _parallelism, cancellationToken);
        await call.SendAsync(new V1.UpdateRequest { File = new V1.CheckpointFile { Path = _file.Path } }, cancellationToken);
        return new SentBy(PushTransport.File, "a file was asked for");
    }

    public void Dispose() => _file.Dispose();

    /// <summary>Length and JSON, as https://github.com/huggingface/safetensors has it; padded so that the data is aligned.</summary>
    private static byte[] Header(PayloadLayout layout)
    {
        using MemoryStream stream = new();
        stream.Write(new byte[sizeof(long)]);
        using (Utf8JsonWriter json = new(stream))
        {
            json.WriteStartObject();
            for (int i = 0; i < layout.Manifest.Count; i++)
            {
                V1.ManifestTensor tensor = layout.Manifest[i];
                json.WriteStartObject(tensor.Name);
                json.WriteString("dtype", tensor.Dtype.ToClient().ToString());
                json.WriteStartArray("shape");
                for (int d = 0; d < tensor.Shape.Count; d++)
                    json.WriteNumberValue(d == 0 && tensor.Rows > 0 ? tensor.Rows : tensor.Shape[d]);
                json.WriteEndArray();
                json.WriteStartArray("data_offsets");
                json.WriteNumberValue(tensor.Offset);
                json.WriteNumberValue(tensor.Offset + (ulong)layout.Sizes[i]);
                json.WriteEndArray();
                json.WriteEndObject();
            }

            json.WriteEndObject();
        }

        while (stream.Length % sizeof(long) != 0)
            stream.WriteByte((byte)' ');
        byte[] header = stream.ToArray();
        BinaryPrimitives.WriteInt64LittleEndian(header, header.Length - sizeof(long));
        return header;
    }
}
