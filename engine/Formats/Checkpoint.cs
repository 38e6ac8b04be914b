using System.Text.Json;

namespace Rollout.Engine;

/// <summary>Where a checkpoint keeps a tensor.</summary>
public sealed record CheckpointTensor(SafetensorsFile File, TensorInfo Info)
{
    /// <inheritdoc cref="SafetensorsFile.Read"/>
    public void Read(long byteOffset, Span<byte> destination) => File.Read(Info, byteOffset, destination);
}

/// <summary>
/// The weights of a Hugging Face model folder: model.safetensors, or, when there is none, the shards that model.safetensors.index.json
/// names. Both are presented as one map from tensor name to file and offset.
/// </summary>
public sealed class Checkpoint : IDisposable
{
    private const string SingleFile = "model.safetensors";
    private const string IndexFile = "model.safetensors.index.json";

    private readonly List<SafetensorsFile> _files = [];
    private readonly Dictionary<string, CheckpointTensor> _tensors = [];

    private Checkpoint(string folder) => Folder = folder;

    public string Folder { get; }

    /// <summary>Tensors of all shards by name, also those that the index does not list.</summary>
    public IReadOnlyDictionary<string, CheckpointTensor> Tensors => _tensors;

    /// <summary>Opens all files of a model folder and checks headers and index.</summary>
    /// <exception cref="InvalidModelException">Files are missing, invalid or disagree; lists every problem of all files.</exception>
    public static Checkpoint Open(string folder)
    {
        Checkpoint checkpoint = new(folder);
        List<string> problems = new();
        try
        {
            if (File.Exists(Path.Combine(folder, SingleFile)))
                checkpoint.OpenFile(SingleFile, problems);
            else if (File.Exists(Path.Combine(folder, IndexFile)))
                checkpoint.OpenShards(problems);
            else
                problems.Add($"has neither {SingleFile} nor {IndexFile}");
            InvalidModelException.ThrowIfAny(folder, problems);
        }
        catch
        {
            checkpoint.Dispose();
            throw;
        }
        return checkpoint;
    }

    public void Dispose()
    {
        foreach (SafetensorsFile file in _files)
            file.Dispose();
    }

    private SafetensorsFile? OpenFile(string name, List<string> problems)
    {
        SafetensorsFile file;
        try
        {
            file = SafetensorsFile.Open(Path.Combine(Folder, name));
        }
        catch (InvalidModelException e)
        {
            problems.AddRange(e.Problems.Select(problem => $"{name}: {problem}"));
            return null;
        }
        _files.Add(file);
        foreach ((string tensor, TensorInfo info) in file.Tensors)
        {
            if (!_tensors.TryAdd(tensor, new CheckpointTensor(file, info)))
            {
                string other = Path.GetFileName(_tensors[tensor].File.Path);
                problems.Add($"tensor {InvalidModelException.Quote(tensor)} is in both {other} and {name}");
            }
        }
        return file;
    }

    private void OpenShards(List<string> problems)
    {
        string indexPath = Path.Combine(Folder, IndexFile);
        JsonElement index = JsonFile.ReadObject(indexPath);
        if (!index.TryGetProperty("weight_map", out JsonElement map) || map.ValueKind != JsonValueKind.Object)
            throw new InvalidModelException(indexPath, "weight_map must be an object of tensor names and file names");

        // A shard that was refused stays in the table as null: its tensors are not reported a second time as missing.
        Dictionary<string, SafetensorsFile?> shards = new();
        foreach (JsonProperty entry in map.EnumerateObject())
        {
            string tensor = InvalidModelException.Quote(entry.Name);
            if (entry.Value.ValueKind != JsonValueKind.String)
            {
                problems.Add($"{IndexFile}: weight_map {tensor} must be a file name");
                continue;
            }
            string shard = entry.Value.GetString()!;
            if (!shards.TryGetValue(shard, out SafetensorsFile? file))
            {
                if (IsPlainFileName(shard))
                    file = OpenFile(shard, problems);
                else
                    problems.Add($"{IndexFile}: {InvalidModelException.Quote(shard)} is not the name of a safetensors file in this folder");
                shards.Add(shard, file);
            }
            if (file is not null && !file.Tensors.ContainsKey(entry.Name))
                problems.Add($"{IndexFile}: tensor {tensor} is not in {shard}");
        }
        if (shards.Count == 0 && problems.Count == 0)
            problems.Add($"{IndexFile}: weight_map is empty");
    }

    /// <summary>The index is untrusted input: it must not refer to files outside its folder.</summary>
    private static bool IsPlainFileName(string name) =>
        name.EndsWith(".safetensors", StringComparison.Ordinal) && name.AsSpan().IndexOfAny("/\\:\0") < 0;
}
