using Rollout.Kernels;
using Xunit;

namespace Rollout.Engine.Tests;

/// <summary>The engine's weights equal the checkpoint or the update, element for element, for any transport.</summary>
public sealed class WeightBytesTests
{
    private static readonly EngineOptions s_small = new() { MaxSequences = 1, MaxBatchTokens = 16, KvCacheBytes = 1 << 20 };

    private static CancellationToken Cancelled => TestContext.Current.CancellationToken;

    [Fact]
    public void Every_element_that_a_checkpoint_holds_is_loaded()
    {
        for (int seed = 0; seed < 40; seed++) Load(seed, PlainModel.Random(new Random(seed)));
    }

    [Theory] // more than is read at once: several whole tiles, and rows so long that a tile of them is too much
    [InlineData(DType.BFloat16, 16_411, 5)]
    [InlineData(DType.Float32, 16_411, 16_900)]
    public void Every_element_of_large_matrices_is_loaded(DType type, int vocabulary, int intermediate)
        => Load(seed: 1, PlainModel.Of("llama", 1, 2, 1, headDim: 8, hidden: 33, intermediate, vocabulary, tied: true), type);

    private static void Load(int seed, PlainModel model, DType? type = null)
    {
        Random random = new(seed);
        Dictionary<string, PlainTensor> tensors = model.RandomTensors(random, type);
        using TemporaryFolder folder = new();
        model.Save(folder, tensors, random);
        using Checkpoint checkpoint = Checkpoint.Open(folder.Path);
        using CpuBackend backend = new(1);
        using WeightSet weights = WeightSet.Allocate(backend, model.Plan);
        IEnumerable<DescribedWeight> described = ModelLoader.Load(checkpoint, model.Plan, backend, weights, progress: null)
            .Select(tensor => tensor.Description);
        model.AssertHolds(tensors.ToDictionary(tensor => tensor.Key, tensor => PlainModel.Values(tensor.Value)), weights, backend);
        Assert.Equal(tensors.Select(tensor => (tensor.Key, tensor.Value.Type, Convert.ToHexString(tensor.Value.Digest()))).Order(),
            described.Select(weight => (weight.Name, weight.Type, Convert.ToHexString(weight.Digest))).Order());
    }

    /// <summary>
    /// Chains of updates of every kind, in both modes, by every transport and cut anywhere, some of them abandoned or wrong. After each the
    /// engine has the last committed value of every element and the digest of every tensor that was sent whole.
    /// </summary>
    [Theory]
    [InlineData("llama", true, true, 1)] // tied
    [InlineData("llama", true, false, 2)]
    [InlineData("qwen2", false, false, 3)]
    [InlineData("qwen3", false, true, 4)]
    public async Task After_any_chain_of_updates_every_element_is_the_last_that_was_committed(string family, bool bias, bool tied, int seed)
    {
        PlainModel model = PlainModel.Of(
            family, 2, heads: 6, kvHeads: 2, headDim: 6, hidden: 35, intermediate: 37, vocabulary: 45, bias, tied);
        await using UpdateChain chain = new(model, seed, s_small);
        for (int i = 0; i < 100; i++) await chain.NextAsync(Cancelled);
    }

    [Fact] // larger than what one core takes at once
    public async Task After_updates_of_large_tensors_every_element_is_the_last_committed()
    {
        PlainModel model = PlainModel.Of(
            "llama", 1, heads: 2, kvHeads: 1, headDim: 8, hidden: 33, intermediate: 9_001, vocabulary: 8_300, tied: true);
        await using UpdateChain chain = new(model, seed: 5, s_small);
        for (int i = 0; i < 8; i++) await chain.NextAsync(Cancelled);
    }

    [Fact]
    public async Task A_partial_update_that_names_nothing_serves_what_was_served()
    {
        PlainModel model = PlainModel.Random(new Random(3));
        await using UpdateChain chain = new(model, seed: 6, s_small);
        foreach (UpdateMode mode in (UpdateMode[])[UpdateMode.Staged, UpdateMode.Staged, UpdateMode.InPlace])
        {
            using WeightUpdate update = chain.Engine.BeginUpdate(new UpdateManifest
            {
                Tensors = [],
                PayloadBytes = 0,
                BaseVersion = chain.Engine.Version,
                NewVersion = chain.Engine.Version + 5,
                Partial = true,
                Mode = mode,
            });
            await update.CommitAsync(default, Cancelled); // nothing was opened: there is nothing to send
            chain.AssertServed();
        }

        Assert.Equal(15ul, chain.Engine.Version);
    }

    [Fact]
    public void The_digest_of_an_update_is_that_of_its_tensors_digests_in_manifest_order()
    {
        byte[] one = PlainTensor.Random(new Random(1), 7).Digest(), other = PlainTensor.Random(new Random(2), 9).Digest();
        Assert.Equal(System.IO.Hashing.XxHash128.Hash([.. one, .. other]), WeightUpdate.Combine([one, other]));
        Assert.Equal(System.IO.Hashing.XxHash128.Hash([.. other, .. one]), WeightUpdate.Combine([other, one]));
    }

    /// <summary>The set in service, by an update in place that is given up before it has changed anything.</summary>
    internal static WeightSet Served(RolloutEngine engine)
    {
        using WeightUpdate look = engine.BeginUpdate(new UpdateManifest
        {
            Tensors = [],
            PayloadBytes = 0,
            BaseVersion = engine.Version,
            NewVersion = engine.Version + 1,
            Partial = true,
            Mode = UpdateMode.InPlace,
        });
        return look.Destination;
    }
}
