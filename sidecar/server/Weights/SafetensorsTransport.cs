using Rollout.Engine;
using Rollout.Kernels;
using Rollout.V1;

namespace Rollout.Server.Weights;

/// <summary>
/// A safetensors file on this machine: its data section is a part of the payload, and its header must agree with the manifest.
/// </summary>
internal sealed class SafetensorsTransport : ITransport
{
    public ValueTask<PayloadSource> SourceOfAsync(UpdateRequest message, UpdatePart part, CancellationToken cancellation)
        => new(SourceOf(message, part));

    private static PayloadSource SourceOf(UpdateRequest message, UpdatePart part)
    {
        CheckpointFile source = message.File;
        if (!Path.IsPathFullyQualified(source.Path) || source.Path.Contains('\0'))
            throw Refused(source.Path, "the path must be absolute");
        if (!File.Exists(source.Path)) throw Refused(source.Path, "there is no such file");
        if (source.PayloadOffset > long.MaxValue) throw Refused(source.Path, $"payload_offset {source.PayloadOffset} is past any payload");
        SafetensorsFile checkpoint = Open(source.Path);
        try
        {
            long payloadOffset = (long)source.PayloadOffset;
            CheckHeader(checkpoint, payloadOffset, part);
            return new FileSource(checkpoint.Handle, checkpoint.DataStart, payloadOffset, checkpoint.DataBytes, owner: checkpoint);
        }
        catch
        {
            checkpoint.Dispose();
            throw;
        }
    }

    public void Dispose()
    {
    }

    private static SafetensorsFile Open(string path)
    {
        try
        {
            return SafetensorsFile.Open(path);
        }
        catch (InvalidModelException e)
        {
            throw Refused(path, string.Join("; ", e.Problems));
        }
    }

    /// <summary>
    /// Checks that the file has exactly those tensors of the manifest that are in its part of the payload, as the manifest describes them.
    /// </summary>
    private static void CheckHeader(SafetensorsFile file, long payloadOffset, UpdatePart part)
    {
        List<string> problems = [];
        int found = 0;
        foreach (Engine.ManifestTensor tensor in part.Tensors)
        {
            if (tensor.Offset < payloadOffset || tensor.Offset >= payloadOffset + file.DataBytes) continue;
            if (!file.Tensors.TryGetValue(tensor.Name, out TensorInfo? info))
            {
                problems.Add($"'{tensor.Name}' is not in it");
                continue;
            }

            found++;
            if (tensor.SparseCount is not null) problems.Add($"'{tensor.Name}' is sparse in the manifest: a file has whole tensors");
            if (info.DType != tensor.Type)
                problems.Add($"'{tensor.Name}' is {info.DTypeName}, in the manifest {tensor.Type.SafetensorsName()}");
            if (!info.Shape.SequenceEqual(tensor.SentShape))
                problems.Add($"'{tensor.Name}' has shape {Text(info.Shape)}, in the manifest {Text(tensor.SentShape)}");
            long offset = info.Offset - file.DataStart + payloadOffset;
            if (offset != tensor.Offset)
                problems.Add($"'{tensor.Name}' is at payload byte {offset}, in the manifest {tensor.Offset}");
        }

        if (found < file.Tensors.Count) problems.Add($"{file.Tensors.Count - found} of its tensors are not in the manifest");
        if (problems.Count > 0) throw Refused(file.Path, string.Join("; ", problems));
    }

    private static string Text(IEnumerable<long> shape) => $"[{string.Join(", ", shape)}]";

    private static UpdateFailedException Refused(string path, string reason)
        => new(UpdateFailure.Source, $"file '{path.Replace('\0', '?')}' refused: {reason}");
}
