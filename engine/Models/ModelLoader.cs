using System.Buffers;
using System.IO.Hashing;
using Rollout.Kernels;

namespace Rollout.Engine;

/// <summary>Fills a weight set from a Hugging Face folder: all cores read, hash and pack, tensor by tensor.</summary>
internal static class ModelLoader
{
    /// <summary>Bytes read at once, where a matrix's rows are not longer.</summary>
    private const int FileChunk = 1024 * 1024;

    /// <summary>Every tensor of the checkpoint by name, as <see cref="RolloutEngine.Describe"/> lists it.</summary>
    /// <exception cref="InvalidModelException">Tensors are missing, have another shape or a type that is not served.</exception>
    public static IReadOnlyList<DescribedWeight> Load(
        Checkpoint checkpoint, LoadPlan plan, Backend backend, WeightSet weights, IProgress<double>? progress)
    {
        List<(LoadEntry Entry, CheckpointTensor Source)> work = Match(checkpoint, plan);
        long total = work.Sum(item => item.Source.Info.Bytes);
        long done = 0;
        DescribedWeight[] described = new DescribedWeight[work.Count];
        AllCores.ForEach([.. Enumerable.Range(0, work.Count).OrderByDescending(i => work[i].Source.Info.Bytes)], i =>
        {
            (LoadEntry entry, CheckpointTensor source) = work[i];
            DType type = source.Info.DType!.Value;
            XxHash128 hash = new();
            int chunkBytes = ChunkBytes(entry, type, backend);
            byte[] buffer = ArrayPool<byte>.Shared.Rent(chunkBytes);
            for (long at = 0; at < source.Info.Bytes; at += chunkBytes)
            {
                Span<byte> chunk = buffer.AsSpan(0, (int)Math.Min(chunkBytes, source.Info.Bytes - at));
                source.Read(at, chunk);
                hash.Append(chunk);
                entry.Write(backend, weights, at / type.Size(), chunk, type);
                progress?.Report((double)Interlocked.Add(ref done, chunk.Length) / total);
            }

            ArrayPool<byte>.Shared.Return(buffer);
            described[i] = new DescribedWeight(entry.Source, type, entry.Shape, hash.GetCurrentHash());
        });
        weights.HoldsAll(version: 0);
        return described;
    }

    /// <summary>Whole rows of a matrix, and as many as the device stores fastest where they are not too long for that.</summary>
    private static int ChunkBytes(LoadEntry entry, DType type, Backend backend)
    {
        if (entry.RowElements == 1) return FileChunk;
        int row = (int)entry.RowElements * type.Size();
        int unit = row * backend.WriteRows <= FileChunk ? row * backend.WriteRows : row;
        return Math.Max(1, FileChunk / unit) * unit;
    }

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

/// <summary>A tensor as it was last loaded or pushed.</summary>
/// <param name="Name">Hugging Face name.</param>
/// <param name="Type">Of the bytes that came; how they are stored is the backend's matter.</param>
/// <param name="Shape">Full shape.</param>
/// <param name="Digest">XxHash128 of the bytes that came, 16 bytes; empty once single elements were changed.</param>
public sealed record DescribedWeight(string Name, DType Type, IReadOnlyList<long> Shape, byte[] Digest);
