using Rollout.Kernels;
using Xunit;

namespace Rollout.Engine.Tests;

/// <summary>One tensor of a checkpoint whose rows belong to several weights, as those of mixtures of experts do.</summary>
public sealed class PackedTensorTests
{
    private const int Inputs = 7;

    [Theory]
    [InlineData(1)]
    [InlineData(2)]
    [InlineData(3)]
    [InlineData(4)]
    public void Every_row_lands_in_its_weight_however_the_bytes_come(int seed)
    {
        Random random = new(seed);
        int experts = random.Next(2, 6), rows = random.Next(2, 40);
        (LoadPlan plan, int[] slots, int[] firstRows) = Plan(experts, rows, random);
        using CpuBackend backend = new(1);
        using WeightSet weights = WeightSet.Allocate(backend, plan);
        PlainTensor whole = PlainTensor.Random(random, experts * rows * Inputs, DType.Float32);
        ManifestTensor sent = new("experts", DType.Float32, [experts, rows, Inputs], 0);
        IncomingTensor tensor = new(sent, plan["experts"], backend, weights);
        PayloadCursor cursor = new(tensor.Ranges, 0, 0);
        for (int at = 0; at < whole.Bytes.Length;)
        {
            int piece = Math.Min(whole.Bytes.Length - at, random.Next(1, 2 * rows * Inputs * sizeof(float)));
            cursor.Take(whole.Bytes.AsSpan(at, piece));
            at += piece;
        }

        Assert.Equal(whole.Digest(), tensor.Digest());
        float[] expected = PlainModel.Values(whole);
        AssertHold(expected);

        // Then single elements, the first and the last of every slice among them.
        uint[] indices = [.. Enumerable.Range(0, expected.Length)
            .Where(i => i % (rows * Inputs) == 0 || (i + 1) % (rows * Inputs) == 0 || random.Next(5) == 0).Select(i => (uint)i)];
        PlainTensor values = PlainTensor.Random(random, indices.Length, DType.Float32);
        IncomingTensor sparse = new(
            new ManifestTensor("experts", DType.Float32, [experts, rows, Inputs], 0, indices.Length), plan["experts"], backend, weights);
        byte[] bytes = [.. indices.SelectMany(BitConverter.GetBytes), .. values.Bytes];
        foreach (byte[] piece in bytes.Chunk(random.Next(1, bytes.Length))) sparse.Ranges[0].Take(piece);
        for (int i = 0; i < indices.Length; i++) expected[indices[i]] = values[i];
        AssertHold(expected);

        void AssertHold(float[] all)
        {
            float[] held = new float[rows * Inputs];
            for (int expert = 0; expert < experts; expert++)
            {
                backend.ReadWeight(weights[new WeightSlot(slots[expert])], (long)firstRows[expert] * Inputs, held);
                for (int i = 0; i < held.Length; i++)
                {
                    float value = PlainModel.Rounded(all[(expert * rows * Inputs) + i]);
                    if (!value.Equals(held[i])) Assert.Fail($"expert {expert}, element {i}: {held[i]}, sent was {value}");
                }
            }
        }
    }

    /// <summary>A file is read in chunks that end anywhere between two slices.</summary>
    [Fact]
    public void A_checkpoint_may_hold_it()
    {
        const int Experts = 3, Rows = 1500; // of 7 elements: chunks of a megabyte would end inside a slice
        const int Wide = 211;
        LoadPlan plan = new();
        WeightSlot[] slots = [.. Enumerable.Range(0, Experts).Select(i => plan.Weight($"expert.{i}", Rows, Wide))];
        plan.Load("experts", [Experts, Rows, Wide],
            [.. slots.Select((slot, i) => new LoadPiece((long)i * Rows * Wide, (long)Rows * Wide, slot, 0))]);
        PlainTensor whole = PlainTensor.Random(new Random(5), Experts * Rows * Wide, DType.BFloat16);
        using TemporaryFolder folder = new();
        TensorDeclaration declaration = new("experts", DType.BFloat16, [Experts, Rows, Wide]);
        SafetensorsWriter.Write(folder["model.safetensors"], [(declaration, whole.Bytes)]);
        using CpuBackend backend = new(1);
        using WeightSet weights = WeightSet.Allocate(backend, plan);
        using Checkpoint checkpoint = Checkpoint.Open(folder.Path);
        ModelLoader.Load(checkpoint, plan, backend, weights, progress: null);
        float[] held = new float[Rows * Wide];
        for (int expert = 0; expert < Experts; expert++)
        {
            backend.ReadWeight(weights[slots[expert]], 0, held);
            for (int i = 0; i < held.Length; i++)
                if (!held[i].Equals(whole[(expert * held.Length) + i])) Assert.Fail($"expert {expert}, element {i}: {held[i]}");
        }
    }

    /// <summary>Each expert's rows go to a place of their own: a weight alone, or with others in one.</summary>
    private static (LoadPlan Plan, int[] Slots, int[] FirstRows) Plan(int experts, int rows, Random random)
    {
        LoadPlan plan = new();
        int[] slots = new int[experts], firstRows = new int[experts], order = [.. Enumerable.Range(0, experts)];
        random.Shuffle(order);
        for (int at = 0; at < experts;)
        {
            int together = random.Next(1, experts - at + 1);
            WeightSlot slot = plan.Weight($"weight {at}", together * rows, Inputs);
            for (int i = 0; i < together; i++) (slots[order[at + i]], firstRows[order[at + i]]) = (slot.Index, i * rows);
            at += together;
        }

        long elements = rows * Inputs;
        plan.Load("experts", [experts, rows, Inputs],
            [.. Enumerable.Range(0, experts).Select(
                i => new LoadPiece(i * elements, elements, new WeightSlot(slots[i]), firstRows[i] * (long)Inputs))]);
        return (plan, slots, firstRows);
    }
}
