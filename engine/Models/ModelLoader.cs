using System.Buffers;
using Rollout.Kernels;

namespace Rollout.Engine;

/// <summary>Fills a weight set from a Hugging Face folder: all cores read, hash and pack.</summary>
internal static class ModelLoader
{
    /// <summary>Bytes read at once.</summary>
    private const int FileChunk = 1024 * 1024;

    /// <summary>Every tensor of the checkpoint by name, as <see cref="RolloutEngine.Describe"/> lists it.</summary>
    /// <exception cref="InvalidModelException">Tensors are missing, have another shape or a type that is not served.</exception>
    public static IReadOnlyList<ServedTensor> Load(
        Checkpoint checkpoint, LoadPlan plan, Backend backend, WeightSet weights, IProgress<double>? progress)
    {
        List<(LoadEntry Entry, CheckpointTensor Source)> work = Match(checkpoint, plan);
        long total = work.Sum(item => item.Source.Info.Bytes);
        long done = 0;
        Dictionary<IncomingTensor, CheckpointTensor> sources = work.ToDictionary(
            item => new IncomingTensor(Sent(item.Entry, item.Source), item.Entry, backend, weights), item => item.Source);
        IncomingTensor[] tensors = [.. sources.Keys];
        AllCores.ForEach([.. tensors.SelectMany(tensor => tensor.Ranges).OrderByDescending(range => range.Bytes)], range =>
        {
            byte[] buffer = ArrayPool<byte>.Shared.Rent(FileChunk);
            while (range.Taken < range.Bytes)
            {
                Span<byte> chunk = buffer.AsSpan(0, range.PieceBytes(FileChunk));
                sources[range.Tensor].Read(range.Start + range.Taken, chunk);
                range.Take(chunk);
                progress?.Report((double)Interlocked.Add(ref done, chunk.Length) / total);
            }

            ArrayPool<byte>.Shared.Return(buffer);
        });
        weights.HoldsAll(version: 0);
        return [.. tensors.Select(tensor => tensor.Served(tensor.Digest()))];
    }

    /// <summary>A tensor of the checkpoint as if it were sent alone.</summary>
    private static ManifestTensor Sent(LoadEntry entry, CheckpointTensor source)
        => new(entry.Source, source.Info.DType!.Value, entry.Shape, Offset: 0);

    private static string WrongShape(LoadEntry entry, IReadOnlyList<long> found)
        => $"tensor '{entry.Source}' has shape {LoadEntry.Format(found)}, config.json says {LoadEntry.Format(entry.Shape)}";

    private static List<(LoadEntry, CheckpointTensor)> Match(Checkpoint checkpoint, LoadPlan plan)
    {
        List<string> problems = [];
        List<(LoadEntry, CheckpointTensor)> work = [];
        foreach (LoadEntry entry in plan.Entries)
        {
            if (entry.Tied) continue;
            if (!checkpoint.Tensors.TryGetValue(entry.Source, out CheckpointTensor? source))
                problems.Add($"tensor '{entry.Source}' is missing");
            else if (!source.Info.Shape.SequenceEqual(entry.Shape))
                problems.Add(WrongShape(entry, source.Info.Shape));
            else if (source.Info.DType is null)
                problems.Add($"tensor '{entry.Source}' is {source.Info.DTypeName}; BF16, F16 and F32 are served");
            else
                work.Add((entry, source));
        }

        problems.AddRange(checkpoint.Tensors.Keys.Where(name => !plan.TryFind(name, out _)).Order()
            .Select(name => $"tensor '{name}' has no place in the model"));
        if (problems.Count > 0) throw new InvalidModelException(checkpoint.Folder, problems);
        return work;
    }
}
