using System.Runtime.InteropServices;
using Microsoft.Win32.SafeHandles;
using Rollout.Kernels;
using Rollout.Native;
using Xunit;

namespace Rollout.Engine.Tests;

/// <summary>An engine and its expected weights as plain values, and random updates of both.</summary>
internal sealed class UpdateChain : IAsyncDisposable
{
    private const string Embedding = "model.embed_tokens.weight", Head = "lm_head.weight";
    private readonly PlainModel _model;
    private readonly Random _random;
    private readonly CpuBackend _backend = new(1);
    private readonly Dictionary<string, float[]> _values;
    private readonly Dictionary<string, PlainTensor> _sent; // whole tensors in the type last sent; empty where it is not known
    private bool _poisoned;
    private ulong _version;

    public UpdateChain(PlainModel model, int seed, EngineOptions options)
    {
        _model = model;
        _random = new Random(seed);
        Dictionary<string, PlainTensor> tensors = model.RandomTensors(_random);
        _values = tensors.ToDictionary(tensor => tensor.Key, tensor => PlainModel.Values(tensor.Value));
        _sent = tensors;
        using TemporaryFolder folder = new();
        model.Save(folder, tensors, _random);
        Engine = RolloutEngine.Load(folder.Path, _backend, options);
    }

    public RolloutEngine Engine { get; }

    public ValueTask DisposeAsync() => Engine.DisposeAsync();

    /// <summary>Makes one update and checks the result.</summary>
    public async Task NextAsync(CancellationToken cancellation)
    {
        bool partial = _random.Next(3) > 0, sparse = _random.Next(2) == 0;
        if (_poisoned && _random.Next(2) == 0) (partial, sparse) = (false, false);
        Payload payload = new(_model, _random, partial, sparse);
        UpdateManifest manifest = new()
        {
            Tensors = payload.Tensors,
            PayloadBytes = payload.Bytes.Length,
            BaseVersion = _version,
            NewVersion = _version + (ulong)_random.Next(1, 4),
            Partial = partial,
            Mode = _random.Next(2) == 0 ? UpdateMode.Staged : UpdateMode.InPlace,
            Policy = (UpdatePolicy)_random.Next(4),
        };
        bool whole = !partial && payload.Tensors.All(tensor => tensor.SparseCount is null);
        if (_poisoned && !whole)
        {
            Assert.Contains("only a full update", Assert.Throws<UpdateRejectedException>(() => Engine.BeginUpdate(manifest)).Message,
                StringComparison.Ordinal);
            Assert.Equal(EngineState.Poisoned, Engine.Status.State);
            return;
        }

        bool commits = _random.Next(3) > 0;
        long sent = 0;
        using (WeightUpdate update = Engine.BeginUpdate(manifest))
        {
            if (commits || _random.Next(6) > 0)
            {
                await update.OpenAsync(cancellation);
                sent = commits ? payload.Bytes.Length : _random.Next(5) switch
                {
                    0 => 0,
                    1 => payload.Bytes.Length,
                    _ => _random.Next(payload.Bytes.Length + 1),
                };
                Send(update, payload, sent, cancellation);
            }

            if (commits)
            {
                CommitResult result = await update.CommitAsync(_random.Next(4) == 0 ? default : payload.Digest, cancellation);
                Assert.Equal(payload.Digest, result.Digest);
                Assert.Equal(manifest.NewVersion, result.Version);
            }
            else if (_random.Next(2) == 0)
            {
                UpdateFailure expected = sent < payload.LastByte ? UpdateFailure.Protocol : UpdateFailure.Digest;
                Task wrong = update.CommitAsync(new byte[16], cancellation);
                Assert.Equal(expected, (await Assert.ThrowsAsync<UpdateFailedException>(() => wrong)).Failure);
            }
        }

        if (commits)
        {
            (_version, _poisoned) = (manifest.NewVersion, false);
            payload.Apply(_values, _sent, name => _model.Plan.Weights[_model.Plan[name].Pieces[0].Slot.Index].IsVector);
        }
        else
        {
            _poisoned |= manifest.Mode == UpdateMode.InPlace && sent > 0;
        }

        if (_poisoned) Assert.Equal((EngineState.Poisoned, _version), (Engine.Status.State, Engine.Version));
        else AssertServed();
    }

    public void AssertServed()
    {
        _model.AssertHolds(_values, WeightBytesTests.Served(Engine), _backend);
        (ulong version, IReadOnlyList<DescribedWeight> described) = Engine.Describe();
        Assert.Equal(Engine.Version, version);
        Dictionary<string, (DType, string)> found = described.ToDictionary(
            weight => weight.Name, weight => (weight.Type, Convert.ToHexString(weight.Digest)));
        Dictionary<string, (DType, string)> expected = _sent.ToDictionary(tensor => tensor.Key,
            tensor => (tensor.Value.Type, tensor.Value.Bytes.Length == 0 ? "" : Convert.ToHexString(tensor.Value.Digest())));
        if (_model.Spec.TiedHead && found.Remove(Head, out (DType, string) head)) Assert.Equal(expected[Embedding], head);
        Assert.Equal(expected.OrderBy(weight => weight.Key), found.OrderBy(weight => weight.Key));
    }

    /// <summary>Sends the first bytes by message, file and shared memory in turn, cut near borders of tensors and anywhere else.</summary>
    private void Send(WeightUpdate update, Payload payload, long until, CancellationToken cancellation)
    {
        using TemporaryFolder folder = new();
        using SafeFileHandle file = File.OpenHandle(folder.Write("payload", [.. new byte[100], .. payload.Bytes]));
        using SealedMemory memory = SealedMemory.TryCreate(payload.Bytes.Length + 77) ?? throw new NotSupportedException();
        using (FileStream stream = new(memory.Path, FileMode.Open, FileAccess.ReadWrite, FileShare.ReadWrite))
        {
            stream.Position = 77;
            stream.Write(payload.Bytes);
        }

        int pace = (1 << _random.Next(5, 21)) + 1;
        for (long at = 0; at < until;)
        {
            long end = at + _random.Next(pace);
            if (_random.Next(2) == 0)
            {
                long[] borders = [.. payload.Borders.Where(border => border >= at)];
                if (borders.Length > 0) end = borders[_random.Next(Math.Min(3, borders.Length))] + _random.Next(-1, 2);
            }

            end = Math.Clamp(end, at, until);
            switch (_random.Next(3))
            {
                case 0:
                    update.Write(at, payload.Bytes.AsSpan((int)at, (int)(end - at)));
                    break;
                case 1:
                    update.ReadFrom(file, 100 + at, at, end - at, cancellation);
                    break;
                default:
                    update.ReadFrom(memory, 77 + at, at, end - at, cancellation);
                    break;
            }

            at = end;
            Assert.Equal(at, update.Parts[0].ReceivedBytes);
        }
    }

    /// <summary>New values for some tensors, in any order, with gaps before, between and behind them.</summary>
    private sealed class Payload
    {
        private readonly List<(string Name, PlainTensor Values, uint[]? Indices, bool InSlices)> _changes = [];

        public Payload(PlainModel model, Random random, bool partial, bool sparse)
        {
            List<string> names = [.. model.Shapes.Keys.Where(_ => !partial || random.Next(3) == 0)];
            string[] order = [.. names];
            random.Shuffle(order);
            PlainTensor? embedding = null;
            bool head = model.Spec.TiedHead && order.Contains(Embedding) && random.Next(2) == 0;
            if (head) order = random.Next(2) == 0 ? [Head, .. order] : [.. order, Head];
            List<(ManifestTensor Tensor, byte[] Bytes)> entries = [];
            long[]? tiedCuts = null;
            foreach (string name in order)
            {
                bool tied = head && (name is Head or Embedding);
                string source = tied ? Embedding : name;
                int elements = model.Elements(source);
                uint[]? indices = sparse && !tied && random.Next(2) == 0 ? Indices(random, elements) : null;
                PlainTensor values = PlainTensor.Random(random, indices?.Length ?? elements);
                PlainTensor? equal = _changes.FirstOrDefault(change => change.Indices is null && change.Values.Elements == elements).Values;
                if (tied) values = embedding ??= values;
                else if (indices is null && equal is not null && random.Next(4) == 0) values = equal; // two tensors of the same content
                ManifestTensor whole = new(name, values.Type, model.Shapes[source], 0, indices?.Length);
                long[] cuts = indices is not null || random.Next(2) == 0 ? [] : Cuts(random, whole.Shape[0]);
                if (tied) cuts = tiedCuts ??= cuts;
                if (indices is not null) entries.Add((whole, [.. MemoryMarshal.AsBytes<uint>(indices), .. values.Bytes]));
                else if (cuts.Length == 0) entries.Add((whole, values.Bytes));
                else entries.AddRange(Slices(whole, values, cuts));
                if (!(tied && name == Head)) _changes.Add((name, values, indices, cuts.Length > 2));
            }

            (ManifestTensor Tensor, byte[] Bytes)[] inOrder = [.. entries];
            random.Shuffle(inOrder);
            MemoryStream bytes = new();
            List<byte[]> digests = [];
            foreach ((ManifestTensor tensor, byte[] sent) in inOrder)
            {
                for (int gap = random.Next(3) == 0 ? 0 : random.Next(300); gap > 0; gap--) bytes.WriteByte(0xAA);
                Tensors.Add(tensor with { Offset = bytes.Length });
                Borders.AddRange([bytes.Length, bytes.Length + 4L * (tensor.SparseCount ?? 0), bytes.Length + sent.Length]);
                bytes.Write(sent);
                digests.Add(TensorDigest.Of(sent));
                if (sent.Length > 0) LastByte = bytes.Length;
            }

            if (random.Next(2) == 0) bytes.Write(new byte[random.Next(300)]);
            Bytes = bytes.ToArray();
            Digest = WeightUpdate.Combine(digests);
        }

        public List<ManifestTensor> Tensors { get; } = [];

        public byte[] Bytes { get; }

        public byte[] Digest { get; }

        /// <summary>Where tensors begin and end, and where indices end.</summary>
        public List<long> Borders { get; } = [];

        /// <summary>The end of the last tensor; what follows is gap.</summary>
        public long LastByte { get; }

        public void Apply(Dictionary<string, float[]> values, Dictionary<string, PlainTensor> whole, Func<string, bool> isVector)
        {
            foreach ((string name, PlainTensor sent, uint[]? indices, bool inSlices) in _changes)
            {
                float[] all = indices is null ? new float[sent.Elements] : values[name];
                for (int i = 0; i < sent.Elements; i++) all[indices is null ? i : (int)indices[i]] = sent[i];
                values[name] = all;
                bool exact = sent.Type == DType.BFloat16 || (sent.Type == DType.Float32 && isVector(name));
                if (indices is null) whole[name] = exact || !inSlices ? sent : new PlainTensor(sent.Type, []);
                else if (!exact || whole[name].Type != sent.Type) whole[name] = new PlainTensor(sent.Type, []);
                else if (whole[name].Bytes.Length > 0) whole[name] = whole[name].With(indices, sent);
            }
        }

        /// <summary>Rows where slices begin and, at last, end.</summary>
        private static long[] Cuts(Random random, long rows)
        {
            int inner = random.Next(3) == 0 ? 0 : random.Next(1, 9);
            return [.. Enumerable.Range(0, inner).Select(_ => random.NextInt64(rows)).Append(0).Append(rows).Distinct().Order()];
        }

        private static IEnumerable<(ManifestTensor Tensor, byte[] Bytes)> Slices(ManifestTensor whole, PlainTensor values, long[] cuts)
        {
            int rowBytes = values.Bytes.Length / (int)whole.Shape[0];
            foreach ((long from, long to) in cuts.Zip(cuts.Skip(1)))
                yield return (whole with { FirstRow = from, Rows = to - from }, values.Bytes[((int)from * rowBytes)..((int)to * rowBytes)]);
        }

        /// <summary>None, one, all, or some of them; the first and the last now and then.</summary>
        private static uint[] Indices(Random random, int elements) => random.Next(6) switch
        {
            0 => [],
            1 => [(uint)random.Next(elements)],
            2 when elements < 5000 => [.. Enumerable.Range(0, elements).Select(i => (uint)i)],
            3 => [0, .. elements > 1 ? (uint[])[(uint)elements - 1] : []],
            _ => [.. Enumerable.Range(0, elements).Where(_ => random.Next(9) == 0).Select(i => (uint)i)],
        };
    }
}
