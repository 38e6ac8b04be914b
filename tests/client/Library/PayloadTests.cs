using System.IO.Hashing;
using System.Text;
using CsCheck;
using Xunit;

namespace Rollout.Client.Tests;

public sealed class PayloadTests
{
    private const int PieceElements = PayloadWriter.Piece / 2;

    private static readonly Gen<int> s_counts = Gen.OneOf(Gen.Int[0, 3], Gen.Int[125, 131], Gen.Int[253, 259], Gen.Int[0, 100_000]);

    // Zero, one, and sizes around the alignment and the piece size, in elements of two bytes.
    private static readonly int[] s_borders = [0, 1, 127, 128, 129, PieceElements - 1, PieceElements, PieceElements + 1];

    [Fact]
    public void Tensors_stand_in_order_at_aligned_offsets()
    {
        PayloadLayout layout = PayloadLayout.Of(
            [Zeros("a", TensorDType.BF16, 3, 5), Zeros("b", TensorDType.F32, 64), Zeros("c", TensorDType.F16)]);
        Assert.Equal([0UL, 256, 512], layout.Manifest.Select(entry => entry.Offset));
        Assert.Equal([30L, 256, 2], layout.Sizes);
        Assert.Equal(514, layout.PayloadBytes);
        Assert.Equal([3UL, 5UL], layout.Manifest[0].Shape);
        Assert.Equal(V1.TensorDType.F32, layout.Manifest[1].Dtype);
    }

    /// <summary>Sizes around the alignment: tensors do not overlap, and gaps are no larger than needed.</summary>
    [Fact]
    public void Tensors_never_overlap_and_gaps_are_smaller_than_the_alignment() =>
        Gen.Select(s_counts.Array[1, 8], Gen.Bool).Sample((counts, aligned) =>
        {
            int alignment = aligned ? PayloadLayout.Alignment : 1;
            TensorSource[] tensors = [.. counts.Select((count, i) => Zeros($"t{i}", (TensorDType)(i % 3), count))];
            PayloadLayout layout = PayloadLayout.Of(tensors, alignment);
            long end = 0;
            for (int i = 0; i < tensors.Length; i++)
            {
                long offset = (long)layout.Manifest[i].Offset;
                if (offset % alignment != 0 || offset < end || offset - end >= alignment || layout.Sizes[i] != tensors[i].Bytes)
                    return false;
                end = offset + tensors[i].Bytes;
            }

            return layout.PayloadBytes == end && layout.Fits(tensors, alignment) && !layout.Fits(tensors, alignment + 1);
        });

    [Fact]
    public void Offsets_go_on_past_what_32_bits_hold()
    {
        long rows = (1L << 31) + 1;
        PayloadLayout layout = PayloadLayout.Of(
            [Zeros("a", TensorDType.BF16, rows), Zeros("b", TensorDType.F32, rows, 3), Zeros("c", TensorDType.F16, 1)]);
        ulong second = (1UL << 32) + 256;
        Assert.Equal([0UL, second, second + (12UL << 31) + 256], layout.Manifest.Select(entry => entry.Offset));
        Assert.Equal((long)layout.Manifest[2].Offset + 2, layout.PayloadBytes);
    }

    /// <summary>The end of a tensor of 5 GB, written to a window at the start of a small file.</summary>
    [Fact]
    public async Task Bytes_past_what_32_bits_hold_are_asked_for_and_written_where_they_belong()
    {
        const long Start = 5L << 30;
        List<long> asked = [];
        TensorSource source = new("a", TensorDType.BF16, [(Start + 2_000_000) / 2], (offset, destination) =>
        {
            asked.Add(offset);
            for (int i = 0; i < destination.Length; i++)
                destination[i] = (byte)((offset + i) % 251);
        });
        string folder = Directory.CreateTempSubdirectory("payload-").FullName;
        using (PayloadFile file = PayloadFile.Create(2_000_100, folder))
        {
            PayloadWriter writer = new(PayloadLayout.Of([source]), [source], hash: false);
            await writer.WriteToAsync(file, Start, Start + 2_000_000, 100, 1, TestContext.Current.CancellationToken);
            byte[] written = File.ReadAllBytes(file.Path);
            Assert.Equal([Start, Start + PayloadWriter.Piece], asked);
            Assert.Equal(new byte[100], written[..100]);
            Assert.Equal(Enumerable.Range(0, 2_000_000).Select(i => (byte)((Start + i) % 251)), written[100..]);
        }

        Directory.Delete(folder);
    }

    /// <summary>For the smallest and the largest models: a ring has at least two windows, and a window is never empty.</summary>
    [Fact]
    public void A_window_is_part_of_the_memory_and_at_least_a_byte() =>
        Gen.Select(Gen.Long[0, 1L << 41], Gen.Long[1, 1L << 41], Gen.Int[0, 40], Gen.Int[0, 40]).Sample((payload, capacity, shift, other) =>
        {
            (payload, capacity) = (payload >> shift, Math.Max(1, capacity >> other));
            long window = SharedMemorySender.WindowBytes(payload, capacity);
            return window is >= 1 and <= 1 << 30 && (capacity >= payload || 2 * window <= Math.Max(2, capacity));
        });

    [Fact]
    public void A_layout_fits_the_same_names_types_and_shapes_only()
    {
        PayloadLayout layout = PayloadLayout.Of(
            [Zeros("a", TensorDType.BF16, 4, 2)]);
        Assert.True(layout.Fits([Zeros("a", TensorDType.BF16, 4, 2)], PayloadLayout.Alignment));
        Assert.False(layout.Fits([Zeros("b", TensorDType.BF16, 4, 2)], PayloadLayout.Alignment));
        Assert.False(layout.Fits([Zeros("a", TensorDType.F16, 4, 2)], PayloadLayout.Alignment));
        Assert.False(layout.Fits([Zeros("a", TensorDType.BF16, 2, 4)], PayloadLayout.Alignment));
        Assert.False(layout.Fits([Zeros("a", TensorDType.BF16, 4, 2), Zeros("b", TensorDType.BF16, 1)], PayloadLayout.Alignment));
        Assert.False(layout.Fits([Zeros("a", TensorDType.BF16, 8)], PayloadLayout.Alignment));
        Assert.False(layout.Fits([Sparse("a", 4, 2)], PayloadLayout.Alignment));
        Assert.False(layout.Fits([Zeros("a", TensorDType.BF16, 4, 2)], 1));
        PayloadLayout slices = PayloadLayout.Of([Slice(0, 4), Slice(4, 5)]);
        Assert.Equal([16L, 20], slices.Sizes);
        Assert.Equal([(0ul, 4ul), (4, 5)], slices.Manifest.Select(tensor => (tensor.FirstRow, tensor.Rows)));
        Assert.All(slices.Manifest, tensor => Assert.Equal([9ul, 2], tensor.Shape));
        Assert.True(slices.Fits([Slice(0, 4), Slice(4, 5)], PayloadLayout.Alignment));
        Assert.False(slices.Fits([Slice(0, 4), Slice(3, 5)], PayloadLayout.Alignment));
        Assert.False(slices.Fits([Slice(0, 5), Slice(4, 5)], PayloadLayout.Alignment));
        Assert.False(slices.Fits([Slice(4, 5), Slice(0, 4)], PayloadLayout.Alignment));
        Assert.Contains("more than once: a", Assert.Throws<ArgumentException>(
            () => PayloadLayout.Of([Slice(0, 4), Zeros("a", TensorDType.BF16, 9, 2)])).Message, StringComparison.Ordinal);
        foreach ((long first, long rows) in ((long, long)[])[(-1, 2), (0, 0), (0, 10), (9, 1), (long.MaxValue, 1), (1, long.MaxValue)])
            Assert.Throws<ArgumentException>(() => Slice(first, rows));

        PayloadLayout sparse = PayloadLayout.Of([Sparse("a", 4, 2)]);
        Assert.True(sparse.Fits([Sparse("a", 4, 2)], PayloadLayout.Alignment));
        Assert.False(sparse.Fits([Sparse("a", 4, 3)], PayloadLayout.Alignment));
        Assert.False(sparse.Fits([Zeros("a", TensorDType.BF16, 4)], PayloadLayout.Alignment));
    }

    [Fact]
    public void Every_name_given_twice_is_listed()
    {
        TensorSource[] tensors = [.. "abba".Select(name => Zeros($"{name}", TensorDType.F32, 1))];
        ArgumentException error = Assert.Throws<ArgumentException>(() => PayloadLayout.Of(tensors));
        Assert.Contains("a, b", error.Message);
        Assert.Throws<ArgumentException>(() => PayloadLayout.Of([]));
    }

    [Fact]
    public void Invalid_shapes_are_refused()
    {
        Assert.Throws<ArgumentException>(() => Zeros("a", TensorDType.F32, -1));
        Assert.Throws<ArgumentException>(() => new TensorSource("a", TensorDType.F32, [long.MaxValue, 2], (_, _) => { }));
        Assert.Throws<ArgumentException>(() => TensorSource.FromMemory("a", TensorDType.F32, [2], new byte[7]));
    }

    /// <summary>The values xxHash's own test vectors and xxh128sum give: most significant byte first.</summary>
    [Fact]
    public void Digests_have_the_canonical_byte_order()
    {
        Assert.Equal("99aa06d3014798d86001c324468d497f", WeightDigest.Show(XxHash128.Hash([])));
        Assert.Equal("a96faf705af16834e6c632b61e964e1f", WeightDigest.Show(XxHash128.Hash("a"u8)));
        Assert.Equal("06b05ab6733a618578af5f94892f3950", WeightDigest.Show(XxHash128.Hash("abc"u8)));
        byte[] both = [.. XxHash128.Hash("a"u8), .. XxHash128.Hash("abc"u8)];
        Assert.Equal(WeightDigest.Show(XxHash128.Hash(both)), WeightDigest.Show(WeightDigest.Combine(both)));
    }

    /// <summary>The test vectors of DEFINITIONS.md.</summary>
    [Theory]
    [InlineData(0, "99aa06d3014798d86001c324468d497f")]
    [InlineData(1, "d4bb14079dface434a09d02574c507f7")]
    [InlineData(131_072, "7b8c03a20d3d9943c5e068d15eab05ae")]
    [InlineData(131_073, "69ace5a8cdf84f681035e1c21cbc9d3a")]
    [InlineData(1_000_003, "0248dbd5dc7476f99f672cc9bf9ef022")]
    public void The_digest_of_a_tensor_is_as_defined(int length, string expected)
    {
        byte[] tensor = [.. Enumerable.Range(0, length).Select(i => (byte)((i * 31L + 7) % 251))];
        foreach (int cut in (int[])[1 << 20, 131_072, 99_991, 240])
        {
            TensorHasher hasher = new(length);
            foreach (byte[] part in tensor.Chunk(cut))
                hasher.Append(part);
            byte[] digest = new byte[WeightDigest.Length];
            hasher.Finish(digest);
            Assert.Equal(expected, WeightDigest.Show(digest));
        }
    }

    /// <summary>Both ways of writing give the bytes of the layout and the same digest, for any sizes.</summary>
    [Fact]
    public void Stream_and_shared_memory_carry_the_same_payload()
    {
        string folder = Directory.CreateTempSubdirectory("payload-").FullName;
        Gen<int> size = Gen.OneOf(
            Gen.Int[0, 7].Select(border => s_borders[border]),
            Gen.Int[0, 300],
            Gen.Int[PieceElements - 200, PieceElements + 200],
            Gen.Int[0, 1_500_000]);
        size.Array[1, 6].Sample(
            sizes =>
            {
                byte[][] contents = [.. sizes.Select((count, i) => Bytes(2 * count, i))];
                TensorSource[] tensors = [.. contents.Select((bytes, i) =>
                    TensorSource.FromMemory($"t{i}", TensorDType.BF16, [bytes.Length / 2], bytes))];
                PayloadLayout layout = PayloadLayout.Of(tensors);
                byte[] expected = new byte[layout.PayloadBytes];
                for (int i = 0; i < tensors.Length; i++)
                    contents[i].CopyTo(expected, (int)layout.Manifest[i].Offset);

                PayloadWriter stream = new(layout, tensors, hash: true);
                byte[] streamed = new byte[layout.PayloadBytes];
                long end = 0;
                foreach ((long offset, Memory<byte> bytes) in stream.Pieces())
                {
                    Assert.Equal(end, offset);
                    bytes.Span.CopyTo(streamed.AsSpan((int)offset));
                    end = offset + bytes.Length;
                }

                PayloadWriter shared = new(layout, tensors, hash: true);
                byte[] written;
                using (PayloadFile file = PayloadFile.Create(Math.Max(1, layout.PayloadBytes), folder))
                {
                    for (long from = 0, to; from < layout.PayloadBytes; from = to)
                    {
                        to = Math.Min(layout.PayloadBytes, from + 700_001);
                        shared.WriteToAsync(file, from, to, from, parallelism: 2, default).Wait();
                    }

                    written = File.ReadAllBytes(file.Path);
                }

                byte[] digest = XxHash128.Hash([.. contents.SelectMany(FakeWeights.DigestOf)]);
                return end == layout.PayloadBytes && streamed.AsSpan().SequenceEqual(expected)
                    && written.AsSpan(0, expected.Length).SequenceEqual(expected)
                    && stream.Digest().AsSpan().SequenceEqual(digest) && shared.Digest().AsSpan().SequenceEqual(digest);
            },
            iter: 30,
            print: sizes => string.Join(", ", sizes));
        Assert.Empty(Directory.GetFiles(folder));
        Directory.Delete(folder);
    }

    /// <summary>One is sent while the next is filled.</summary>
    [Fact]
    public void A_piece_is_not_written_over_while_the_next_one_is_made()
    {
        byte[] content = Bytes((3 * PayloadWriter.Piece) + 1000, 1);
        TensorSource[] tensors = [TensorSource.FromMemory("a", TensorDType.BF16, [content.Length / 2], content)];
        (long Offset, Memory<byte> Bytes)? before = null;
        foreach ((long Offset, Memory<byte> Bytes) piece in new PayloadWriter(PayloadLayout.Of(tensors), tensors, hash: false).Pieces())
        {
            if (before is { } last)
                Assert.True(last.Bytes.Span.SequenceEqual(content.AsSpan((int)last.Offset, last.Bytes.Length)));
            before = piece;
        }

        Assert.Equal(3L * PayloadWriter.Piece, before!.Value.Offset);
    }

    [Fact]
    public void Without_hashing_there_is_no_digest()
    {
        TensorSource[] tensors = [TensorSource.FromMemory("a", TensorDType.BF16, [2], Encoding.ASCII.GetBytes("abcd"))];
        PayloadWriter writer = new(PayloadLayout.Of(tensors), tensors, hash: false);
        Assert.Equal(4, writer.Pieces().Sum(piece => piece.Bytes.Length));
        Assert.Empty(writer.Digest());
    }

    /// <summary>Indices, then values, wherever a piece begins and ends.</summary>
    [Fact]
    public void Sparse_tensors_and_slices_of_memory_are_copied_right_from_any_offset() =>
        Gen.Select(Gen.Int[0, 40], Gen.Int[0, 240], Gen.Int[0, 240], Gen.Enum<TensorDType>()).Sample((count, from, to, type) =>
        {
            uint[] indices = [.. Enumerable.Range(0, count).Select(i => (uint)(i * 3_000_000_000L / 40))];
            byte[] values = Bytes(type.Size() * count, count);
            // From the middle of larger arrays, as a trainer's own buffers are.
            ReadOnlyMemory<uint> slice = new uint[] { 9, 9 }.Concat(indices).Append(9u).ToArray().AsMemory(2, count);
            ReadOnlyMemory<byte> sliceOfValues = new byte[] { 7 }.Concat(values).Append((byte)7).ToArray().AsMemory(1, values.Length);
            TensorSource sparse = TensorSource.Sparse("s", type, [1 << 16, 1 << 16], slice, sliceOfValues);
            TensorSource memory = TensorSource.FromMemory("m", type, [count], sliceOfValues);
            byte[] expected = [.. System.Runtime.InteropServices.MemoryMarshal.AsBytes<uint>(indices), .. values];
            return sparse.Bytes == expected.Length && sparse.SparseCount == count && memory.SparseCount is null
                && Part(sparse, expected) && Part(memory, values);

            bool Part(TensorSource source, byte[] whole)
            {
                int first = Math.Min(Math.Min(from, to), whole.Length);
                int last = Math.Min(Math.Max(from, to), whole.Length);
                byte[] part = new byte[last - first];
                source.CopyTo(first, part);
                return part.AsSpan().SequenceEqual(whole.AsSpan(first, part.Length));
            }
        });

    private static TensorSource Slice(long firstRow, long rows) =>
        TensorSource.Slice("a", TensorDType.BF16, [9, 2], firstRow, rows, (_, destination) => destination.Clear());

    private static TensorSource Sparse(string name, long elements, int count) =>
        TensorSource.Sparse(name, TensorDType.BF16, [elements, 2], new uint[count], new byte[2 * count]);

    private static byte[] Bytes(int count, int seed)
    {
        byte[] bytes = new byte[count];
        new Random(seed).NextBytes(bytes);
        return bytes;
    }

    private static TensorSource Zeros(string name, TensorDType type, params long[] shape) =>
        new(name, type, shape, (_, destination) => destination.Clear());
}
