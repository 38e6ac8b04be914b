using CsCheck;
using Rollout.Kernels;
using Xunit;

namespace Rollout.Engine.Tests;

/// <summary>Which manifests the preflight accepts: exactly those that match the model, the version in service and the payload.</summary>
public sealed class UpdatePreflightTests
{
    private static readonly PlainModel s_model = PlainModel.Of(
        "qwen2", 1, heads: 2, kvHeads: 1, headDim: 4, hidden: 6, intermediate: 5, vocabulary: 7, tied: true);

    public enum Kind
    {
        Full,
        FullButOneSparse,
        Partial,
        PartialSparse,
        PartialOfAll,
    }

    public static TheoryData<Kind, UpdateMode, UpdatePolicy> Kinds
    {
        get
        {
            TheoryData<Kind, UpdateMode, UpdatePolicy> data = [];
            foreach (Kind kind in Enum.GetValues<Kind>())
            {
                foreach (UpdateMode mode in Enum.GetValues<UpdateMode>())
                    foreach (UpdatePolicy policy in Enum.GetValues<UpdatePolicy>()) data.Add(kind, mode, policy);
            }

            return data;
        }
    }

    [Theory, MemberData(nameof(Kinds))]
    public void While_poisoned_only_every_tensor_whole_is_accepted(Kind kind, UpdateMode mode, UpdatePolicy policy)
    {
        UpdateManifest manifest = Manifest(kind) with { Mode = mode, Policy = policy };
        Assert.Empty(Check(manifest, poison: null));
        if (kind == Kind.Full) Assert.Empty(Check(manifest, poison: "it broke"));
        else Assert.Contains("it broke", Assert.Single(Check(manifest, poison: "it broke")).Message, StringComparison.Ordinal);
    }

    [Fact]
    public void The_base_is_the_version_in_service_and_the_new_version_is_greater()
    {
        Gen<ulong> near = Gen.OneOf(
            Gen.ULong[0, 5], Gen.ULong[ulong.MaxValue - 3, ulong.MaxValue], Gen.Const(1ul << 31), Gen.Const((1ul << 32) + 1));
        Gen.Select(near, near, near).Sample((served, from, to) =>
        {
            IReadOnlyList<Problem> problems = Check(Manifest(Kind.Full) with { BaseVersion = from, NewVersion = to }, served: served);
            List<string> expected = [];
            if (from != served) expected.Add(nameof(UpdateManifest.BaseVersion));
            if (to <= served) expected.Add(nameof(UpdateManifest.NewVersion));
            Assert.Equal(expected, problems.Select(problem => problem.Field));
        }, iter: 500);
    }

    [Fact]
    public void Tensors_may_touch_and_may_not_overlap_go_back_or_end_behind_the_payload()
        => Gen.Select(Gen.Int[0, 1 << 30], Gen.Int[-9, 9], Gen.Int[-3, 9]).Sample((seed, shift, more) =>
        {
            Random random = new(seed);
            List<ManifestTensor> tensors = [];
            long end = 0;
            foreach (ManifestTensor tensor in Manifest(Kind.Partial).Tensors)
            {
                long offset = end + (random.Next(2) == 0 ? 0 : random.Next(9));
                tensors.Add(tensor with { Offset = offset, SparseCount = random.Next(3) == 0 ? 0 : null });
                end = offset + tensors[^1].Bytes;
            }

            int moved = random.Next(tensors.Count);
            tensors[moved] = tensors[moved] with { Offset = tensors[moved].Offset + shift };
            bool fits = tensors[0].Offset >= 0 && tensors[^1].Offset + tensors[^1].Bytes <= end + more;
            for (int i = 1; i < tensors.Count; i++) fits &= tensors[i].Offset >= tensors[i - 1].Offset + tensors[i - 1].Bytes;
            for (int i = 0; i < tensors.Count; i++) fits &= tensors[i].Offset + tensors[i].Bytes <= end + more;
            UpdateManifest manifest = Manifest(Kind.Partial) with { Tensors = tensors, PayloadBytes = end + more };
            Assert.Equal(fits, Check(manifest).Count == 0);
        }, iter: 3000);

    [Fact]
    public void A_payload_may_have_a_page_of_gap_for_every_tensor_and_one_more()
    {
        UpdateManifest manifest = Manifest(Kind.Full);
        long most = manifest.PayloadBytes + (manifest.Tensors.Count + 1) * 4096;
        Assert.Empty(Check(manifest with { PayloadBytes = most }));
        Assert.Equal(nameof(UpdateManifest.PayloadBytes), Assert.Single(Check(manifest with { PayloadBytes = most + 1 })).Field);
    }

    [Fact]
    public void Every_tensor_of_the_model_is_needed_in_its_own_shape()
    {
        foreach (ManifestTensor tensor in Manifest(Kind.Full).Tensors)
        {
            UpdateManifest full = Manifest(Kind.Full);
            Problem missing = Assert.Single(Check(full with { Tensors = [.. full.Tensors.Where(other => other != tensor)] }));
            Assert.Contains(tensor.Name, missing.Field, StringComparison.Ordinal);
            Assert.Equal("missing", missing.Message);
            foreach (long[] shape in (long[][])[
                [.. tensor.Shape, 1], [1, .. tensor.Shape], [tensor.Elements + 1], [.. tensor.Shape.Select(length => length + 1)]])
            {
                foreach (long? count in (long?[])[null, 0, 1])
                {
                    ManifestTensor wrong = tensor with { Shape = shape, Offset = 0, SparseCount = count };
                    Problem problem = Assert.Single(Check(Manifest(Kind.Partial) with { Tensors = [wrong] }));
                    Assert.Contains("shape", problem.Message, StringComparison.Ordinal);
                }
            }
        }
    }

    [Theory]
    [InlineData(-1, false)]
    [InlineData(0, true)]
    [InlineData(1, true)]
    [InlineData(42, true)] // all
    [InlineData(43, false)]
    [InlineData(1L << 32, false)]
    public void A_sparse_tensor_brings_from_none_to_all_elements(long count, bool accepted)
    {
        ManifestTensor tensor = new("model.embed_tokens.weight", DType.BFloat16, [7, 6], 0, count);
        UpdateManifest manifest = Manifest(Kind.Partial) with { Tensors = [tensor], PayloadBytes = Math.Max(0, tensor.Bytes) };
        Assert.Equal(accepted, Check(manifest).Count == 0);
    }

    [Fact]
    public void Stored_as_int8_vectors_may_be_sparse_and_matrices_may_not()
    {
        foreach (ManifestTensor tensor in Manifest(Kind.Full).Tensors)
        {
            UpdateManifest manifest = Manifest(Kind.Partial) with { Tensors = [tensor with { Offset = 0, SparseCount = 1 }] };
            Assert.Equal(tensor.Shape.Count == 1, Check(manifest, format: WeightFormat.Int8).Count == 0);
            Assert.Empty(Check(manifest, format: WeightFormat.BFloat16Fast));
        }
    }

    [Theory]
    [InlineData(128, true)] // 2^31 elements
    [InlineData(254, true)]
    [InlineData(258, false)] // more than 2^32
    public void A_sparse_index_reaches_every_element_below_2_to_the_32(int hidden, bool accepted)
    {
        PlainModel large = PlainModel.Of("llama", 1, heads: 1, kvHeads: 1, headDim: 2, hidden, intermediate: 2, vocabulary: 1 << 24);
        ManifestTensor tensor = new("lm_head.weight", DType.Float32, [1 << 24, hidden], 0, SparseCount: 1L << 29);
        UpdateManifest manifest = Manifest(Kind.Partial) with { Tensors = [tensor], PayloadBytes = tensor.Bytes };
        Assert.Equal((1L << 24) * hidden, tensor.Elements);
        Assert.Equal(1L << 32, tensor.Bytes);
        Assert.Equal(accepted, UpdatePreflight.Check(manifest, large.Plan, WeightFormat.BFloat16, 3, null).Count == 0);
    }

    [Fact]
    public void A_tied_head_comes_with_its_embedding_whole_or_not_at_all()
    {
        ManifestTensor embedding = new("model.embed_tokens.weight", DType.BFloat16, [7, 6], 0);
        ManifestTensor head = embedding with { Name = "lm_head.weight" };
        Assert.Empty(Of(embedding));
        Assert.Empty(Of(embedding, head with { Offset = 84 }));
        Assert.Empty(Of(head, embedding with { Offset = 84 }));
        Assert.Single(Of(head));
        Assert.Single(Of(embedding, head with { Offset = 84, SparseCount = 1 }));

        IReadOnlyList<Problem> Of(params ManifestTensor[] tensors)
            => Check(Manifest(Kind.Partial) with { Tensors = tensors, PayloadBytes = 168 });
    }

    /// <summary>Slices anywhere in the manifest are accepted exactly where every row of their tensor is in one of them.</summary>
    [Fact]
    public void Slices_are_accepted_where_every_row_is_sent_once()
        => Gen.Select(Gen.Int[0, 1 << 30], Gen.Bool).Sample((seed, partial) =>
        {
            Random random = new(seed);
            List<ManifestTensor> slices = [];
            HashSet<string> wrong = [];
            foreach (ManifestTensor whole in Manifest(partial ? Kind.Partial : Kind.Full).Tensors)
            {
                int[] times = new int[whole.Shape[0]];
                bool inside = true;
                foreach ((long first, long rows) in Cut(random, whole.Shape[0]))
                {
                    slices.Add(whole with { FirstRow = first, Rows = rows });
                    inside &= first >= 0 && rows > 0 && rows <= times.Length && first <= times.Length - rows;
                    if (!inside) continue;
                    for (long row = first; row < first + rows; row++) times[row]++;
                }

                if (!inside || times.Any(count => count != 1)) wrong.Add(whole.Name);
            }

            ManifestTensor[] order = [.. slices];
            random.Shuffle(order);
            long end = 0;
            for (int i = 0; i < order.Length; i++)
            {
                order[i] = order[i] with { Offset = end };
                if (order[i].Bytes is > 0 and < 1 << 20) end += order[i].Bytes;
            }

            UpdateManifest manifest = Manifest(partial ? Kind.Partial : Kind.Full) with { Tensors = order, PayloadBytes = end };
            Assert.Equal(wrong.Order(), Check(manifest).Select(problem => problem.Field.Split('\'')[1]).Distinct().Order());
        }, iter: 2000);

    [Theory]
    [InlineData("rows 2 to 3 are in no slice", 0, 2, 4, 3)]
    [InlineData("rows 0 to 0 are in no slice", 1, 6)]
    [InlineData("rows 6 to 6 are in no slice", 0, 4, 4, 2)]
    [InlineData("rows 2 to 3 are in two slices", 0, 4, 2, 5)]
    [InlineData("rows 1 to 2 are in two slices", 0, 7, 1, 2)]
    [InlineData("5 rows from row 3 on cannot be sent: it has 7", 0, 3, 3, 5)]
    public void A_problem_of_slices_names_the_rows(string message, params int[] slices)
    {
        ManifestTensor embedding = new("model.embed_tokens.weight", DType.BFloat16, [7, 6], 0);
        long end = 0;
        List<ManifestTensor> tensors = [];
        foreach (int[] slice in slices.Chunk(2))
        {
            tensors.Add(embedding with { FirstRow = slice[0], Rows = slice[1], Offset = end });
            end += tensors[^1].Bytes;
        }

        Problem problem = Assert.Single(Check(Manifest(Kind.Partial) with { Tensors = tensors, PayloadBytes = end }));
        Assert.Equal(("Tensors['model.embed_tokens.weight']", message), (problem.Field, problem.Message));
    }

    [Fact]
    public void What_cannot_be_a_slice_is_refused()
    {
        ManifestTensor embedding = new("model.embed_tokens.weight", DType.BFloat16, [7, 6], 0);
        ManifestTensor first = embedding with { Rows = 3 }, last = embedding with { FirstRow = 3, Rows = 4, Offset = 36 };
        Assert.Empty(Of(first, last));
        Assert.Equal("first row 3, and no number of rows", Assert.Single(Of(embedding with { FirstRow = 3 })).Message);
        Assert.Equal("a slice cannot be sparse", Of(first with { SparseCount = 1 }, last)[0].Message);
        Assert.Equal("named twice", Assert.Single(Of(embedding, last with { Offset = 84 })).Message);
        Assert.Equal("its slices differ in dtype: BFloat16, Float16", Assert.Single(Of(first, last with { Type = DType.Float16 })).Message);

        // A tied head comes in the same slices as its embedding: they are compared one by one.
        ManifestTensor[] head = [first with { Name = "lm_head.weight", Offset = 84 }, last with { Name = "lm_head.weight", Offset = 120 }];
        Assert.Empty(Of([first, last, .. head]));
        Assert.Contains("same slices", Assert.Single(Of([embedding, .. head])).Message, StringComparison.Ordinal);
        Assert.Contains("same slices", Assert.Single(Of(first, last, embedding with { Name = "lm_head.weight", Offset = 84 })).Message,
            StringComparison.Ordinal);

        IReadOnlyList<Problem> Of(params ManifestTensor[] tensors)
            => Check(Manifest(Kind.Partial) with { Tensors = tensors, PayloadBytes = 168 });
    }

    /// <summary>All rows once and in any order, and now and then too many, too few or none that there are.</summary>
    private static List<(long First, long Rows)> Cut(Random random, long rows)
    {
        List<(long First, long Rows)> slices = [];
        for (long at = 0; at < rows;)
        {
            long count = random.NextInt64(1, rows - at + 1);
            slices.Add((at, count));
            at += count;
        }

        if (random.Next(9) > 0) return slices;
        int changed = random.Next(slices.Count);
        (long first, long length) = slices[changed];
        slices[changed] = random.Next(5) switch
        {
            0 => (first + random.Next(-2, 3), length),
            1 => (first, length + random.Next(-2, 3)),
            2 => (first, long.MaxValue),
            3 => (long.MaxValue, length),
            _ => (long.MinValue, length),
        };
        if (random.Next(2) == 0) slices.Add(slices[random.Next(slices.Count)]);
        return slices;
    }

    private static UpdateManifest Manifest(Kind kind)
    {
        List<ManifestTensor> tensors = [];
        long end = 0;
        foreach ((string name, IReadOnlyList<long> shape) in s_model.Shapes)
        {
            bool sparse = kind == Kind.PartialSparse || (kind == Kind.FullButOneSparse && tensors.Count == 2);
            ManifestTensor tensor = new(name, DType.BFloat16, shape, end, sparse ? 1 : null);
            if (kind is Kind.Partial && tensors.Count == 5) break;
            tensors.Add(tensor);
            end += tensor.Bytes;
        }

        return new UpdateManifest
        {
            Tensors = tensors,
            PayloadBytes = end,
            BaseVersion = 3,
            NewVersion = 4,
            Partial = kind is Kind.Partial or Kind.PartialSparse or Kind.PartialOfAll,
        };
    }

    private static IReadOnlyList<Problem> Check(
        UpdateManifest manifest, string? poison = null, ulong served = 3, WeightFormat format = WeightFormat.BFloat16)
        => UpdatePreflight.Check(manifest, s_model.Plan, format, served, poison);
}
