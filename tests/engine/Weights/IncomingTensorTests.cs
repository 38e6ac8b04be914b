using System.Buffers.Binary;
using Rollout.Kernels;
using Rollout.Kernels.Cuda;
using Xunit;

namespace Rollout.Engine.Tests;

/// <summary>One tensor of an update, where positions no longer fit in 31 or 32 bits.</summary>
public sealed class IncomingTensorTests
{
    // q_proj alone has more than 2^31 elements, so k_proj and v_proj begin after that. The kernel allocates only touched pages.
    private static readonly PlainModel s_large = PlainModel.Of(
        "llama", 1, heads: 1 << 14, kvHeads: 1, headDim: 2048, hidden: 65, intermediate: 2, vocabulary: 3, tied: true);

    [Fact]
    public void Slices_of_a_weight_may_lie_beyond_2_to_the_31_elements()
    {
        const string Attention = "model.layers.0.self_attn.";
        using CpuBackend backend = new(1);
        using WeightSet weights = WeightSet.Allocate(backend, s_large.Plan);
        Weight qkv = weights[s_large.Plan["model.layers.0.self_attn.q_proj.weight"].Pieces[0].Slot];
        long queries = (1L << 25) * 65;

        PlainTensor whole = PlainTensor.Random(new Random(1), 2048 * 65, DType.Float32);
        IncomingTensor value = Incoming(new ManifestTensor(Attention + "v_proj.weight", DType.Float32, [2048, 65], 0), backend, weights);
        PayloadCursor cursor = new(value.Ranges, 0, 0);
        foreach (byte[] piece in whole.Bytes.Chunk(99_999)) cursor.Take(piece);
        Assert.Equal(whole.Digest(), value.Digest());
        float[] held = new float[2048 * 65];
        backend.ReadWeight(qkv, queries + 2048 * 65, held);
        for (int i = 0; i < held.Length; i++)
            if (!held[i].Equals(PlainModel.Rounded(whole[i]))) Assert.Fail($"element {i} is {held[i]}, sent was {whole[i]}");

        AssertSparse("q_proj.weight", [1 << 25, 65], 0, [0, int.MaxValue, 1u << 31, (uint)queries - 1]);
        AssertSparse("k_proj.weight", [2048, 65], queries, [0, 1, 2048 * 65 - 1]);

        void AssertSparse(string name, long[] shape, long first, uint[] indices)
        {
            ManifestTensor tensor = new(Attention + name, DType.Float32, shape, 0, indices.Length);
            IncomingTensor sparse = Incoming(tensor, backend, weights);
            byte[] bytes = new byte[indices.Length * 8];
            for (int i = 0; i < indices.Length; i++)
            {
                BinaryPrimitives.WriteUInt32LittleEndian(bytes.AsSpan(i * 4), indices[i]);
                BinaryPrimitives.WriteSingleLittleEndian(bytes.AsSpan((indices.Length + i) * 4), i + 1);
            }

            foreach (byte[] piece in bytes.Chunk(3)) sparse.Ranges[0].Take(piece);
            float[] one = new float[1];
            for (int i = 0; i < indices.Length; i++)
            {
                backend.ReadWeight(qkv, first + indices[i], one);
                Assert.Equal(i + 1, one[0]);
            }
        }
    }

    /// <summary>Also of tensors that share a weight with others, whose elements come next; and wherever a message ends.</summary>
    [Fact]
    public void Indices_ascend_and_stay_in_their_own_tensor()
    {
        PlainModel model = PlainModel.Of("qwen2", 1, heads: 2, kvHeads: 1, headDim: 4, hidden: 6, intermediate: 5, vocabulary: 7);
        using CpuBackend backend = new(1);
        using WeightSet weights = WeightSet.Allocate(backend, model.Plan);
        foreach ((string name, IReadOnlyList<long> shape) in model.Shapes)
        {
            uint elements = (uint)model.Elements(name);
            foreach (uint[] good in (uint[][])[[0], [elements - 1], [0, elements - 1], [elements - 2, elements - 1]]) Take(good);
            foreach (uint[] bad in (uint[][])[[elements], [0, elements], [1, 1], [0, 2, 1], [0, 0, 1], [elements - 1, 0], [uint.MaxValue]])
            {
                for (int cut = 1; cut <= bad.Length * 4; cut++)
                {
                    int at = cut;
                    Assert.Equal(UpdateFailure.Protocol, Assert.Throws<UpdateFailedException>(() => Take(bad, at)).Failure);
                }
            }

            void Take(uint[] indices, int cut = 1)
            {
                ManifestTensor tensor = new(name, DType.BFloat16, shape, 0, indices.Length);
                IncomingRange incoming = new IncomingTensor(tensor, model.Plan[name], backend, weights).Ranges[0];
                byte[] bytes = [.. indices.SelectMany(BitConverter.GetBytes), .. new byte[indices.Length * 2]];
                incoming.Take(bytes.AsSpan(0, cut));
                if (cut < indices.Length * 4) incoming.Take(bytes.AsSpan(cut)); // else no value has come, and the indices are wrong already
            }
        }
    }

    [Fact]
    public void A_tensor_may_have_more_than_2_to_the_32_bytes()
    {
        ScriptedBackend backend = new() { Writes = [] };
        using WeightSet weights = WeightSet.Allocate(backend, s_large.Plan);
        ManifestTensor tensor = new("model.layers.0.self_attn.q_proj.weight", DType.BFloat16, [1 << 25, 65], 0);
        IncomingTensor incoming = Incoming(tensor, backend, weights);
        PayloadCursor cursor = new(incoming.Ranges, 0, 0);
        byte[] piece = new byte[(64 << 20) + 1];
        long taken = 0;
        while (taken < tensor.Bytes)
        {
            int length = (int)Math.Min(piece.Length, tensor.Bytes - taken);
            cursor.Take(piece.AsSpan(0, length));
            taken += length;
            Assert.Equal(taken, incoming.Taken);
        }

        // Every row once, in order.
        long next = 0;
        foreach ((long element, int bytes) in backend.Writes)
        {
            Assert.Equal(next, element);
            next += bytes / 2;
        }

        Assert.Equal((1L << 25) * 65, next);
    }

    /// <summary>A large tensor is cut for all cores, at pieces of its digest and at what the device stores fastest.</summary>
    [Fact]
    public void Ranges_of_a_tensor_come_in_any_order_and_cuts()
    {
        Random random = new(3);
        using CpuBackend backend = new(1);
        foreach ((long rows, long inputs, DType type) in ((long, long, DType)[])[
            (9_001, 896, DType.BFloat16), (40_007, 100, DType.Float32), (203, 32_768, DType.BFloat16),
            (5_000_001, 1, DType.Float16)])
        {
            LoadPlan plan = new();
            WeightSlot slot = inputs == 1 ? plan.Vector("w", ("t", (int)rows)) : plan.Matrix("w", (int)inputs, ("t", (int)rows));
            using WeightSet weights = WeightSet.Allocate(backend, plan);
            PlainTensor whole = PlainTensor.Random(random, (int)(rows * inputs), type);
            IncomingTensor tensor = new(new ManifestTensor("t", type, plan["t"].Shape, 0), plan["t"], backend, weights);
            Assert.True(tensor.Ranges.Count > 1, $"{rows} rows");
            IncomingRange[] order = [.. tensor.Ranges];
            random.Shuffle(order);
            Parallel.ForEach(order, range =>
            {
                int from = (int)range.Start, cut = 1 + (from * 7 % 900_000);
                foreach (byte[] part in whole.Bytes[from..(int)(from + range.Bytes)].Chunk(cut)) range.Take(part);
            });
            Assert.Equal(whole.Bytes.Length, tensor.Taken);
            Assert.Equal(whole.Digest(), tensor.Digest());
            float[] held = new float[rows * inputs];
            backend.ReadWeight(weights[slot], 0, held);
            for (int i = 0; i < held.Length; i++)
            {
                float value = inputs == 1 ? whole[i] : PlainModel.Rounded(whole[i]);
                if (!value.Equals(held[i])) Assert.Fail($"{rows} rows, element {i} is {held[i]}, sent was {value}");
            }
        }
    }

    /// <summary>Parts that a device takes have places that follow each other, and digests at their pieces' own places.</summary>
    [Fact]
    public void A_device_takes_ranges_in_any_cuts_between_pieces()
    {
        const int Rows = 9_001, Inputs = 896, Piece = TensorDigest.PieceBytes;
        Random random = new(5);
        using CpuBackend backend = new(1);
        LoadPlan plan = new();
        WeightSlot slot = plan.Matrix("w", Inputs, ("other", 7), ("t", Rows));
        using WeightSet weights = WeightSet.Allocate(backend, plan);
        PlainTensor whole = PlainTensor.Random(random, Rows * Inputs, DType.BFloat16);
        byte[] digests = [.. whole.Bytes.Chunk(Piece).SelectMany(piece => System.IO.Hashing.XxHash128.Hash(piece))];
        IncomingTensor tensor = new(new ManifestTensor("t", DType.BFloat16, plan["t"].Shape, 0), plan["t"], backend, weights);
        Assert.True(tensor.Ranges.Count > 1);
        long next = 0;
        foreach (IncomingRange range in tensor.Ranges)
        {
            while (range.Taken < range.Bytes)
            {
                int from = (int)(range.Start + range.Taken);
                int count = (int)Math.Min(range.Bytes - range.Taken, random.Next(1, 9) * (long)Piece);
                WeightRange place = Assert.Single(range.OnDevice(null!, from, range.Taken, count).Stores);
                Assert.Equal(new WeightRange(0, count / 2, weights[slot], (7 * Inputs) + next), place);
                next += place.Count;
                range.TakeOnDevice(digests.AsSpan(from / Piece * 16, TensorDigest.Pieces(count) * 16), count, ticks: 1);
                if (range.Taken == range.Bytes) continue;
                string reason = Assert.Throws<UpdateFailedException>(() => range.Take(new byte[2])).Message;
                Assert.Equal("the first bytes of tensor 't' came in device memory: send it whole in one way", reason);
            }
        }

        Assert.Equal((whole.Bytes.Length, whole.Bytes.Length), (tensor.Taken, tensor.TakenOnDevice));
        Assert.Equal(whole.Digest(), tensor.Digest());
    }

    private static IncomingTensor Incoming(ManifestTensor tensor, Backend backend, WeightSet weights)
        => new(tensor, s_large.Plan[tensor.Name], backend, weights);
}
