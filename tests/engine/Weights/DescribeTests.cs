using System.Runtime.InteropServices;
using CsCheck;
using Rollout.Kernels;
using Xunit;

namespace Rollout.Engine.Tests;

/// <summary>Digests after sparse updates: those of the whole tensors, whatever happens while they are hashed.</summary>
public sealed class DescribeTests
{
    private const string Embedding = "model.embed_tokens.weight", Head = "lm_head.weight", Key = "model.layers.0.self_attn.k_proj.weight";

    private static readonly EngineOptions s_small = new() { MaxSequences = 1, MaxBatchTokens = 16, KvCacheBytes = 1 << 20 };

    // Of several pieces; rows cross their borders, and q, k and v are one weight.
    private static readonly PlainModel s_model = PlainModel.Of(
        "qwen2", 1, heads: 4, kvHeads: 2, headDim: 300, hidden: 133, intermediate: 1_001, vocabulary: 2_300, bias: true, tied: true);

    private static CancellationToken Cancelled => TestContext.Current.CancellationToken;

    [Fact]
    public async Task After_sparse_updates_the_digests_are_those_of_the_whole_tensors()
    {
        await Gen.Int[0, 1 << 30].SampleAsync(async seed =>
        {
            Random random = new(seed);
            await using Served served = new(random, new CpuBackend(1));
            for (int i = 0; i < 6; i++)
            {
                await served.UpdateAsync(random, [.. s_model.Shapes.Keys.Where(_ => random.Next(2) == 0)], mayBeEmpty: true);
                if (random.Next(2) == 0) served.AssertDescribed();
            }

            served.AssertDescribed();
        }, iter: 8, threads: 1);
    }

    [Fact]
    public async Task A_commit_while_pieces_are_hashed_is_described_as_well()
    {
        Random random = new(1);
        Hooked backend = new();
        await using Served served = new(random, backend);
        foreach (UpdateMode mode in (UpdateMode[])[UpdateMode.Staged, UpdateMode.InPlace, UpdateMode.Staged])
        {
            await served.UpdateAsync(random, [Embedding, Key]);
            backend.OnRead = () => served.UpdateAsync(random, [Embedding, Key], mode).GetAwaiter().GetResult();
            served.AssertDescribed();
            Assert.Null(backend.OnRead);
        }

        Assert.Equal(6ul, served.Engine.Version);
    }

    [Fact]
    public async Task Where_commits_keep_coming_the_digest_is_unknown_until_they_end()
    {
        Random random = new(2);
        Hooked backend = new();
        await using Served served = new(random, backend);
        await served.UpdateAsync(random, [Embedding]);
        Action again = () => { };
        again = () =>
        {
            served.UpdateAsync(random, [Embedding]).GetAwaiter().GetResult();
            backend.OnRead = again;
        };
        backend.OnRead = again;
        Assert.Empty(served.Digest(Embedding));
        Assert.NotEmpty(served.Digest(Key));
        backend.OnRead = null;
        served.AssertDescribed();
    }

    [Fact]
    public async Task While_an_update_in_place_writes_the_digest_is_unknown()
    {
        Random random = new(3);
        Hooked backend = new();
        await using Served served = new(random, backend);
        await served.UpdateAsync(random, [Embedding]);
        Served.Sparse sparse = served.Next(random, [Embedding, Key], UpdateMode.InPlace);
        WeightUpdate? update = null;
        backend.OnRead = () =>
        {
            update = served.Engine.OpenUpdateAsync(sparse.Manifest).GetAwaiter().GetResult();
            update.Write(0, sparse.Bytes);
        };
        Assert.Empty(served.Digest(Embedding));
        Assert.Empty(served.Digest(Embedding)); // nothing is read any more
        await update!.CommitAsync(default, Cancelled);
        served.Apply(sparse);
        served.AssertDescribed();
    }

    [Fact]
    public async Task Weights_that_go_to_sleep_are_not_read_any_more()
    {
        Random random = new(4);
        Hooked backend = new();
        await using Served served = new(random, backend);
        await served.UpdateAsync(random, [Embedding]);
        Task<IReadOnlyList<FreedMemory>>? sleeping = null;
        backend.OnRead = () =>
        {
            sleeping = served.Engine.SleepAsync(MemoryTags.Weights);
            Assert.False(sleeping.Wait(200, Cancelled), "the memory was freed while it is read");
        };
        Assert.Empty(served.Digest(Embedding));
        await sleeping!;
        Assert.Empty(served.Digest(Embedding));
        await served.Engine.WakeUpAsync(MemoryTags.Weights);
        Assert.Empty(served.Digest(Embedding)); // what was there is lost
    }

    /// <summary>Calls back once when weights are read.</summary>
    private sealed class Hooked() : DelegatingBackend(new CpuBackend(1))
    {
        public Action? OnRead { get; set; }

        protected override void ReadWeightCore(Weight source, long element, Span<float> destination)
        {
            if (OnRead is { } hook)
            {
                OnRead = null;
                hook();
            }

            base.ReadWeightCore(source, element, destination);
        }
    }

    /// <summary>An engine, and the tensors that it should serve.</summary>
    private sealed class Served : IAsyncDisposable
    {
        private readonly Dictionary<string, PlainTensor> _tensors;

        public Served(Random random, Backend backend)
        {
            _tensors = s_model.Shapes.ToDictionary(tensor => tensor.Key, tensor => PlainTensor.Random(
                random, s_model.Elements(tensor.Key), tensor.Value.Count == 1 && random.Next(2) == 0 ? DType.Float32 : DType.BFloat16));
            using TemporaryFolder folder = new();
            s_model.Save(folder, _tensors, random);
            Engine = RolloutEngine.Load(folder.Path, backend, s_small);
        }

        public RolloutEngine Engine { get; }

        public ValueTask DisposeAsync() => Engine.DisposeAsync();

        public byte[] Digest(string tensor) => Engine.Describe().Weights.Single(weight => weight.Name == tensor).Digest;

        public async Task UpdateAsync(Random random, string[] names, UpdateMode? mode = null, bool mayBeEmpty = false)
        {
            Sparse sparse = Next(random, names, mode ?? (random.Next(2) == 0 ? UpdateMode.Staged : UpdateMode.InPlace), mayBeEmpty);
            using WeightUpdate update = await Engine.OpenUpdateAsync(sparse.Manifest);
            update.Write(0, sparse.Bytes);
            await update.CommitAsync(default, Cancelled);
            Apply(sparse);
        }

        /// <summary>Some elements of the tensors, in the type that these were sent in: none, one, a range or any.</summary>
        public Sparse Next(Random random, string[] names, UpdateMode mode, bool mayBeEmpty = false)
        {
            MemoryStream bytes = new();
            List<ManifestTensor> manifest = [];
            List<(string, uint[], PlainTensor)> changes = [];
            foreach (string name in names)
            {
                PlainTensor old = _tensors[name];
                int first = random.Next(old.Elements), end = random.Next(first, old.Elements) + 1;
                int step = random.Next(1, 1 + (old.Elements / 3));
                IEnumerable<int> some = Enumerable.Range(first, end - first).Where(i => (i - first) % step == 0);
                uint[] indices = mayBeEmpty && random.Next(4) == 0 ? [] : [.. some.Select(i => (uint)i)];
                PlainTensor values = PlainTensor.Random(random, indices.Length, old.Type);
                manifest.Add(new ManifestTensor(name, old.Type, s_model.Shapes[name], bytes.Length, indices.Length));
                bytes.Write(MemoryMarshal.AsBytes<uint>(indices));
                bytes.Write(values.Bytes);
                changes.Add((name, indices, values));
            }

            return new Sparse(new UpdateManifest
            {
                Tensors = manifest,
                PayloadBytes = bytes.Length,
                BaseVersion = Engine.Version,
                NewVersion = Engine.Version + 1,
                Partial = true,
                Mode = mode,
            }, bytes.ToArray(), changes);
        }

        public void Apply(Sparse sparse)
        {
            foreach ((string name, uint[] indices, PlainTensor values) in sparse.Changes)
                _tensors[name] = _tensors[name].With(indices, values);
        }

        public void AssertDescribed()
        {
            (ulong version, IReadOnlyList<DescribedWeight> weights) = Engine.Describe();
            Assert.Equal(Engine.Version, version);
            Assert.Equal(
                _tensors.Select(tensor => (tensor.Key, Convert.ToHexString(tensor.Value.Digest()))).Order(),
                weights.Where(weight => weight.Name != Head).Select(weight => (weight.Name, Convert.ToHexString(weight.Digest))).Order());
            if (weights.SingleOrDefault(weight => weight.Name == Head) is { } head) Assert.Equal(_tensors[Embedding].Digest(), head.Digest);
        }

        public sealed record Sparse(UpdateManifest Manifest, byte[] Bytes, List<(string Name, uint[] Indices, PlainTensor Values)> Changes);
    }
}
