using System.Globalization;
using System.IO.Hashing;
using System.Runtime.InteropServices;
using Google.Protobuf;
using Rollout.Engine;
using Rollout.Kernels;
using Rollout.Server.Commands;
using Rollout.V1;
using ManifestTensor = Rollout.V1.ManifestTensor;
using SampleChunk = Rollout.V1.SampleChunk;

namespace Rollout.Server.Tests;

/// <summary>The weights of a server: two parts of the model, each unchanged or changed. That makes four models.</summary>
internal readonly record struct Content(bool First, bool Second)
{
    public static Content Random(Random random) => new(random.Next(2) == 1, random.Next(2) == 1);
}

/// <summary>What an update sends.</summary>
internal enum Scope
{
    Full,

    /// <summary>A partial update of the tensors of one part.</summary>
    First,
    Second,

    /// <summary>Of the second part, the elements in which its two values differ.</summary>
    Sparse,
}

/// <summary>
/// Four variants of a golden model and, for each, the tokens and log-probabilities of an engine that has loaded it from a folder, to the
/// bit, so that one tensor of another variant is detected.
/// </summary>
internal sealed class Variants : IDisposable
{
    private const string Model = "qwen3";
    private const int Step = 5; // every fifth element of the second part differs

    private static readonly Lazy<Task<Variants>> s_shared = new(CreateAsync);

    private readonly TemporaryFolder _folder = new();
    private readonly List<(string Name, long[] Shape, byte[] Bytes)> _tensors = [];
    private readonly Dictionary<Content, string> _expected = [];

    /// <summary>The expected <see cref="Bits"/>.</summary>
    public string this[Content content] => _expected[content];

    /// <summary>The request for every variant.</summary>
    public static GenerateRequest Probe() => Calls.Greedy([5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21], 8);

    public static Task<Variants> SharedAsync() => s_shared.Value;

    /// <summary>A folder that can be loaded or pushed from.</summary>
    public string Folder(Content content) => _folder[Name(content)];

    /// <summary>The tokens and log-probabilities of a sample as a string.</summary>
    public static string Bits(SampleChunk sample) => string.Join(' ', sample.Ids.Zip(sample.Logprobs,
        (id, logprob) => $"{id}:{BitConverter.SingleToInt32Bits(logprob).ToString("x", CultureInfo.InvariantCulture)}"));

    /// <summary>What an update to a variant must send.</summary>
    public Sending Send(Scope scope, Content target)
    {
        Sending sending = new(scope);
        foreach ((string name, long[] shape, byte[] _) in _tensors)
        {
            bool second = IsSecond(name);
            if (scope == Scope.Full || second == (scope != Scope.First))
                sending.Add(name, shape, Values(name, target), scope == Scope.Sparse ? Step : null);
        }

        return sending;
    }

    /// <summary>The same as sources for the client library.</summary>
    public List<Client.TensorSource> Sources(Content target, Action? copying = null) => [.. _tensors.Select(tensor =>
    {
        byte[] values = Values(tensor.Name, target);
        return new Client.TensorSource(tensor.Name, Client.TensorDType.BF16, tensor.Shape, (offset, destination) =>
        {
            copying?.Invoke();
            values.AsSpan((int)offset, destination.Length).CopyTo(destination);
        });
    })];

    public void Dispose() => _folder.Dispose();

    private static string Name(Content content) => $"{(content.First ? 1 : 0)}{(content.Second ? 1 : 0)}";

    private static bool IsSecond(string name) => name.Contains("layers.1.mlp", StringComparison.Ordinal);

    private static async Task<Variants> CreateAsync()
    {
        Variants variants = new();
        AppDomain.CurrentDomain.ProcessExit += (_, _) => variants.Dispose();
        using (SafetensorsFile file = SafetensorsFile.Open(Path.Combine(Golden.Folder(Model), "model.safetensors")))
        {
            foreach (TensorInfo info in file.Tensors.Values.OrderBy(tensor => tensor.Offset))
            {
                byte[] bytes = new byte[info.Bytes];
                file.Read(info, 0, bytes);
                variants._tensors.Add((info.Name, [.. info.Shape], bytes));
            }
        }

        foreach (Content content in (Content[])[new(false, false), new(false, true), new(true, false), new(true, true)])
        {
            string folder = Directory.CreateDirectory(variants.Folder(content)).FullName;
            File.Copy(Path.Combine(Golden.Folder(Model), "config.json"), Path.Combine(folder, "config.json"));
            variants.Send(Scope.Full, content).WriteFile(Path.Combine(folder, "model.safetensors"));
            EngineOptions options = new() { KvCacheBytes = 1 << 20 };
            await using LocalRollouts fresh = new(RolloutEngine.Load(folder, new CpuBackend(1), options));
            SampleChunk sample = Assert.Single(Calls.Join(await fresh.GenerateAsync(Probe(), default).ToListAsync()));
            variants._expected.Add(content, Bits(sample));
        }

        Assert.Equal(4, variants._expected.Values.Distinct().Count());
        return variants;
    }

    private byte[] Values(string name, Content content)
    {
        byte[] bytes = (byte[])_tensors.Single(tensor => tensor.Name == name).Bytes.Clone();
        Span<ushort> values = MemoryMarshal.Cast<byte, ushort>(bytes.AsSpan());
        if (!IsSecond(name) && content.First) values.Reverse();
        if (IsSecond(name) && content.Second)
            for (int i = 0; i < values.Length; i += Step) values[i] ^= 0x8001;
        return bytes;
    }
}

/// <summary>The payload of one update and its manifest, without gaps, so that it can also be a file's data.</summary>
internal sealed class Sending(Scope scope)
{
    private readonly List<(TensorDeclaration Tensor, byte[] Bytes)> _tensors = [];
    private readonly List<ManifestTensor> _manifest = [];
    private readonly XxHash128 _digest = new();
    private readonly MemoryStream _payload = new();

    public byte[] Bytes => _payload.ToArray();

    public byte[] Digest => _digest.GetCurrentHash();

    public void Add(string name, IReadOnlyList<long> shape, byte[] values, int? every)
    {
        ManifestTensor entry = new() { Name = name, Dtype = TensorDType.Bf16, Offset = (ulong)_payload.Length };
        entry.Shape.Add(shape.Select(dimension => (ulong)dimension));
        byte[] sent = values;
        if (every is { } step)
        {
            uint[] indices = [.. Enumerable.Range(0, values.Length / 2).Where(i => i % step == 0).Select(i => (uint)i)];
            sent = [.. MemoryMarshal.AsBytes<uint>(indices), .. indices.SelectMany(i => values.AsSpan((int)i * 2, 2).ToArray())];
            entry.SparseCount = (ulong)indices.Length;
        }

        _manifest.Add(entry);
        _tensors.Add((new TensorDeclaration(name, DType.BFloat16, shape), values));
        _payload.Write(sent);
        _digest.Append(TensorDigest.Of(sent));
    }

    public BeginUpdate Begin(ulong from, ulong to, string owner = "trainer") => new()
    {
        Manifest = { _manifest },
        PayloadBytes = (ulong)_payload.Length,
        BaseVersion = from,
        NewVersion = to,
        Partial = scope != Scope.Full,
        Owner = owner,
        DeadlineMilliseconds = 20_000,
    };

    public UpdateRequest Commit() => new() { Commit = new Commit { Digest = ByteString.CopyFrom(Digest) } };

    /// <summary>Whole tensors only.</summary>
    public void WriteFile(string path) => SafetensorsWriter.Write(path, _tensors);
}
